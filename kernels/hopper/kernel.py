"""Block-sparse attention for Hopper (sm_90): one persistent program an SM, warps with fixed roles.

Two consumer warpgroups compute (`consumer`), one warp loads through a ring of shared memory
and one stores (`transport`). Each program walks its own list of tiles, made on the host
(`schedule`). A tile is one query block of 128 rows of one head; tensors are read and written
in place through four-dimensional TMA descriptors, which also fill what lies past the end with
zeros and drop what is written there. Only rows of row-shared heads are gathered and scattered one
by one, by the same two warps (`copies`).

    softmax(scale * q k^T) v    over the key blocks that a tile's row keeps

`fixed`: the row maximum of a tile's first block is the reference of its softmax; neither maximum
nor rescaling is left in the loop. Any finite reference gives the same quotient, so the result is
exact as long as nothing overflows, and the row sum is at least 1 (the first block's maximum adds
2^0), so nothing that matters underflows. Whatever overflows raises the flag, and the `repair`
launch of the exact form, which otherwise ends at once, computes everything again.
"""

from __future__ import annotations

from calibatt_compiler.kernels.hopper.aggregates import Tiles, make_queries, make_ring
from calibatt_compiler.kernels.hopper.arguments import Draw, RowSizes, Sizes
from calibatt_compiler.kernels.hopper.consumer import consumer
from calibatt_compiler.kernels.hopper.primitives import (
    exp2,
    fence_async_shared,
    gl,
    gluon,
    high,
    low,
    mbarrier,
)
from calibatt_compiler.kernels.hopper.transport import producer, storer

# Numbers that no kernel is compiled for. Triton would specialise those of a tuple, so they come one
# by one.
NUMBERS = [*Sizes._fields, *RowSizes._fields, *Draw._fields]


@gluon.jit(do_not_specialize=NUMBERS)
def hopper_attention(
    q_desc, k_desc, v_desc, o_desc, tables, results, rows, scale_log2,
    batches, heads, tiles, query_blocks, length_q, length_k,
    q_batch, q_head, q_token, computed_rows, stores, phase, left, right,
    VARIANT: gl.constexpr, LITERALS: gl.constexpr, RUNS: gl.constexpr,
):  # fmt: skip
    """Attend every tile of `tables`, once for each batch item.

    q, k, v, o: descriptors of (B, H, S, D), loaded in tiles of 64, BLOCK_N, BLOCK_N and 64 rows.
    tables, results, rows: named tuples of `arguments`, which says what is in them and what the
    numbers are; what a VARIANT does not need is None. LITERALS: None, or a function that gives the
    key blocks of a row as literals, in RUNS intervals; of zones, the word of a run by its number.
    """
    octaves = None
    if VARIANT.zones:
        stages: gl.constexpr = VARIANT.stages
        octaves = gl.allocate_shared_memory(gl.float32, [stages, 1], mbarrier.MBarrierLayout())
    queries = make_queries(q_desc)
    keys = make_ring(k_desc, octaves, VARIANT.stages)
    # A stage more for values: PV of a block follows its QK by a block, so they leave later.
    values = make_ring(v_desc, None, VARIANT.stages + 1)
    sizes = Sizes(batches, heads, tiles, query_blocks, length_q, length_k)
    row_sizes = RowSizes(q_batch, q_head, q_token, computed_rows, stores)
    draw = Draw(phase, left, right)
    work = Tiles(tables=tables, results=results, sizes=sizes, draw=draw, VARIANT=VARIANT)
    fence_async_shared()
    # Registers move from the two warps that only copy to the warpgroups that hold accumulators.
    # To gather and scatter rows takes more of them than to start TMA.
    registers: gl.constexpr = [232, 40, 40] if VARIANT.copies else [240, 24, 24]
    gl.warp_specialize(
        [
            (consumer, (queries, keys, values, work, scale_log2, 0)),
            (consumer, (queries, keys, values, work, scale_log2, 1)),
            (producer, (q_desc, queries, keys, values, work, rows, row_sizes, LITERALS, RUNS)),
            (storer, (o_desc, queries, work, rows, row_sizes)),
        ],
        [4, 1, 1],
        registers,
    )


@gluon.jit(do_not_specialize=["tiles", "batches"])
def hopper_counts(
    tiles_ptr, runs_ptr, lengths_ptr, counts_ptr, tiles, batches,
    BLOCK_N: gl.constexpr, TILES: gl.constexpr, COPIES: gl.constexpr,
):  # fmt: skip
    """Count the key blocks of each tile that hold valid keys: counts int32 (B + 1, T).

    Packed for `Tiles.count`; the row past the last batch item repeats it. A tile without any
    valid key has count 0 and its first block masked. Grid: (tiles / TILES, batches + 1).
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    tile = gl.program_id(0) * TILES + gl.arange(0, TILES, layout)
    inside = tile < tiles
    batch = gl.minimum(gl.program_id(1), batches - 1)
    length = gl.load(lengths_ptr + batch)
    whole = (length + BLOCK_N - 1) // BLOCK_N
    # The block where the keys end, if they end within one.
    cut = gl.where(length % BLOCK_N != 0, length // BLOCK_N, -1)
    intervals = low(gl.load(tiles_ptr + tile * 4 + 2, mask=inside, other=0))
    offset = gl.load(tiles_ptr + tile * 4 + 3, mask=inside, other=0)
    if COPIES:
        offset = offset & 0x7FFFFFFF
    blocks = gl.zeros([TILES], gl.int32, layout)
    masked = gl.zeros([TILES], gl.int32, layout)
    for t in range(gl.max(intervals, 0)):
        run = gl.load(runs_ptr + offset + t, mask=t < intervals, other=0)
        start = low(run)
        valid = gl.maximum(gl.minimum(high(run), whole - start), 0)
        holds = (cut >= start) & (cut < start + valid)
        masked = gl.where(holds, blocks + cut - start + 1, masked)
        blocks += valid
    masked = gl.where(blocks == 0, 1, masked)
    out = counts_ptr + gl.program_id(1) * tiles + tile
    gl.store(out, blocks + (masked << 16), mask=inside)


@gluon.jit(do_not_specialize=["query_blocks", "key_blocks", "length_q"])
def hopper_energies(
    sums_ptr, lse_ptr, energy_ptr, query_blocks, key_blocks, length_q,
    BLOCK_N: gl.constexpr, POSITIONS: gl.constexpr,
):  # fmt: skip
    """Turn the sums that `hopper_attention` kept into block energies.

    sums float32 (N, query_blocks, key_blocks | 1, 128), lse float32 (N, Sq), natural log; energy
    float32 (N, query_blocks, key_blocks), N heads of all batch items. Each tile took the
    diagonal key block first, then the others from the lowest upwards. Grid: (N * query_blocks,
    key_blocks / POSITIONS).
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
    by_position: gl.constexpr = gl.SliceLayout(1, layout)
    tile = gl.program_id(0)
    block = tile % query_blocks
    token = block * 128 + gl.arange(0, 128, gl.SliceLayout(0, layout))
    lse_row = gl.cast(tile // query_blocks, gl.int64) * length_q
    lse = gl.load(lse_ptr + lse_row + token, mask=token < length_q, other=0.0)
    # Queries past the end count nothing.
    lse = gl.where(token < length_q, lse * 1.4426950408889634, float("inf"))
    position = gl.program_id(1) * POSITIONS + gl.arange(0, POSITIONS, by_position)
    row = gl.cast(tile, gl.int64) * key_blocks
    kept_row = gl.cast(tile, gl.int64) * (key_blocks | 1) * 128
    offset = gl.expand_dims(position * 128, 1) + gl.expand_dims(token - block * 128, 0)
    inside = gl.expand_dims(position < key_blocks, 1) & gl.expand_dims(token >= 0, 0)
    kept = gl.load(sums_ptr + kept_row + offset, mask=inside, other=-float("inf"))
    energy = gl.sum(exp2(kept - gl.expand_dims(lse, 0)), 1) / gl.minimum(
        length_q - block * 128, 128
    )
    first = gl.minimum(block * 128 // BLOCK_N, key_blocks - 1)
    key_block = gl.where(position <= first, position - 1, position)
    key_block = gl.where(position == 0, first, key_block)
    gl.store(energy_ptr + row + key_block, energy, mask=position < key_blocks)
