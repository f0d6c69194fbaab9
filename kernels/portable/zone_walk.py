"""How the portable kernel walks a row of octave zones: a step is drawn as its runs are walked.

The runs come from a table, or from a generated function that holds them as literals; both give the
same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from calibatt_compiler.kernels.portable.primitives import (
    attend_tile,
    key_bias,
    lies_in_hole,
    reference_maximum,
    split_tiles,
)


@triton.jit
def run_at(runs_ptr, index, LITERALS: tl.constexpr):
    """The word of a run; see `zone_table`."""
    # Not two returns: what follows one is compiled, too.
    if LITERALS is None:  # noqa: SIM108
        word = tl.load(runs_ptr + index)
    else:
        word = LITERALS(index, runs_ptr)
    return word


@triton.jit
def seek(
    runs_ptr,
    offset,
    runs,
    slide,
    left,
    right,
    key_blocks,
    wanted,
    begin,
    end,
    before,
    reached,
    rate,
    walked,
    LITERALS: tl.constexpr,
):
    """Walk to the run in which the sum of rates reaches `wanted` units; the last run at most.

    Returns the run's first block and the end of its blocks, the sum before it and behind it, the
    binary logarithm of its rate in units, and how many runs have been walked.
    """
    # Not `while` alone: a loop that stands directly in the one over blocks ends its pipeline.
    if (reached < wanted) & (walked < runs):
        while (reached < wanted) & (walked < runs):
            word = run_at(runs_ptr, offset + walked, LITERALS)
            walked += 1
            begin = end
            end = tl.minimum(tl.maximum((word >> 3) + slide, left), right)
            end = tl.where(walked == runs, key_blocks, end)
            rate = 7 - (word & 7)
            before = reached
            reached += (end - begin) << rate
    return begin, end, before, reached, rate, walked


@triton.jit
def drawn_before(
    runs_ptr,
    offset,
    runs,
    slide,
    left,
    right,
    key_blocks,
    reached,
    block,
    LITERALS: tl.constexpr,
):
    """How many blocks are kept before a block by a row whose sum of rates begins at `reached`."""
    end, walked = 0, 0
    while (walked < runs) & (end < block):
        word = run_at(runs_ptr, offset + walked, LITERALS)
        walked += 1
        begin = end
        end = tl.minimum(tl.maximum((word >> 3) + slide, left), right)
        end = tl.where(walked == runs, key_blocks, end)
        reached += (tl.minimum(end, block) - begin) << (7 - (word & 7))
    return reached >> 7


@triton.jit
def drawn_tiles_before(
    runs_ptr,
    offset,
    runs,
    slide,
    left,
    right,
    key_blocks,
    reached,
    tile,
    KEY_TILES: tl.constexpr,
    LITERALS: tl.constexpr,
):
    """How many tiles are kept before a tile; see `drawn_before`."""
    block = tile // KEY_TILES
    before = drawn_before(
        runs_ptr, offset, runs, slide, left, right, key_blocks, reached, block, LITERALS
    )
    behind = drawn_before(
        runs_ptr, offset, runs, slide, left, right, key_blocks, reached, block + 1, LITERALS
    )
    return before * KEY_TILES + (behind - before) * (tile % KEY_TILES)


@triton.jit
def attend_zones(  # noqa: PLR0915  one loop and what it leaves out
    q,
    k_ptr,
    v_ptr,
    stride_ks,
    stride_vs,
    row_ptr,
    runs_ptr,
    draw_phase,
    left,
    right,
    key_blocks,
    length_k,
    acc,
    maximum,
    total,
    scale_log2,
    TILE_N: tl.constexpr,
    KEY_TILES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    RAGGED_K: tl.constexpr,
    PRECISION: tl.constexpr,
    batch,
    head,
    FIXED: tl.constexpr,
    TMA: tl.constexpr,
    LITERALS: tl.constexpr,
    bias_ptr,
    bounds_ptr,
    PADDED: tl.constexpr,
):
    """Attend what the row of zones whose words are at `row_ptr` keeps at a step.

    Block number p of a row is the one in which its sum of rates reaches p + 1 wholes: see
    `plan.zones.drawing`. A block of octave k has the weight 2^k, so its scores are k more in units
    of log2: `maximum` is lowered by k for it instead. Returns the new acc, maximum and total. Tiles
    that a mask touches are attended behind the others, as in `attend_kept`.
    """
    where = tl.load(row_ptr)
    drawn = tl.load(row_ptr + 1)
    lead_runs = tl.load(row_ptr + 2)
    offset = tl.load(row_ptr + 3)
    before = (drawn + draw_phase) & 127
    sums = ((drawn >> 7) & 0x1FFFFF) + before
    last_octave = (drawn >> 28) & 7
    end_block = tl.where((sums & 127) < (128 >> last_octave), key_blocks, 0)
    tiles, ragged = split_tiles(sums >> 7, end_block, length_k, KEY_TILES, TILE_N)
    runs = lead_runs >> 16
    slide = tl.where(offset < 0, where & 0xFFFF, 0)
    offset = offset & 0x7FFFFFFF
    start = before
    left_out, gap, place = 0, 0, 0
    if PADDED:
        first = tl.load(bounds_ptr) // TILE_N
        past = (tl.load(bounds_ptr + 1) + TILE_N - 1) // TILE_N
        left_out = drawn_tiles_before(
            runs_ptr, offset, runs, slide, left, right, key_blocks, start, first, KEY_TILES,
            LITERALS,
        )  # fmt: skip
        left_out = tl.minimum(left_out, tiles)
        gap = drawn_tiles_before(
            runs_ptr, offset, runs, slide, left, right, key_blocks, start, past, KEY_TILES,
            LITERALS,
        )  # fmt: skip
        gap = tl.minimum(gap, tiles) - left_out
        place = tl.where(left_out == 0, gap, 0)
    # Before the first run.
    begin, end, rate, walked, reached = 0, 0, 7, 0, before
    wanted = (place // KEY_TILES + 1) * 128
    begin, end, before, reached, rate, walked = seek(
        runs_ptr, offset, runs, slide, left, right, key_blocks, wanted,
        begin, end, before, reached, rate, walked, LITERALS,
    )  # fmt: skip
    # One flat loop over all blocks, as in `attend_kept`; each tile is looked up while the one
    # before is attended.
    after = (begin + ((wanted - 1 - before) >> rate)) * KEY_TILES + place % KEY_TILES
    if FIXED:
        reference = (lead_runs & 0xFFFF) * KEY_TILES
        if PADDED:
            hidden = lies_in_hole(bounds_ptr, reference * TILE_N, length_k, TILE_N)
            reference = tl.where(hidden, after, reference)
        maximum = reference_maximum(
            q, k_ptr, stride_ks, reference * TILE_N, length_k, scale_log2,
            TILE_N, HEAD_DIM, PADDED_DIM, PRECISION, batch, head, TMA, bias_ptr, PADDED,
        )  # fmt: skip
    for position in tl.range(0, tiles - gap):
        key_tile = after
        weight = (7 - rate).to(tl.float32)
        place = position + 1
        if PADDED:
            place += tl.where(place >= left_out, gap, 0)
        wanted = (place // KEY_TILES + 1) * 128
        begin, end, before, reached, rate, walked = seek(
            runs_ptr, offset, runs, slide, left, right, key_blocks, wanted,
            begin, end, before, reached, rate, walked, LITERALS,
        )  # fmt: skip
        after = (begin + ((wanted - 1 - before) >> rate)) * KEY_TILES + place % KEY_TILES
        acc, maximum, total = attend_tile(
            q, k_ptr, v_ptr, stride_ks, stride_vs, key_tile * TILE_N, length_k,
            acc, maximum - weight, total, scale_log2, TILE_N, HEAD_DIM, PADDED_DIM, False,
            PRECISION, 0.0, False, batch, head, FIXED, TMA,
        )  # fmt: skip
        maximum += weight
    if PADDED:
        begin, end, rate, walked, before, reached = 0, 0, 7, 0, start, start
        step = tl.where(tl.load(bounds_ptr + 2) != 0, tl.maximum(gap - 1, 1), 1)
        for cut in tl.range(left_out, left_out + gap, step, num_stages=1):
            wanted = (cut // KEY_TILES + 1) * 128
            begin, end, before, reached, rate, walked = seek(
                runs_ptr, offset, runs, slide, left, right, key_blocks, wanted,
                begin, end, before, reached, rate, walked, LITERALS,
            )  # fmt: skip
            key_tile = (begin + ((wanted - 1 - before) >> rate)) * KEY_TILES + cut % KEY_TILES
            weight = (7 - rate).to(tl.float32)
            bias = key_bias(bias_ptr, key_tile * TILE_N, length_k, TILE_N)[None, :]
            acc, maximum, total = attend_tile(
                q, k_ptr, v_ptr, stride_ks, stride_vs, key_tile * TILE_N, length_k,
                acc, maximum - weight, total, scale_log2, TILE_N, HEAD_DIM, PADDED_DIM, False,
                PRECISION, bias, True, batch, head, FIXED, TMA,
            )  # fmt: skip
            maximum += weight
    # Not `and`: RAGGED_K is decided when compiling, `ragged` when running.
    if RAGGED_K:  # noqa: SIM102
        if ragged:
            last = length_k // TILE_N * TILE_N
            shift = 0.0
            if PADDED:
                shift = key_bias(bias_ptr, last, length_k, TILE_N)[None, :]
            weight = last_octave.to(tl.float32)
            acc, maximum, total = attend_tile(
                q, k_ptr, v_ptr, stride_ks, stride_vs, last, length_k,
                acc, maximum - weight, total, scale_log2, TILE_N, HEAD_DIM, PADDED_DIM, True,
                PRECISION, shift, PADDED, batch, head, FIXED, TMA,
            )  # fmt: skip
    return acc, maximum, total
