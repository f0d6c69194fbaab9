"""Loads of keys and values: one block, and all blocks that a row of zones keeps at a step."""

from __future__ import annotations

from triton.experimental.gluon.language.nvidia.hopper import tma

from calibatt_compiler.kernels.hopper.primitives import (
    gl,
    gluon,
    high,
    low,
    mbarrier,
    warp_barrier,
)  # fmt: skip

# triton 3.9 renamed it; its arguments stayed.
start_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


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
def load_zone_block(
    k_desc, v_desc, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, octaves,
    batch, head, row, octave, number, live, STAGES: gl.constexpr,
):  # fmt: skip
    """As `load_block`, and leave the block's octave beside its keys.

    Every lane stores it; the barrier orders these stores before the arrival of one lane, whose
    completed phase the consumers wait for.
    """
    V_STAGES: gl.constexpr = STAGES + 1
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    stage = number % STAGES
    mbarrier.wait(k_empty.index(stage), ((number // STAGES) & 1) ^ 1, pred=live)
    octaves.index(stage).store(gl.full([1], gl.cast(octave, gl.float32), gl.float32, one))
    warp_barrier()
    load_tile(k_desc, batch, head, row, k_full.index(stage), k_tiles.index(stage))
    stage = number % V_STAGES
    mbarrier.wait(v_empty.index(stage), ((number // V_STAGES) & 1) ^ 1)
    load_tile(v_desc, batch, head, row, v_full.index(stage), v_tiles.index(stage))


@gluon.jit
def load_zones(
    k_desc, v_desc, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, octaves,
    runs_ptr, batch, where, sums, lead_runs, offset, left, right, key_blocks, number,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, LITERALS: gl.constexpr,
):  # fmt: skip
    """Load what a row of zones keeps, its lead first; return the number of the next block.

    The words are those of a tile: see `zone_table`. sums: where the row's sum of rates begins, in
    units of 1/128. See `plan.zones.drawing` for the progression that a run keeps.
    """
    head = high(where)
    lead = low(lead_runs)
    runs = high(lead_runs)
    # Runs of diagonal groups move along with the row, and their tiles are marked by the sign.
    slide = gl.where(offset < 0, low(where), 0)
    offset = offset & 0x7FFFFFFF
    if LITERALS is None:
        word = gl.load(runs_ptr + offset)
    # Of octave 0, which the consumers know.
    load_block(
        k_desc, v_desc, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty,
        batch, head, lead * BLOCK_N, number, runs > 0, STAGES,
    )  # fmt: skip
    number += 1
    begin = 0
    for t in range(runs):
        if LITERALS is not None:
            word = LITERALS(offset + t, runs_ptr)
        octave = word & 7
        end = gl.minimum(gl.maximum((word >> 3) + slide, left), right)
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
            load_zone_block(
                k_desc, v_desc, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, octaves,
                batch, head, block * BLOCK_N, octave, number, (position < kept) & (t < runs),
                STAGES,
            )  # fmt: skip
            number += 1
    return number
