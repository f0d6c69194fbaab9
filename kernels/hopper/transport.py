"""The two warps that move data: one loads Q, K and V ahead of need, one stores the output.

Only the loading warp knows which key blocks a row keeps. So where their indices come from (a
table, literals) costs the consumers nothing.
"""

from __future__ import annotations

from triton.experimental.gluon.language.nvidia.hopper import tma

from calibatt_compiler.kernels.hopper.aggregates import load_tile
from calibatt_compiler.kernels.hopper.loads import load_block, load_zones
from calibatt_compiler.kernels.hopper.primitives import (
    advance,
    async_copy,
    fence_async_shared,
    gl,
    gluon,
    high,
    low,
    mbarrier,
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
def gather_queries(rows, row_sizes, queries, batch, where, turn):
    """Start copies of the queries that a row-shared head computes; see `queries_landed`.

    TMA can't gather, and copies through registers would each wait for memory. Strides count 8
    elements: so the compiler knows that rows are aligned.
    """
    layout: gl.constexpr = gl.BlockedLayout([2, 8], [4, 8], [1, 1], [1, 0])
    strips: gl.constexpr = queries.tiles.shape[4] // 64
    for part in gl.static_range(2):
        queries.acquire(turn, part)
    place = gl.cast(batch, gl.int64) * row_sizes.q_batch + high(where) * row_sizes.q_head
    start = rows.q_ptr + place * 8
    row = gl.arange(0, 8, gl.SliceLayout(1, layout))
    column = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(0, layout)), 0)
    # Always 128 rows, which the compiler doesn't know: unrolled, the loop takes too many registers.
    first = low(where) * 128
    for group in range(first // 8, gl.minimum(first + 128, row_sizes.computed_rows) // 8):
        token = gl.load(rows.computed_ptr + group * 8 + row)
        offset = gl.cast(token * row_sizes.q_token, gl.int64) * 8
        pointers = start + gl.expand_dims(offset, 1) + column
        slot = (turn % 2) * 2 + group // 8 % 2
        for strip in gl.static_range(strips):
            piece = pieces(queries.tiles).index((slot * strips + strip) * 8 + group % 8)
            start_gather(piece, pointers + strip * 64)
    async_copy.commit_group()


@gluon.jit
def queries_landed(queries, turn):
    """Complete the copies of `gather_queries`.

    To be called once the tile's first keys are on their way: until the consumers are done with the
    tile before, the warp would wait for their stage anyway.
    """
    async_copy.wait_group(0)
    # Products read through the asynchronous proxy.
    fence_async_shared()
    for part in gl.static_range(2):
        mbarrier.arrive(queries.full.index((turn % 2) * 2 + part), count=1)


@gluon.jit
def literal_block(literals, rank, RUNS: gl.constexpr):
    """Key block with `rank` kept blocks before it; see `codegen_hopper` for the tuple."""
    shift = literals[0]
    for k in gl.static_range(1, RUNS):
        shift = gl.where(rank >= literals[2 * k - 1], literals[2 * k], shift)
    return rank + shift


@gluon.jit
def producer(  # noqa: PLR0912, PLR0915  one loop, read from top to bottom
    q_desc, queries, keys, values, tiles, rows, row_sizes, LITERALS: gl.constexpr,
    RUNS: gl.constexpr,
):  # fmt: skip
    """Load the queries, keys and values of every tile of this program, in the consumers' order."""
    BLOCK_N: gl.constexpr = tiles.VARIANT.block_n
    tables = tiles.tables
    first, end, total = tiles.to_do()
    number = 0
    entry = first
    batch = 0
    where = tiles.where(entry)
    count = tiles.word(entry, batch)
    intervals = gl.load(tables.tiles_ptr + entry * 4 + 2)
    offset = gl.load(tables.tiles_ptr + entry * 4 + 3)
    for turn in range(total):
        # Early, like everything that is read from memory here.
        next_entry, next_batch = advance(entry, batch, first, end)
        next_where = tiles.where(next_entry)
        next_count = tiles.word(next_entry, next_batch)
        next_intervals = gl.load(tables.tiles_ptr + next_entry * 4 + 2)
        next_offset = gl.load(tables.tiles_ptr + next_entry * 4 + 3)
        head = high(where)
        blocks = low(count)
        copied: gl.constexpr = False
        if tiles.VARIANT.copies:
            # The sign marks row-shared heads.
            copied = offset < 0
            offset = offset & 0x7FFFFFFF
        if LITERALS is None and not tiles.VARIANT.zones:
            run = gl.load(tables.runs_ptr + offset)
        if copied:
            gather_queries(rows, row_sizes, queries, batch, where, turn)
        else:
            for part in gl.static_range(2):
                slot = (turn % 2) * 2 + part
                queries.acquire(turn, part)
                row = low(where) * 128 + part * 64
                full = queries.full.index(slot)
                load_tile(q_desc, batch, head, row, full, queries.tiles.index(slot))
        if tiles.VARIANT.zones:
            number = load_zones(
                keys, values, tiles, batch, where, (count + tiles.draw.phase) & 127, intervals,
                offset, number, LITERALS,
            )  # fmt: skip
        elif LITERALS is not None:
            literals = LITERALS(head, low(where))
            for position in range(blocks):
                # The row's first block, then the others from the lowest: see `schedule`.
                rank = gl.where(position <= offset, position - 1, position)
                rank = gl.where(position == 0, offset, rank)
                row = literal_block(literals, rank, RUNS) * BLOCK_N
                load_block(keys, values, batch, head, row, number, position < blocks)
                if copied:  # noqa: SIM102
                    if position == 0:
                        queries_landed(queries, turn)
                number += 1
        else:
            begun = number
            for t in range(low(intervals)):
                start = low(run)
                length = high(run)
                # One ahead; behind the last interval of all lies a spare one.
                run = gl.load(tables.runs_ptr + offset + t + 1)
                if tiles.VARIANT.lengths:
                    whole = (gl.load(tables.lengths_ptr + batch) + BLOCK_N - 1) // BLOCK_N
                    length = gl.maximum(gl.minimum(length, whole - start), 0)
                    # A row without valid keys reads one block, all of it masked.
                    length = gl.where(blocks == 0, gl.where(t == 0, 1, 0), length)
                for position in range(length):
                    row = (start + position) * BLOCK_N
                    live = (position < length) & (t < low(intervals))
                    load_block(keys, values, batch, head, row, number, live)
                    if copied:  # noqa: SIM102
                        # Of the first interval no key may be valid.
                        if number == begun:
                            queries_landed(queries, turn)
                    number += 1
        entry = next_entry
        batch = next_batch
        where = next_where
        count = next_count
        intervals = next_intervals
        offset = next_offset


@gluon.jit
def scatter_output(rows, row_sizes, queries, tiles, batch, where, turn):
    """Store each row of a row-shared head to all tokens that take it, then give the slots back."""
    layout: gl.constexpr = gl.BlockedLayout([2, 8], [4, 8], [1, 1], [1, 0])
    strips: gl.constexpr = queries.tiles.shape[4] // 64
    for part in gl.static_range(2):
        queries.wait_staged(turn, part)
    row = gl.arange(0, 8, gl.SliceLayout(1, layout))
    column = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(0, layout)), 0)
    # One loop for rows and slots: two would be unrolled and fill the instruction cache.
    for store in range(row_sizes.stores):
        strip = store % strips
        group = store // strips % 16
        target = store // (strips * 16) * row_sizes.computed_rows + low(where) * 128 + group * 8
        token = gl.load(rows.targets_ptr + target + row)
        line = (batch * tiles.sizes.length_q + token) * tiles.sizes.heads + high(where)
        line = gl.cast(line, gl.int64) * strips + strip
        slot = (turn % 2) * 2 + group // 8
        taken = pieces(queries.tiles).index((slot * strips + strip) * 8 + group % 8).load(layout)
        pointers = rows.o_ptr + gl.expand_dims(line * 64, 1) + column
        gl.store(pointers, taken, mask=gl.expand_dims(token >= 0, 1))
    # The next queries may come through the asynchronous proxy.
    fence_async_shared()
    for part in gl.static_range(2):
        queries.release(turn, part)


@gluon.jit
def storer(o_desc, queries, tiles, rows, row_sizes):
    """Store the output tiles that the consumers staged, then give their slots back."""
    first, end, total = tiles.to_do()
    entry = first
    batch = 0
    for turn in range(total):
        where = tiles.where(entry)
        copied: gl.constexpr = False
        if tiles.VARIANT.copies:
            copied = gl.load(tiles.tables.tiles_ptr + entry * 4 + 3) < 0
        if copied:
            scatter_output(rows, row_sizes, queries, tiles, batch, where, turn)
        else:
            for part in gl.static_range(2):
                slot = (turn % 2) * 2 + part
                queries.wait_staged(turn, part)
                row = low(where) * 128 + part * 64
                start_store(o_desc, [batch, high(where), row, 0], queries.tiles.index(slot))
                tma.store_wait(0)
                queries.release(turn, part)
        entry, batch = advance(entry, batch, first, end)
    if tiles.VARIANT.repair:  # noqa: SIM102
        if (gl.program_id(0) == 0) & (total > 0):
            gl.atomic_add(tiles.results.repairs_ptr, 1)
