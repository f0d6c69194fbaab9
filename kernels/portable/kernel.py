"""The portable kernel: block-sparse attention of any pattern, of masks and of zones, on any GPU.

Where the key blocks of a row come from is a compile-time argument: a table, runs of zones that are
walked, or for either a generated function with literals in the place of the table. The rest is one
body, so all sources give the same bits for the same blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from calibatt_compiler.kernels.portable.launch import STRIDES
from calibatt_compiler.kernels.portable.primitives import (
    attend_tile,
    flag_overflow,
    gather_rows,
    head_rows,
    key_bias,
    lies_in_hole,
    load_rows,
    part_bias,
    reference_maximum,
    scatter_rows,
    split_tiles,
    store_rows,
)
from calibatt_compiler.kernels.portable.zone_walk import attend_zones


@triton.jit
def kept_block(blocks_ptr, rank, literals, LITERALS: tl.constexpr, RUNS: tl.constexpr):
    """Key block with `rank` kept blocks before it, from the table of a row or from its literals."""
    if LITERALS is None:
        block = tl.load(blocks_ptr + rank).to(tl.int32)
    else:
        shift = literals[0]
        for k in tl.static_range(1, RUNS):
            shift = tl.where(rank >= literals[2 * k - 1], literals[2 * k], shift)
        block = rank + shift
    return block


@triton.jit
def tiles_before(blocks_ptr, blocks, tile, KEY_TILES: tl.constexpr):
    """How many tiles of the `blocks` kept blocks at `blocks_ptr`, upwards, lie before a tile."""
    block = tile // KEY_TILES
    low = blocks * 0
    high = blocks
    while low < high:
        middle = (low + high) // 2
        below = tl.load(blocks_ptr + middle).to(tl.int32) < block
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    found = tl.load(blocks_ptr + low, mask=low < blocks, other=-1).to(tl.int32)
    return low * KEY_TILES + tl.where(found == block, tile % KEY_TILES, 0)


@triton.jit
def attend_kept(  # noqa: PLR0912, PLR0915  one loop and what it leaves out
    q,
    k_ptr,
    v_ptr,
    stride_ks,
    stride_vs,
    offsets_ptr,
    blocks_ptr,
    weights_ptr,
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
    WEIGHTED: tl.constexpr,
    batch,
    head,
    FIXED: tl.constexpr,
    TMA: tl.constexpr,
    query_block,
    LITERALS: tl.constexpr,
    RUNS: tl.constexpr,
    bias_ptr,
    bounds_ptr,
    PADDED: tl.constexpr,
):
    """Attend the kept key blocks of the row whose first entry `offsets_ptr` points at.

    Returns the new acc, maximum and total: see `attend_tile`, and `portable_attention` for tables,
    literals and what is PADDED. Tiles that a mask touches are left out of the loop and attended
    behind it: all of them, or of a hole its first and its last.
    """
    literals = 0
    if LITERALS is not None:
        literals = LITERALS(head, query_block)
    entry = tl.load(offsets_ptr) + 1
    past = tl.load(offsets_ptr + 1)
    end_block = tl.load(blocks_ptr + past - 1).to(tl.int32) + 1
    tiles, ragged = split_tiles(past - entry, end_block, length_k, KEY_TILES, TILE_N)
    left_out, gap, place = 0, 0, 0
    if PADDED:
        begin = tl.load(bounds_ptr) // TILE_N
        end = (tl.load(bounds_ptr + 1) + TILE_N - 1) // TILE_N
        blocks = past - entry
        left_out = tiles_before(blocks_ptr + entry, blocks, begin, KEY_TILES)
        left_out = tl.minimum(left_out, tiles)
        gap = tl.minimum(tiles_before(blocks_ptr + entry, blocks, end, KEY_TILES), tiles)
        gap -= left_out
        place = tl.where(left_out == 0, gap, 0)
    # One flat loop over all blocks, so that the pipeline never drains between two of them. Each
    # tile is looked up while the one before is attended, or the loads of keys would wait for it.
    rank = place // KEY_TILES
    after = kept_block(blocks_ptr + entry, rank, literals, LITERALS, RUNS) * KEY_TILES
    after += place % KEY_TILES
    if FIXED:
        reference = tl.load(blocks_ptr + entry - 1).to(tl.int32) * KEY_TILES
        if PADDED:
            hidden = lies_in_hole(bounds_ptr, reference * TILE_N, length_k, TILE_N)
            reference = tl.where(hidden, after, reference)
        maximum = reference_maximum(
            q, k_ptr, stride_ks, reference * TILE_N, length_k, scale_log2,
            TILE_N, HEAD_DIM, PADDED_DIM, PRECISION, batch, head, TMA, bias_ptr, PADDED,
        )  # fmt: skip
    weight = 0.0
    for position in tl.range(0, tiles - gap):
        key_tile = after
        if WEIGHTED:
            weight = tl.load(weights_ptr + entry + place // KEY_TILES).to(tl.float32)
        place = position + 1
        if PADDED:
            place += tl.where(place >= left_out, gap, 0)
        after = kept_block(blocks_ptr + entry, place // KEY_TILES, literals, LITERALS, RUNS)
        after = after * KEY_TILES + place % KEY_TILES
        acc, maximum, total = attend_tile(
            q, k_ptr, v_ptr, stride_ks, stride_vs, key_tile * TILE_N, length_k,
            acc, maximum, total, scale_log2, TILE_N, HEAD_DIM, PADDED_DIM, False, PRECISION,
            weight, WEIGHTED, batch, head, FIXED, TMA,
        )  # fmt: skip
    if PADDED:
        step = tl.where(tl.load(bounds_ptr + 2) != 0, tl.maximum(gap - 1, 1), 1)
        for cut in tl.range(left_out, left_out + gap, step, num_stages=1):
            key_tile = kept_block(blocks_ptr + entry, cut // KEY_TILES, literals, LITERALS, RUNS)
            key_tile = key_tile * KEY_TILES + cut % KEY_TILES
            if WEIGHTED:
                weight = tl.load(weights_ptr + entry + cut // KEY_TILES).to(tl.float32)
            bias = key_bias(bias_ptr, key_tile * TILE_N, length_k, TILE_N)[None, :]
            acc, maximum, total = attend_tile(
                q, k_ptr, v_ptr, stride_ks, stride_vs, key_tile * TILE_N, length_k,
                acc, maximum, total, scale_log2, TILE_N, HEAD_DIM, PADDED_DIM, False, PRECISION,
                weight + bias, True, batch, head, FIXED, TMA,
            )  # fmt: skip
    # Not `and`: RAGGED_K is decided when compiling, `ragged` when running.
    if RAGGED_K:  # noqa: SIM102
        if ragged:
            last = length_k // TILE_N * TILE_N
            if WEIGHTED:
                weight = tl.load(weights_ptr + past - 1).to(tl.float32)
            shift = weight
            if PADDED:
                shift = weight + key_bias(bias_ptr, last, length_k, TILE_N)[None, :]
            acc, maximum, total = attend_tile(
                q, k_ptr, v_ptr, stride_ks, stride_vs, last, length_k,
                acc, maximum, total, scale_log2, TILE_N, HEAD_DIM, PADDED_DIM, True, PRECISION,
                shift, WEIGHTED or PADDED, batch, head, FIXED, TMA,
            )  # fmt: skip
    return acc, maximum, total


@triton.jit
def attend_pooled(
    q,
    k_ptr,
    v_ptr,
    kept_ptr,
    parts,
    length_k,
    acc,
    maximum,
    total,
    scale_log2,
    TILE_N: tl.constexpr,
    KEY_TILES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    POOLED: tl.constexpr,
    FIXED: tl.constexpr,
):
    """Attend the pooled keys (parts, D) of the blocks that the bits at `kept_ptr` do not keep.

    Returns the new acc, maximum and total.
    """
    for start in tl.range(0, parts, TILE_N):
        bias = part_bias(
            kept_ptr, start, parts, length_k, POOLED, KEY_TILES * TILE_N // POOLED, TILE_N
        )
        acc, maximum, total = attend_tile(
            q, k_ptr, v_ptr, HEAD_DIM, HEAD_DIM, start, parts, acc, maximum, total, scale_log2,
            TILE_N, HEAD_DIM, PADDED_DIM, True, PRECISION, bias[None, :], True, 0, 0, FIXED,
        )  # fmt: skip
    return acc, maximum, total


SIZES = (
    "heads", "query_blocks", "length_q", "length_k", "parts", "computed_rows", "slots",
    "draw_phase", "left", "right", "bias_stride", "bounds_stride",
)  # fmt: skip
"""Integers of `portable_attention` beside strides."""


# Integers are not specialised: a stride, a length or a step that happens to be 1 or a multiple of
# 16 must not compile another kernel.
@triton.jit(do_not_specialize=[*STRIDES, *SIZES])
def portable_attention(  # noqa: PLR0912  each form at its place
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    flag_ptr,
    repairs_ptr,
    stride_qb: tl.int64,
    stride_qh: tl.int64,
    stride_qs,
    stride_kb: tl.int64,
    stride_kh: tl.int64,
    stride_ks,
    stride_vb: tl.int64,
    stride_vh: tl.int64,
    stride_vs,
    stride_ob: tl.int64,
    stride_oh: tl.int64,
    stride_os,
    scale_log2,
    heads,
    query_blocks,
    length_q,
    length_k,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    ROW_TILES: tl.constexpr,
    KEY_TILES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ALIGN: tl.constexpr,
    RAGGED_K: tl.constexpr,
    PRECISION: tl.constexpr,
    FIXED: tl.constexpr,
    TMA: tl.constexpr,
    REPAIR: tl.constexpr,
    offsets_ptr=None,
    blocks_ptr=None,
    weights_ptr=None,
    kept_ptr=None,
    pooled_k_ptr=None,
    pooled_v_ptr=None,
    parts=None,
    WEIGHTED: tl.constexpr = False,
    POOLED: tl.constexpr = 0,
    repetitive_ptr=None,
    computed_ptr=None,
    targets_ptr=None,
    computed_rows=None,
    slots=None,
    COPIES: tl.constexpr = False,
    rows_ptr=None,
    runs_ptr=None,
    draw_phase=None,
    left=None,
    right=None,
    ZONES: tl.constexpr = False,
    LITERALS: tl.constexpr = None,
    RUNS: tl.constexpr = 0,
    bias_ptr=None,
    bounds_ptr=None,
    bias_stride=None,
    bounds_stride=None,
    PADDED: tl.constexpr = False,
    PADDED_ROWS: tl.constexpr = False,
):
    """Attention of TILE_M queries of one head over the kept key blocks of their row of blocks.

    q, o: (B, H, Sq, D) and k, v: (B, H, Sk, D) by strides in units of ALIGN elements; with TMA, k
    and v are descriptors. If FIXED, the flag is set where the result can't be trusted; if REPAIR,
    nothing is done unless it is set, and `repairs` counts what is done.

    Row `r = head * query_blocks + block` owns the entries offsets[r] to offsets[r + 1] of `blocks`:
    the block of the reference, then those to attend, upwards. If WEIGHTED, an entry's `weights` is
    added to the log2 scores of its block. If POOLED, pooled keys and values (B, H, parts, D),
    contiguous, follow for the blocks of which the row's bits in `kept` are not set, POOLED to a
    block. If COPIES, the heads of which `repetitive` is not 0 have `computed_rows` rows, at the
    positions `computed`; the output of each goes to its `targets` (slots, computed_rows). LITERALS:
    None, or a generated function that gives the blocks to attend, in RUNS intervals.

    If ZONES, rows int32 (heads * query_blocks, 4) and runs int32 are those of `zone_table`,
    draw_phase is `drawing.phase` of the step, and blocks `left` to `right` are the keys without
    text. LITERALS: None, or a generated function that gives the word of a run by its number.

    If PADDED, `bias` and `bounds` are those of `KeyPadding`, whose samples are `bias_stride` and
    `bounds_stride` apart. If PADDED_ROWS, queries in the hole of the keys are left as they are.
    """
    if REPAIR:
        if tl.load(flag_ptr) == 0:
            return
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.atomic_add(repairs_ptr, 1)
    tile = tl.program_id(0)
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    first = tile * TILE_M
    if PADDED:
        bias_ptr += batch * bias_stride
        bounds_ptr += batch * bounds_stride
        if PADDED_ROWS and not COPIES:  # noqa: SIM102
            if lies_in_hole(bounds_ptr, first, length_q, TILE_M):
                return
    q_head, stride_qs = head_rows(q_ptr, stride_qb, stride_qh, stride_qs, batch, head, ALIGN)
    k_head, stride_ks = head_rows(k_ptr, stride_kb, stride_kh, stride_ks, batch, head, ALIGN, TMA)
    v_head, stride_vs = head_rows(v_ptr, stride_vb, stride_vh, stride_vs, batch, head, ALIGN, TMA)
    o_head, stride_os = head_rows(o_ptr, stride_ob, stride_oh, stride_os, batch, head, ALIGN)
    if COPIES:
        repetitive = tl.load(repetitive_ptr + head) != 0
        length_q = tl.where(repetitive, computed_rows, length_q)
        if first >= length_q:
            return
        q = gather_rows(
            q_head, stride_qs, computed_ptr, repetitive, first, length_q, TILE_M, HEAD_DIM,
            PADDED_DIM,
        )  # fmt: skip
    else:
        q = load_rows(q_head, stride_qs, first, length_q, TILE_M, HEAD_DIM, PADDED_DIM, True)
    acc = tl.zeros([TILE_M, PADDED_DIM], tl.float32)
    maximum = tl.full([TILE_M], -float("inf"), tl.float32)
    total = tl.zeros([TILE_M], tl.float32)

    query_block = tile // ROW_TILES
    row = head * query_blocks + query_block
    if ZONES:
        key_blocks = (length_k + KEY_TILES * TILE_N - 1) // (KEY_TILES * TILE_N)
        acc, maximum, total = attend_zones(
            q, k_head, v_head, stride_ks, stride_vs, rows_ptr + row * 4, runs_ptr, draw_phase, left,
            right, key_blocks, length_k, acc, maximum, total, scale_log2, TILE_N, KEY_TILES,
            HEAD_DIM, PADDED_DIM, RAGGED_K, PRECISION, batch, head, FIXED, TMA, LITERALS, bias_ptr,
            bounds_ptr, PADDED,
        )  # fmt: skip
    else:
        acc, maximum, total = attend_kept(
            q, k_head, v_head, stride_ks, stride_vs, offsets_ptr + row, blocks_ptr, weights_ptr,
            length_k, acc, maximum, total, scale_log2, TILE_N, KEY_TILES, HEAD_DIM, PADDED_DIM,
            RAGGED_K, PRECISION, WEIGHTED, batch, head, FIXED, TMA, query_block, LITERALS, RUNS,
            bias_ptr, bounds_ptr, PADDED,
        )  # fmt: skip
    if POOLED > 0:
        head_parts = tl.cast(tl.program_id(1), tl.int64) * parts * HEAD_DIM
        acc, maximum, total = attend_pooled(
            q, pooled_k_ptr + head_parts, pooled_v_ptr + head_parts,
            kept_ptr + row * ((parts // POOLED + 7) // 8), parts, length_k, acc, maximum, total,
            scale_log2, TILE_N, KEY_TILES, HEAD_DIM, PADDED_DIM, PRECISION, POOLED,
            FIXED,
        )  # fmt: skip
    if FIXED:
        flag_overflow(flag_ptr, acc, total)
    if PADDED:
        total = tl.where(total == 0.0, 1.0, total)  # a query without keys
    if COPIES:
        scatter_rows(
            o_head, stride_os, targets_ptr, repetitive, slots, first, length_q, acc, total,
            TILE_M, HEAD_DIM, PADDED_DIM,
        )  # fmt: skip
    else:
        store_rows(o_head, stride_os, first, length_q, acc, total, TILE_M, HEAD_DIM, PADDED_DIM)
