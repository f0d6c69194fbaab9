"""Block-sparse attention for Hopper (sm_90): one persistent program an SM, warps with fixed roles.

Two consumer warpgroups compute (`hopper_consumer`), one warp loads through a ring of shared memory
and one stores (`hopper_transport`). Each program walks its own list of tiles, made on the host
(`hopper_schedule`). A tile is one query block of 128 rows of one head; tensors are read and written
in place through four-dimensional TMA descriptors, which also fill what lies past the end with
zeros and drop what is written there. Only rows of row-shared heads are gathered and scattered one
by one, by the same two warps (COPIES).

    softmax(scale * q k^T) v    over the key blocks that a tile's row keeps

FIXED: the row maximum of a tile's first block is the reference of its softmax; neither maximum nor
rescaling is left in the loop. Any finite reference gives the same quotient, so the result is exact
as long as nothing overflows, and the row sum is at least 1 (the first block's maximum adds 2^0), so
nothing that matters underflows. Whatever overflows raises the flag, and the REPAIR launch of the
exact form, which otherwise ends at once, computes everything again.
"""

from __future__ import annotations

from calibatt_compiler.kernels.hopper.consumer import consumer
from calibatt_compiler.kernels.hopper.launch import ZONE_SIZES
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

COPY_SIZES = ("q_batch", "q_head", "q_token", "computed_rows", "stores")
"""Integers that only patterns with row-shared heads have; None elsewhere."""
RUN_TIME_SIZES = ("batches", "heads", "tiles", "query_blocks", "length_q", "length_k")
"""Integers that must not be specialised: no pattern compiles a kernel of its own."""


@gluon.jit(do_not_specialize=[*RUN_TIME_SIZES, *COPY_SIZES, *ZONE_SIZES])
def hopper_attention(
    q_desc, k_desc, v_desc, o_desc,
    tiles_ptr, starts_ptr, runs_ptr, counts_ptr, lengths_ptr, codes_ptr, code_starts_ptr, lse_ptr,
    flag_ptr, repairs_ptr, sums_ptr, scale_log2, batches, heads, tiles, query_blocks, length_q,
    length_k,
    BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr, FIXED: gl.constexpr,
    REPAIR: gl.constexpr, RAGGED: gl.constexpr, LENGTHS: gl.constexpr, WEIGHTED: gl.constexpr,
    LSE: gl.constexpr, ENERGY: gl.constexpr, LITERALS: gl.constexpr, RUNS: gl.constexpr,
    q_ptr, o_ptr, q_batch, q_head, q_token, computed_ptr, targets_ptr, computed_rows, stores,
    COPIES: gl.constexpr, draw_phase, left, right, ZONES: gl.constexpr,
):  # fmt: skip
    """Attend every tile of `tiles_ptr`, once for each batch item.

    q, k, v, o: descriptors of (B, H, S, D), loaded in tiles of 64, BLOCK_N, BLOCK_N and 64 rows.
    tiles int32 (T, 4), starts int32 (programs + 1), runs int32: see `hopper_schedule`. counts int32
    (B + 1, T) and lengths int32 (B): with LENGTHS only, see `hopper_counts`. codes uint8 and
    code_starts int32 (T + 1): with WEIGHTED only, see `hopper_schedule.BlockCodes`. lse float32
    (B, H, Sq): natural log-sum-exp, written with LSE only. flag int32 (1): set with FIXED, read
    with REPAIR, which adds one to repairs int32 (1). sums float32 (B, H, query_blocks,
    key_blocks | 1, 128), with ENERGY only, where every tile keeps every key block: log2 of each
    query's sum of exponentials over the key block at each position of its tile. LITERALS: None, or
    a function that gives the key blocks of a row as literals, in RUNS intervals.

    COPIES: tiles whose last word is negative are of row-shared heads. Their row i is the token
    `computed[i]`, int32 (computed_rows), and its output goes to those of the tokens
    `targets[:, i]`, int32 (slots, computed_rows), that are not below 0; computed_rows is a multiple
    of 128. lse holds such a head row by row. TMA can't gather rows, so q and o come as pointers,
    too: the strides of q count 8 elements, o is contiguous (B, Sq, H, D). stores: pieces of 8 rows
    x 64 columns that are stored of a tile, all slots together.

    ZONES: tiles and runs are those of `zone_table`, and a step is drawn from them: draw_phase is
    its `drawing.phase`, blocks `left` to `right` are the keys without text. LITERALS is then None
    or a function that gives the word of a run by its number.
    """
    # A stage more for values: PV of a block follows its QK by a block, so they leave later.
    V_STAGES: gl.constexpr = STAGES + 1
    # Two tiles of queries: the next one's are loaded while this one's are used, and its slot stages
    # this one's output.
    q_tiles = gl.allocate_shared_memory(q_desc.dtype, [4, 1, 1, 64, HEAD_DIM], q_desc.layout)
    k_tiles = gl.allocate_shared_memory(
        k_desc.dtype, [STAGES, 1, 1, BLOCK_N, HEAD_DIM], k_desc.layout
    )
    v_tiles = gl.allocate_shared_memory(
        v_desc.dtype, [V_STAGES, 1, 1, BLOCK_N, HEAD_DIM], v_desc.layout
    )
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [4, 1], layout)
    q_empty = gl.allocate_shared_memory(gl.int64, [4, 1], layout)
    staged = gl.allocate_shared_memory(gl.int64, [4, 1], layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    v_full = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], layout)
    v_empty = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], layout)
    octaves = k_full  # unused
    if ZONES:
        # Of the keys in each stage.
        octaves = gl.allocate_shared_memory(gl.float32, [STAGES, 1], layout)
    for slot in gl.static_range(4):
        mbarrier.init(q_full.index(slot), count=1)
        mbarrier.init(q_empty.index(slot), count=1)
        mbarrier.init(staged.index(slot), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        # Every thread of both consumers releases a stage: see `release`.
        mbarrier.init(k_empty.index(stage), count=256)
    for stage in gl.static_range(V_STAGES):
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=256)
    fence_async_shared()
    # Registers move from the two warps that only copy to the warpgroups that hold accumulators.
    # To gather and scatter rows takes more of them than to start TMA.
    registers: gl.constexpr = [232, 40, 40] if COPIES else [240, 24, 24]
    # fmt: off
    gl.warp_specialize(
        [
            (consumer, (
                q_tiles, k_tiles, v_tiles, q_full, staged, k_full, k_empty, v_full, v_empty,
                tiles_ptr, starts_ptr, counts_ptr, lengths_ptr, codes_ptr, code_starts_ptr, lse_ptr,
                flag_ptr, sums_ptr, scale_log2, batches, heads, tiles, query_blocks, length_q,
                length_k, octaves, draw_phase,
                0, BLOCK_N, HEAD_DIM, STAGES, FIXED, REPAIR, RAGGED, LENGTHS, WEIGHTED, LSE,
                ENERGY, ZONES,
            )),
            (consumer, (
                q_tiles, k_tiles, v_tiles, q_full, staged, k_full, k_empty, v_full, v_empty,
                tiles_ptr, starts_ptr, counts_ptr, lengths_ptr, codes_ptr, code_starts_ptr, lse_ptr,
                flag_ptr, sums_ptr, scale_log2, batches, heads, tiles, query_blocks, length_q,
                length_k, octaves, draw_phase,
                1, BLOCK_N, HEAD_DIM, STAGES, FIXED, REPAIR, RAGGED, LENGTHS, WEIGHTED, LSE,
                ENERGY, ZONES,
            )),
            (producer, (
                q_desc, k_desc, v_desc, q_tiles, k_tiles, v_tiles,
                q_full, q_empty, k_full, k_empty, v_full, v_empty,
                tiles_ptr, starts_ptr, runs_ptr, counts_ptr, lengths_ptr, flag_ptr, batches, tiles,
                BLOCK_N, STAGES, REPAIR, LENGTHS, LITERALS, RUNS,
                q_ptr, q_batch, q_head, q_token, computed_ptr, computed_rows, COPIES,
                octaves, draw_phase, left, right, length_k, ZONES,
            )),
            (storer, (
                o_desc, q_tiles, q_empty, staged, tiles_ptr, starts_ptr, flag_ptr, repairs_ptr,
                batches, REPAIR, o_ptr, targets_ptr, computed_rows, stores, heads, length_q, COPIES,
            )),
        ],
        [4, 1, 1],
        registers,
    )
    # fmt: on


@gluon.jit(do_not_specialize=["tiles", "batches"])
def hopper_counts(
    tiles_ptr, runs_ptr, lengths_ptr, counts_ptr, tiles, batches,
    BLOCK_N: gl.constexpr, TILES: gl.constexpr, COPIES: gl.constexpr,
):  # fmt: skip
    """Count the key blocks of each tile that hold valid keys: counts int32 (B + 1, T).

    Packed for `tile_count`; the row past the last batch item repeats it. A tile without any
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
