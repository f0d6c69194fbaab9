"""The two warps that move data: one loads Q, K and V ahead of need, one stores the output.

Only the loading warp knows which key blocks a row keeps. So where their indices come from (a
table, literals) costs the consumers nothing.
"""

from __future__ import annotations

from triton.experimental.gluon.language.nvidia.hopper import tma

from calibatt_compiler.kernels.hopper_primitives import (
    advance,
    gl,
    gluon,
    high,
    low,
    mbarrier,
    tile_count,
    tiles_to_do,
)  # fmt: skip

# triton 3.9 renamed the two copies; their arguments stayed.
start_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
start_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def load_tile(desc, batch, head, row, full, tile):
    """Start the copy of one tile of rows; `full` completes when it has landed."""
    mbarrier.expect(full, desc.block_type.nbytes)
    start_load(desc, [batch, head, row, 0], full, tile)


@gluon.jit
def load_block(
    k_desc, v_desc, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty,
    batch, head, row, number, live, STAGES: gl.constexpr,
):  # fmt: skip
    """Load the keys and then the values of block `number`, once their stages are free.

    `live` is always true: triton 3.6 drops a loop-carried number whose only use is the bound of a
    nested loop (the first tile's value would then serve every tile), so callers give such bounds
    this second use.
    """
    V_STAGES: gl.constexpr = STAGES + 1
    stage = number % STAGES
    mbarrier.wait(k_empty.index(stage), ((number // STAGES) & 1) ^ 1, pred=live)
    load_tile(k_desc, batch, head, row, k_full.index(stage), k_tiles.index(stage))
    stage = number % V_STAGES
    mbarrier.wait(v_empty.index(stage), ((number // V_STAGES) & 1) ^ 1)
    load_tile(v_desc, batch, head, row, v_full.index(stage), v_tiles.index(stage))


@gluon.jit
def literal_block(literals, rank, RUNS: gl.constexpr):
    """Key block with `rank` kept blocks before it; see `codegen_hopper` for the tuple."""
    shift = literals[0]
    for k in gl.static_range(1, RUNS):
        shift = gl.where(rank >= literals[2 * k - 1], literals[2 * k], shift)
    return rank + shift


@gluon.jit
def producer(
    q_desc, k_desc, v_desc, q_tiles, k_tiles, v_tiles,
    q_full, q_empty, k_full, k_empty, v_full, v_empty,
    tiles_ptr, starts_ptr, runs_ptr, counts_ptr, lengths_ptr, flag_ptr, batches, tiles,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, REPAIR: gl.constexpr, LENGTHS: gl.constexpr,
    LITERALS: gl.constexpr, RUNS: gl.constexpr,
):  # fmt: skip
    """Load the queries, keys and values of every tile of this program, in the consumers' order."""
    first, end, total = tiles_to_do(starts_ptr, flag_ptr, batches, REPAIR)
    number = 0
    entry = first
    batch = 0
    where = gl.load(tiles_ptr + entry * 4)
    count = tile_count(tiles_ptr, counts_ptr, entry, batch, tiles, LENGTHS)
    intervals = gl.load(tiles_ptr + entry * 4 + 2)
    offset = gl.load(tiles_ptr + entry * 4 + 3)
    for turn in range(total):
        # Early, like everything that is read from memory here.
        next_entry, next_batch = advance(entry, batch, first, end)
        next_where = gl.load(tiles_ptr + next_entry * 4)
        next_count = tile_count(tiles_ptr, counts_ptr, next_entry, next_batch, tiles, LENGTHS)
        next_intervals = gl.load(tiles_ptr + next_entry * 4 + 2)
        next_offset = gl.load(tiles_ptr + next_entry * 4 + 3)
        head = high(where)
        blocks = low(count)
        if LITERALS is None:
            run = gl.load(runs_ptr + offset)
        for part in gl.static_range(2):
            slot = (turn % 2) * 2 + part
            mbarrier.wait(q_empty.index(slot), ((turn // 2) & 1) ^ 1)
            row = low(where) * 128 + part * 64
            load_tile(q_desc, batch, head, row, q_full.index(slot), q_tiles.index(slot))
        if LITERALS is not None:
            literals = LITERALS(head, low(where))
            for position in range(blocks):
                # The row's first block, then the others from the lowest: see `hopper_schedule`.
                rank = gl.where(position <= offset, position - 1, position)
                rank = gl.where(position == 0, offset, rank)
                row = literal_block(literals, rank, RUNS) * BLOCK_N
                load_block(
                    k_desc, v_desc, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty,
                    batch, head, row, number, position < blocks, STAGES,
                )  # fmt: skip
                number += 1
        else:
            for t in range(low(intervals)):
                start = low(run)
                length = high(run)
                # One ahead; behind the last interval of all lies a spare one.
                run = gl.load(runs_ptr + offset + t + 1)
                if LENGTHS:
                    whole = (gl.load(lengths_ptr + batch) + BLOCK_N - 1) // BLOCK_N
                    length = gl.maximum(gl.minimum(length, whole - start), 0)
                    # A row without valid keys reads one block, all of it masked.
                    length = gl.where(blocks == 0, gl.where(t == 0, 1, 0), length)
                for position in range(length):
                    row = (start + position) * BLOCK_N
                    load_block(
                        k_desc, v_desc, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty,
                        batch, head, row, number,
                        (position < length) & (t < low(intervals)), STAGES,
                    )  # fmt: skip
                    number += 1
        entry = next_entry
        batch = next_batch
        where = next_where
        count = next_count
        intervals = next_intervals
        offset = next_offset


@gluon.jit
def storer(
    o_desc, q_tiles, q_empty, staged, tiles_ptr, starts_ptr, flag_ptr, repairs_ptr, batches,
    REPAIR: gl.constexpr,
):  # fmt: skip
    """Store the output tiles that the consumers staged, then give their slots back."""
    first, end, total = tiles_to_do(starts_ptr, flag_ptr, batches, REPAIR)
    entry = first
    batch = 0
    for turn in range(total):
        where = gl.load(tiles_ptr + entry * 4)
        for part in gl.static_range(2):
            slot = (turn % 2) * 2 + part
            mbarrier.wait(staged.index(slot), (turn // 2) & 1)
            row = low(where) * 128 + part * 64
            start_store(o_desc, [batch, high(where), row, 0], q_tiles.index(slot))
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(slot), count=1)
        entry, batch = advance(entry, batch, first, end)
    if REPAIR:  # noqa: SIM102
        if (gl.program_id(0) == 0) & (total > 0):
            gl.atomic_add(repairs_ptr, 1)
