"""Block energies on a GPU in one pass over the keys, given each query's log-sum-exp.

Half of dense attention's products and one exponential a score: no maximum, no rescaling, no values.
A first pass finds the log-sum-exp where the caller has none. A program owns one tile of queries and
writes its own sums, so the result does not depend on the order in which programs run.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from calibatt_compiler.kernels.portable.energy_parts import energy_launch
from calibatt_compiler.kernels.portable.launch import (
    aligned,
    on_device,
    positive_scale,
    stride_arguments,
)
from calibatt_compiler.kernels.portable.primitives import (
    head_rows,
    key_scores,
    load_rows,
    online_softmax_update,
)
from calibatt_compiler.kernels.portable.tiles import TileSettings

STRIDES = tuple(f"stride_{tensor}{axis}" for tensor in "qk" for axis in "bhs")


@triton.jit
def log_sum_exp(
    q,
    k_head,
    stride_ks,
    length_k,
    scale_log2,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    RAGGED_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """log2 of the sum of exponentials of the scaled scores of q (M, D), by row: (M,)."""
    maximum = tl.full((TILE_M,), -float("inf"), tl.float32)
    total = tl.zeros((TILE_M,), tl.float32)
    for first in range(0, length_k, TILE_N):
        scores = key_scores(
            q, k_head, stride_ks, first, length_k, TILE_N, HEAD_DIM, PADDED_DIM, RAGGED_K, PRECISION
        )
        _, sums, shrink, maximum = online_softmax_update(scores, maximum, scale_log2, 0.0, False)
        total = total * shrink + sums
    return maximum + tl.math.log2(total)


@triton.jit
def store_tile_energy(
    parts_ptr,
    scores,
    lse,
    scale_log2,
    key_tiles,
    inside,
    TILE_M: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Sum the probabilities of a tile's raw scores (M, N) by groups of queries, and store them.

    `parts_ptr` points at the first group's part for these keys; `inside` (M / GROUP,) says which
    groups there are. `lse` (M,) is in units of log2.
    """
    sums = tl.sum(tl.math.exp2(scores * scale_log2 - lse[:, None]), 1)
    # Summed as rows: triton 3.7 can't lay out the sum of a vector beside tcgen05.
    sums = tl.sum(tl.reshape(sums, (TILE_M // GROUP, GROUP)), 1)
    group = tl.arange(0, TILE_M // GROUP)
    tl.store(parts_ptr + group * key_tiles, sums, mask=inside)


# Lengths and strides are not specialised, nor are the attention kernels'.
@triton.jit(do_not_specialize=[*STRIDES, "heads", "length_q", "length_k", "groups", "key_tiles"])
def energy_tile(
    q_ptr,
    k_ptr,
    lse_ptr,
    parts_ptr,
    stride_qb: tl.int64,
    stride_qh: tl.int64,
    stride_qs,
    stride_kb: tl.int64,
    stride_kh: tl.int64,
    stride_ks,
    scale_log2,
    heads,
    length_q,
    length_k,
    groups,
    key_tiles,
    HAS_LSE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ALIGN: tl.constexpr,
    RAGGED_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sum the probabilities of TILE_M queries by groups of GROUP queries and tiles of keys.

    Grid: (tiles of queries that are not empty, batch * heads). `lse_ptr` is float32 (batch * heads,
    length_q), natural log, read with HAS_LSE only; `parts_ptr` float32 (batch * heads, groups,
    key_tiles). Strides count units of ALIGN elements. `scale_log2` > 0.
    """
    tile = tl.program_id(0)
    batch_head = tl.program_id(1).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    q_head, stride_qs = head_rows(q_ptr, stride_qb, stride_qh, stride_qs, batch, head, ALIGN)
    k_head, stride_ks = head_rows(k_ptr, stride_kb, stride_kh, stride_ks, batch, head, ALIGN)
    q = load_rows(q_head, stride_qs, tile * TILE_M, length_q, TILE_M, HEAD_DIM, PADDED_DIM, True)
    row = tile * TILE_M + tl.arange(0, TILE_M)
    if HAS_LSE:
        lse = tl.load(lse_ptr + batch_head * length_q + row, mask=row < length_q, other=0.0)
        lse = lse * 1.4426950408889634
    else:
        lse = log_sum_exp(
            q, k_head, stride_ks, length_k, scale_log2,
            TILE_M, TILE_N, HEAD_DIM, PADDED_DIM, RAGGED_K, PRECISION,
        )  # fmt: skip
    # Queries past the end count nothing.
    lse = tl.where(row < length_q, lse, float("inf"))
    group = tile * (TILE_M // GROUP)
    inside = group + tl.arange(0, TILE_M // GROUP) < groups
    parts_ptr += (batch_head * groups + group) * key_tiles
    # One flat loop, so that the pipeline of loads never drains; the ragged tile comes after it.
    whole = length_k // TILE_N
    for part in tl.range(0, whole):
        scores = key_scores(
            q, k_head, stride_ks, part * TILE_N, length_k,
            TILE_N, HEAD_DIM, PADDED_DIM, False, PRECISION,
        )  # fmt: skip
        store_tile_energy(
            parts_ptr + part, scores, lse, scale_log2, key_tiles, inside, TILE_M, GROUP
        )
    if RAGGED_K:
        scores = key_scores(
            q, k_head, stride_ks, whole * TILE_N, length_k,
            TILE_N, HEAD_DIM, PADDED_DIM, True, PRECISION,
        )  # fmt: skip
        store_tile_energy(
            parts_ptr + whole, scores, lse, scale_log2, key_tiles, inside, TILE_M, GROUP
        )


def triton_energy(
    q: Tensor,
    k: Tensor,
    block: tuple[int, int],
    scale: float,
    lse: Tensor | None,
    *,
    settings: TileSettings | None = None,
) -> Tensor:
    """Return block energies, float32 (B, H, query_blocks, key_blocks).

    Args:
        q: (B, H, Sq, D), float32, bfloat16 or float16; strides other than unit along D, or not
            16-byte aligned, cost a copy.
        k: (B, H, Sk, D).
        block: tokens a query block, tokens a key block.
        scale: factor on the scores.
        lse: (B, H, Sq), natural log-sum-exp of the scaled scores, or None.
        settings: tiles to use instead of the architecture's own.

    Raises:
        KernelError: dtype or head dim that no portable kernel takes.
    """
    batch, heads, length_q, _ = q.shape
    config, parts = energy_launch(q, k, block, with_output=False, settings=settings)
    q, scale = positive_scale(q.detach(), scale)
    q, k = aligned(q, config), aligned(k.detach(), config)
    if lse is not None:
        lse = lse.detach().to(torch.float32).contiguous()
    sums = parts.zeros(q)
    with on_device(q):
        energy_tile[-(-length_q // config.settings.m), batch * heads](
            q,
            k,
            sums if lse is None else lse,
            sums,
            **stride_arguments(config, q=q, k=k),
            scale_log2=scale * math.log2(math.e),
            heads=heads,
            length_q=length_q,
            length_k=k.shape[2],
            groups=parts.groups,
            key_tiles=parts.key_tiles,
            HAS_LSE=lse is not None,
            **config.constexprs,
            **config.options,
        )
    return parts.energy(sums)
