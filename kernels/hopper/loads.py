"""Loads of keys and values: one block, and all blocks that a row of zones keeps at a step."""

from __future__ import annotations

from calibatt_compiler.kernels.hopper.primitives import gl, gluon, high, low, warp_barrier


@gluon.jit
def load_block(keys, values, batch, head, row, number, live):
    """Load the keys and then the values of block `number`, once their stages are free.

    `live` is always true: triton 3.6 drops a loop-carried number whose only use is the bound of a
    nested loop (the first tile's value would then serve every tile), so callers give such bounds
    this second use.
    """
    keys.acquire(number, pred=live)
    keys.load(batch, head, row, number)
    values.acquire(number)
    values.load(batch, head, row, number)


@gluon.jit
def load_zone_block(keys, values, batch, head, row, octave, number, live):
    """As `load_block`, and leave the block's octave beside its keys.

    Every lane stores it; the barrier orders these stores before the arrival of one lane, whose
    completed phase the consumers wait for.
    """
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    keys.acquire(number, pred=live)
    place = keys.octaves.index(number % keys.STAGES)
    place.store(gl.full([1], gl.cast(octave, gl.float32), gl.float32, one))
    warp_barrier()
    keys.load(batch, head, row, number)
    values.acquire(number)
    values.load(batch, head, row, number)


@gluon.jit
def load_zones(
    keys, values, tiles, batch, where, sums, lead_runs, offset, number, LITERALS: gl.constexpr
):
    """Load what a row of zones keeps, its lead first; return the number of the next block.

    The words are those of a tile: see `zone_table`. sums: where the row's sum of rates begins, in
    units of 1/128. See `plan.zones.drawing` for the progression that a run keeps.
    """
    BLOCK_N: gl.constexpr = tiles.VARIANT.block_n
    runs_ptr = tiles.tables.runs_ptr
    key_blocks = (tiles.sizes.length_k + BLOCK_N - 1) // BLOCK_N
    head = high(where)
    lead = low(lead_runs)
    runs = high(lead_runs)
    # Runs of diagonal groups move along with the row, and their tiles are marked by the sign.
    slide = gl.where(offset < 0, low(where), 0)
    offset = offset & 0x7FFFFFFF
    if LITERALS is None:
        word = gl.load(runs_ptr + offset)
    # Of octave 0, which the consumers know.
    load_block(keys, values, batch, head, lead * BLOCK_N, number, runs > 0)
    number += 1
    begin = 0
    for t in range(runs):
        if LITERALS is not None:
            word = LITERALS(offset + t, runs_ptr)
        octave = word & 7
        end = gl.maximum((word >> 3) + slide, tiles.draw.left)
        end = gl.minimum(end, tiles.draw.right)
        end = gl.where(t + 1 == runs, key_blocks, end)
        if LITERALS is None:
            # One ahead; behind the last run of all lies a spare one.
            word = gl.load(runs_ptr + offset + t + 1)
        rate = 7 - octave
        reached = sums + ((end - begin) << rate)
        kept = reached >> 7
        first = begin + (1 << octave) - 1 - (sums >> rate)
        sums = reached & 127
        # The lead is of octave 0, so its run keeps every block; here it is passed over.
        passed = gl.where((begin <= lead) & (lead < end), lead, key_blocks)
        kept -= gl.where(passed == lead, 1, 0)
        begin = end
        for position in range(kept):
            block = first + (position << octave)
            block += gl.where(block >= passed, 1, 0)
            live = (position < kept) & (t < runs)
            load_zone_block(keys, values, batch, head, block * BLOCK_N, octave, number, live)
            number += 1
    return number
