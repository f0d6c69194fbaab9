"""What every portable kernel shares: loads, the online softmax, one key tile, the final division.

The table kernel and the generated kernels call these and differ only in how they find the next key
tile, so they give the same bits for the same pattern. Shapes: M queries a program, N keys a tile, D
elements a head padded to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def head_rows(
    ptr,
    stride_b,
    stride_h,
    stride_s,
    batch,
    head,
    ALIGN: tl.constexpr,
    TMA: tl.constexpr = False,
):
    """Pointer to token 0 of one head, and the distance of two tokens in elements.

    The strides count units of ALIGN elements. The multiplication by a literal is what tells the
    compiler that 16-byte loads are aligned: a hint on an argument gets lost when functions are
    inlined. With TMA, `ptr` is a descriptor of all heads, which needs neither: see `load_tokens`.
    """
    # Not two returns: what follows one is compiled, too.
    if not TMA:
        ptr += (batch * stride_b + head * stride_h) * ALIGN
        stride_s *= ALIGN
    return ptr, stride_s


@triton.jit
def load_rows(
    ptr,
    stride,
    first,
    length,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Load the tokens `first` to `first + ROWS` of one head as (ROWS, PADDED_DIM).

    `ptr` points at token 0, `stride` is the distance of two tokens in elements. With RAGGED, tokens
    from `length` on read as zero; so do the elements from HEAD_DIM on.
    """
    row = tl.arange(0, ROWS)
    column = tl.arange(0, PADDED_DIM)
    # The tile's start in 64 bits: tokens times stride may pass 2^31 elements.
    start = ptr + tl.cast(first, tl.int64) * stride
    pointers = start + row[:, None] * stride + column[None, :]
    if RAGGED:
        inside = (first + row < length)[:, None]
        if HEAD_DIM != PADDED_DIM:
            inside = inside & (column < HEAD_DIM)[None, :]
        return tl.load(pointers, mask=inside, other=0.0)
    if HEAD_DIM != PADDED_DIM:
        return tl.load(pointers, mask=(column < HEAD_DIM)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def load_tokens(
    source,
    stride,
    batch,
    head,
    first,
    length,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    RAGGED: tl.constexpr,
    TMA: tl.constexpr,
):
    """As `load_rows` from the pointer `source`, or with TMA from a descriptor of (B, H, S, D).

    A descriptor finds the tokens by `batch` and `head`, and reads zero past any end.
    """
    if TMA:
        tokens = tl.reshape(source.load([batch, head, first, 0]), [ROWS, PADDED_DIM])
    else:
        tokens = load_rows(source, stride, first, length, ROWS, HEAD_DIM, PADDED_DIM, RAGGED)
    return tokens


@triton.jit
def gather_rows(
    ptr,
    stride,
    computed_ptr,
    repetitive,
    first,
    rows,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
):
    """As a ragged `load_rows` of a head that has `rows` rows.

    Row i of a head that is `repetitive` is the token `computed[i]`, else the token i.
    """
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, PADDED_DIM)
    computed = tl.load(computed_ptr + row, mask=repetitive & (row < rows), other=0)
    token = tl.cast(tl.where(repetitive, computed, row), tl.int64)
    inside = (row < rows)[:, None]
    if HEAD_DIM != PADDED_DIM:
        inside = inside & (column < HEAD_DIM)[None, :]
    return tl.load(ptr + token[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def key_scores(
    q,
    k_ptr,
    stride_ks,
    first,
    length_k,
    TILE_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    batch=0,
    head=0,
    TMA: tl.constexpr = False,
):
    """Raw scores (M, N) of q (M, D) against the keys `first` to `first + TILE_N`.

    With RAGGED, keys from `length_k` on score -inf, which stays so under a positive scale. For
    `batch`, `head` and TMA see `load_tokens`.
    """
    k = load_tokens(
        k_ptr, stride_ks, batch, head, first, length_k, TILE_N, HEAD_DIM, PADDED_DIM, RAGGED, TMA
    )
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if RAGGED:
        inside = first + tl.arange(0, TILE_N) < length_k
        scores = tl.where(inside[None, :], scores, -float("inf"))
    return scores


@triton.jit
def online_softmax_update(scores, maximum, scale_log2, log2_weight, WEIGHTED: tl.constexpr):
    """Fold a tile of raw scores (M, N) into the running row maximum (M,).

    The maximum is kept in units of log2, scaled; `scale_log2` = softmax scale * log2(e) > 0. If
    WEIGHTED, `log2_weight`, a scalar or (1, N), is added to the scaled scores.

    Returns:
        Probabilities (M, N) relative to the new maximum; their row sums (M,); the factor (M,) by
        which earlier sums shrink; the new maximum.
    """
    if WEIGHTED:
        scores = scores * scale_log2 + log2_weight
        scale_log2 = 1.0
    higher = tl.maximum(maximum, tl.max(scores, 1) * scale_log2)
    # A row that has seen only -inf so far: subtract 0, not -inf, which would give NaN.
    reference = tl.where(higher == -float("inf"), 0.0, higher)
    probability = tl.math.exp2(scores * scale_log2 - reference[:, None])
    shrink = tl.math.exp2(maximum - reference)
    return probability, tl.sum(probability, 1), shrink, higher


@triton.jit
def attend_tile_sums(
    q,
    k_ptr,
    v_ptr,
    stride_ks,
    stride_vs,
    first,
    length_k,
    acc,
    maximum,
    total,
    scale_log2,
    TILE_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    log2_weight=0.0,
    WEIGHTED: tl.constexpr = False,
):
    """Attend the keys `first` to `first + TILE_N`; q is (M, D), acc (M, D) float32.

    Returns the new acc, maximum and total; the tile's row sums (M,) relative to that maximum; the
    factor (M,) by which sums relative to the last maximum shrink. Only a RAGGED tile is masked.
    """
    scores = key_scores(
        q, k_ptr, stride_ks, first, length_k, TILE_N, HEAD_DIM, PADDED_DIM, RAGGED, PRECISION
    )
    probability, sums, shrink, maximum = online_softmax_update(
        scores, maximum, scale_log2, log2_weight, WEIGHTED
    )
    v = load_rows(v_ptr, stride_vs, first, length_k, TILE_N, HEAD_DIM, PADDED_DIM, RAGGED)
    acc = acc * shrink[:, None]
    acc = tl.dot(probability.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, maximum, total * shrink + sums, sums, shrink


@triton.jit
def key_bias(bias_ptr, first, length_k, TILE_N: tl.constexpr):
    """What a mask adds to the log2 scores of the keys `first` to `first + TILE_N`, (TILE_N,)."""
    place = first + tl.arange(0, TILE_N)
    return tl.load(bias_ptr + place, mask=place < length_k, other=0.0) * 1.4426950408889634


@triton.jit
def lies_in_hole(bounds_ptr, first, length_k, TILE_N: tl.constexpr):
    """Whether all keys `first` to `first + TILE_N` are cut: see `KeyPadding.bounds`."""
    inside = (first >= tl.load(bounds_ptr)) & (tl.load(bounds_ptr + 2) != 0)
    return inside & (tl.minimum(first + TILE_N, length_k) <= tl.load(bounds_ptr + 1))


@triton.jit
def reference_maximum(
    q,
    k_ptr,
    stride_ks,
    first,
    length_k,
    scale_log2,
    TILE_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    batch,
    head,
    TMA: tl.constexpr,
    bias_ptr,
    PADDED: tl.constexpr,
):
    """The fixed softmax shift: row maximum (M,) of the keys `first` to `first + TILE_N`.

    In units of log2, scaled; if PADDED, with the `key_bias`. These keys are attended, too, and no
    weight is below 1, so a row's sum is at least 1: whatever flushes to zero is below 2^-126 of it.
    See `flag_overflow` for the other end.
    """
    scores = key_scores(
        q, k_ptr, stride_ks, first, length_k, TILE_N, HEAD_DIM, PADDED_DIM, True, PRECISION,
        batch, head, TMA,
    )  # fmt: skip
    if PADDED:
        scores = scores * scale_log2 + key_bias(bias_ptr, first, length_k, TILE_N)[None, :]
        scale_log2 = 1.0
    return tl.max(scores, 1) * scale_log2


@triton.jit
def attend_tile(
    q,
    k_ptr,
    v_ptr,
    stride_ks,
    stride_vs,
    first,
    length_k,
    acc,
    maximum,
    total,
    scale_log2,
    TILE_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    log2_weight=0.0,
    WEIGHTED: tl.constexpr = False,
    batch=0,
    head=0,
    FIXED: tl.constexpr = False,
    TMA: tl.constexpr = False,
):
    """Attend the keys `first` to `first + TILE_N`; q is (M, D), acc (M, D) float32.

    Returns the new acc, maximum and total. If FIXED, `maximum` is the `reference_maximum` and stays
    so. Only a RAGGED tile is masked. For `batch`, `head` and TMA see `load_tokens`.
    """
    scores = key_scores(
        q, k_ptr, stride_ks, first, length_k, TILE_N, HEAD_DIM, PADDED_DIM, RAGGED, PRECISION,
        batch, head, TMA,
    )  # fmt: skip
    if FIXED:
        if WEIGHTED:
            scores = scores * scale_log2 + log2_weight
            scale_log2 = 1.0
        probability = tl.math.exp2(scores * scale_log2 - maximum[:, None])
        total += tl.sum(probability, 1)
    else:
        probability, sums, shrink, maximum = online_softmax_update(
            scores, maximum, scale_log2, log2_weight, WEIGHTED
        )
        acc = acc * shrink[:, None]
        total = total * shrink + sums
    v = load_tokens(
        v_ptr, stride_vs, batch, head, first, length_k, TILE_N, HEAD_DIM, PADDED_DIM, RAGGED, TMA
    )
    acc = tl.dot(probability.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, maximum, total


@triton.jit
def flag_overflow(flag_ptr, acc, total):
    """Set the flag unless every row sum (M,) is in range and all of acc (M, D) is finite.

    Below 2^-60 or above 2^120 a fixed softmax shift is not trusted: the call is recomputed.
    """
    # 0 for what is finite, else NaN, which no comparison holds for.
    check = total + tl.sum(acc * 0.0, 1)
    inside = (check > 2.0**-60) & (check < 2.0**120)
    # Each such row stores: a reduction to one number is more than triton 3.7 compiles for sm_100.
    tl.store(flag_ptr + tl.zeros_like(check).to(tl.int32), 1, mask=inside == 0)


@triton.jit
def part_bias(
    kept_ptr, first, parts, length_k, POOLED: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr
):
    """What is added to the log2 scores of the pooled parts `first` to `first + ROWS`, (ROWS,).

    log2 of the part's tokens where its key block is dropped, -inf where the block's bit in the
    bytes at `kept_ptr` is set or the part is past the end of the keys.
    """
    index = first + tl.arange(0, ROWS)
    block = index // POOLED
    byte = tl.load(kept_ptr + block // 8, mask=index < parts, other=255).to(tl.int32)
    kept = (byte >> (block % 8)) & 1
    size = tl.minimum(length_k - index * PART, PART)
    bias = tl.math.log2(tl.maximum(size, 1).to(tl.float32))
    return tl.where((kept == 0) & (size > 0), bias, -float("inf"))


@triton.jit
def split_tiles(blocks, end_block, length_k, TILES: tl.constexpr, TILE_N: tl.constexpr):
    """Turn a row's kept blocks into whole tiles and, perhaps, one ragged tile at the end.

    `blocks` is the number of kept key blocks of the row and `end_block` the end of its last
    interval; a block holds TILES tiles. The tiles past the end of the keys are left out.

    Returns:
        Number of whole tiles; whether the ragged tile `length_k // TILE_N` follows them.
    """
    whole = length_k // TILE_N
    beyond = tl.maximum(end_block * TILES - whole, 0)
    return blocks * TILES - beyond, beyond > 0


@triton.jit
def store_rows(
    o_ptr,
    stride_os,
    first,
    length_q,
    acc,
    total,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
):
    """Divide acc (M, D) by the row sums (M,) and store the rows below `length_q`."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, PADDED_DIM)
    start = o_ptr + tl.cast(first, tl.int64) * stride_os
    inside = (first + row < length_q)[:, None]
    if HEAD_DIM != PADDED_DIM:
        inside = inside & (column < HEAD_DIM)[None, :]
    result = acc / total[:, None]
    pointers = start + row[:, None] * stride_os + column[None, :]
    tl.store(pointers, result.to(o_ptr.dtype.element_ty), mask=inside)


@triton.jit
def scatter_rows(
    o_ptr,
    stride_os,
    targets_ptr,
    repetitive,
    slots,
    first,
    rows,
    acc,
    total,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
):
    """As `store_rows` of a head that has `rows` rows.

    Row i of a head that is `repetitive` goes to the tokens `targets[:slots, i]` that are not below
    0, else to the token i.
    """
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, PADDED_DIM)
    result = (acc / total[:, None]).to(o_ptr.dtype.element_ty)
    target = row
    for slot in range(tl.where(repetitive, slots, 1)):
        if repetitive:
            target = tl.load(targets_ptr + slot * rows + row, mask=row < rows, other=-1)
        inside = ((row < rows) & (target >= 0))[:, None]
        if HEAD_DIM != PADDED_DIM:
            inside = inside & (column < HEAD_DIM)[None, :]
        pointers = o_ptr + tl.cast(target, tl.int64)[:, None] * stride_os + column[None, :]
        tl.store(pointers, result, mask=inside)
