"""The two warps that move data: one loads Q, K and V ahead of need, one stores the output.

Only the loading warp knows which key blocks a row keeps. So where their indices come from (a
table, literals) costs the consumers nothing.
"""

from __future__ import annotations

from triton.experimental.gluon.language.nvidia.hopper import tma

from calibatt_compiler.kernels.hopper.loads import load_block, load_tile, load_zones
from calibatt_compiler.kernels.hopper.primitives import (
    advance,
    async_copy,
    fence_async_shared,
    gl,
    gluon,
    high,
    low,
    mbarrier,
    tile_count,
    tiles_to_do,
)  # fmt: skip

# triton 3.9 renamed these; their arguments stayed.
start_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
start_gather = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
_shared = gl.shared_memory_descriptor
reinterpret = getattr(_shared, "reinterpret", None) or _shared._reinterpret


@gluon.jit
def pieces(tiles):
    """Tiles (N, 1, 1, rows, D) as the pieces of 8 rows x 64 columns that they consist of.

    Tile after tile, in each 64 columns after 64 columns, in these 8 rows after 8 rows: that is how
    tiles lie that TMA swizzles. Slices would want offsets known to the compiler.
    """
    number: gl.constexpr = tiles.shape[0] * tiles.shape[3] * tiles.shape[4] // 512
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    return reinterpret(tiles, tiles.dtype, [number, 8, 64], layout)


@gluon.jit
def gather_queries(
    q_ptr, q_batch, q_head, q_token, computed_ptr, computed_rows, q_tiles, q_empty, batch, where,
    turn,
):  # fmt: skip
    """Start copies of the queries that a row-shared head computes; see `queries_landed`.

    TMA can't gather, and copies through registers would each wait for memory. Strides count 8
    elements: so the compiler knows that rows are aligned.
    """
    layout: gl.constexpr = gl.BlockedLayout([2, 8], [4, 8], [1, 1], [1, 0])
    strips: gl.constexpr = q_tiles.shape[4] // 64
    for part in gl.static_range(2):
        mbarrier.wait(q_empty.index((turn % 2) * 2 + part), ((turn // 2) & 1) ^ 1)
    start = q_ptr + (gl.cast(batch, gl.int64) * q_batch + high(where) * q_head) * 8
    row = gl.arange(0, 8, gl.SliceLayout(1, layout))
    column = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(0, layout)), 0)
    # Always 128 rows, which the compiler doesn't know: unrolled, the loop takes too many registers.
    first = low(where) * 128
    for group in range(first // 8, gl.minimum(first + 128, computed_rows) // 8):
        token = gl.load(computed_ptr + group * 8 + row)
        pointers = start + gl.expand_dims(gl.cast(token * q_token, gl.int64) * 8, 1) + column
        slot = (turn % 2) * 2 + group // 8 % 2
        for strip in gl.static_range(strips):
            piece = pieces(q_tiles).index((slot * strips + strip) * 8 + group % 8)
            start_gather(piece, pointers + strip * 64)
    async_copy.commit_group()


@gluon.jit
def queries_landed(q_full, turn):
    """Complete the copies of `gather_queries`.

    To be called once the tile's first keys are on their way: until the consumers are done with the
    tile before, the warp would wait for their stage anyway.
    """
    async_copy.wait_group(0)
    # Products read through the asynchronous proxy.
    fence_async_shared()
    for part in gl.static_range(2):
        mbarrier.arrive(q_full.index((turn % 2) * 2 + part), count=1)


@gluon.jit
def literal_block(literals, rank, RUNS: gl.constexpr):
    """Key block with `rank` kept blocks before it; see `codegen_hopper` for the tuple."""
    shift = literals[0]
    for k in gl.static_range(1, RUNS):
        shift = gl.where(rank >= literals[2 * k - 1], literals[2 * k], shift)
    return rank + shift


@gluon.jit
def producer(  # noqa: PLR0912, PLR0915  one loop, read from top to bottom
    q_desc, k_desc, v_desc, q_tiles, k_tiles, v_tiles,
    q_full, q_empty, k_full, k_empty, v_full, v_empty,
    tiles_ptr, starts_ptr, runs_ptr, counts_ptr, lengths_ptr, flag_ptr, batches, tiles,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, REPAIR: gl.constexpr, LENGTHS: gl.constexpr,
    LITERALS: gl.constexpr, RUNS: gl.constexpr,
    q_ptr, q_batch, q_head, q_token, computed_ptr, computed_rows, COPIES: gl.constexpr,
    octaves, draw_phase, left, right, length_k, ZONES: gl.constexpr,
):  # fmt: skip
    """Load the queries, keys and values of every tile of this program, in the consumers' order."""
    first, end, total = tiles_to_do(starts_ptr, flag_ptr, batches, REPAIR)
    number = 0
    entry = first
    batch = 0
    where = gl.load(tiles_ptr + entry * 4)
    count = tile_count(tiles_ptr, counts_ptr, entry, batch, tiles, 0, LENGTHS, False)
    intervals = gl.load(tiles_ptr + entry * 4 + 2)
    offset = gl.load(tiles_ptr + entry * 4 + 3)
    for turn in range(total):
        # Early, like everything that is read from memory here.
        next_entry, next_batch = advance(entry, batch, first, end)
        next_where = gl.load(tiles_ptr + next_entry * 4)
        next_count = tile_count(
            tiles_ptr, counts_ptr, next_entry, next_batch, tiles, 0, LENGTHS, False
        )  # fmt: skip
        next_intervals = gl.load(tiles_ptr + next_entry * 4 + 2)
        next_offset = gl.load(tiles_ptr + next_entry * 4 + 3)
        head = high(where)
        blocks = low(count)
        copied: gl.constexpr = False
        if COPIES:
            # The sign marks row-shared heads.
            copied = offset < 0
            offset = offset & 0x7FFFFFFF
        if LITERALS is None and not ZONES:
            run = gl.load(runs_ptr + offset)
        if copied:
            gather_queries(
                q_ptr, q_batch, q_head, q_token, computed_ptr, computed_rows, q_tiles, q_empty,
                batch, where, turn,
            )  # fmt: skip
        else:
            for part in gl.static_range(2):
                slot = (turn % 2) * 2 + part
                mbarrier.wait(q_empty.index(slot), ((turn // 2) & 1) ^ 1)
                row = low(where) * 128 + part * 64
                load_tile(q_desc, batch, head, row, q_full.index(slot), q_tiles.index(slot))
        if ZONES:
            number = load_zones(
                k_desc, v_desc, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, octaves,
                runs_ptr, batch, where, (count + draw_phase) & 127, intervals, offset, left, right,
                (length_k + BLOCK_N - 1) // BLOCK_N, number, BLOCK_N, STAGES, LITERALS,
            )  # fmt: skip
        elif LITERALS is not None:
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
                if copied:  # noqa: SIM102
                    if position == 0:
                        queries_landed(q_full, turn)
                number += 1
        else:
            begun = number
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
                    if copied:  # noqa: SIM102
                        # Of the first interval no key may be valid.
                        if number == begun:
                            queries_landed(q_full, turn)
                    number += 1
        entry = next_entry
        batch = next_batch
        where = next_where
        count = next_count
        intervals = next_intervals
        offset = next_offset


@gluon.jit
def scatter_output(
    o_ptr, targets_ptr, computed_rows, stores, q_tiles, q_empty, staged, batch, where, heads,
    length_q, turn,
):  # fmt: skip
    """Store each row of a row-shared head to all tokens that take it, then give the slots back."""
    layout: gl.constexpr = gl.BlockedLayout([2, 8], [4, 8], [1, 1], [1, 0])
    strips: gl.constexpr = q_tiles.shape[4] // 64
    for part in gl.static_range(2):
        mbarrier.wait(staged.index((turn % 2) * 2 + part), (turn // 2) & 1)
    row = gl.arange(0, 8, gl.SliceLayout(1, layout))
    column = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(0, layout)), 0)
    # One loop for rows and slots: two would be unrolled and fill the instruction cache.
    for store in range(stores):
        strip = store % strips
        group = store // strips % 16
        target = store // (strips * 16) * computed_rows + low(where) * 128 + group * 8
        token = gl.load(targets_ptr + target + row)
        line = gl.cast((batch * length_q + token) * heads + high(where), gl.int64) * strips + strip
        slot = (turn % 2) * 2 + group // 8
        values = pieces(q_tiles).index((slot * strips + strip) * 8 + group % 8).load(layout)
        pointers = o_ptr + gl.expand_dims(line * 64, 1) + column
        gl.store(pointers, values, mask=gl.expand_dims(token >= 0, 1))
    # The next queries may come through the asynchronous proxy.
    fence_async_shared()
    for part in gl.static_range(2):
        mbarrier.arrive(q_empty.index((turn % 2) * 2 + part), count=1)


@gluon.jit
def storer(
    o_desc, q_tiles, q_empty, staged, tiles_ptr, starts_ptr, flag_ptr, repairs_ptr, batches,
    REPAIR: gl.constexpr, o_ptr, targets_ptr, computed_rows, stores, heads, length_q,
    COPIES: gl.constexpr,
):  # fmt: skip
    """Store the output tiles that the consumers staged, then give their slots back."""
    first, end, total = tiles_to_do(starts_ptr, flag_ptr, batches, REPAIR)
    entry = first
    batch = 0
    for turn in range(total):
        where = gl.load(tiles_ptr + entry * 4)
        copied: gl.constexpr = False
        if COPIES:
            copied = gl.load(tiles_ptr + entry * 4 + 3) < 0
        if copied:
            scatter_output(
                o_ptr, targets_ptr, computed_rows, stores, q_tiles, q_empty, staged, batch, where,
                heads, length_q, turn,
            )  # fmt: skip
        else:
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
