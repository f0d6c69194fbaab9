"""Block energies on a GPU: two passes over the keys, nothing quadratic in memory.

The first pass finds each query's log-sum-exp (it is left out where the caller has it), the second
sums probabilities by key block. A program owns one tile of queries and writes its own sums, so the
result does not depend on the order in which programs run.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from calibatt_compiler.kernels.tiles import architecture
from calibatt_compiler.kernels.triton_body import head_pointer, load_rows
from calibatt_compiler.kernels.triton_launch import (
    LaunchConfig,
    aligned,
    launch_config,
    on_device,
)
from calibatt_compiler.plan.pattern import BlockPattern

STRIDES = tuple(f"stride_{tensor}{axis}" for tensor in "qk" for axis in "bhs")


@triton.jit
def scaled_scores(
    q,
    k_ptr,
    stride_ks,
    first,
    length_k,
    scale_log2,
    TILE_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores (M, N) of q (M, D) against the keys `first` to `first + TILE_N`, in units of log2.

    With RAGGED, keys from `length_k` on score -inf.
    """
    k = load_rows(k_ptr, stride_ks, first, length_k, TILE_N, HEAD_DIM, PADDED_DIM, RAGGED)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
    if RAGGED:
        inside = first + tl.arange(0, TILE_N) < length_k
        scores = tl.where(inside[None, :], scores, -float("inf"))
    return scores


# Lengths and strides are not specialised, as in the attention kernels.
@triton.jit(do_not_specialize=[*STRIDES, "heads", "length_q", "length_k", "tiles", "key_blocks"])
def energy_tile(
    q_ptr,
    k_ptr,
    lse_ptr,
    energy_ptr,
    stride_qb: tl.int64,
    stride_qh: tl.int64,
    stride_qs,
    stride_kb: tl.int64,
    stride_kh: tl.int64,
    stride_ks,
    heads,
    length_q,
    length_k,
    tiles,
    key_blocks,
    scale_log2,
    HAS_LSE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    KEY_TILES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ALIGN: tl.constexpr,
    RAGGED_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sum the probabilities of TILE_M queries by key block.

    Grid: (tiles of queries that are not empty, batch * heads). `lse_ptr` is float32 (batch * heads,
    length_q), natural log, read with HAS_LSE only; `energy_ptr` float32 (batch * heads, tiles,
    key_blocks). A key block is KEY_TILES tiles. Strides count units of ALIGN elements.
    """
    tile = tl.program_id(0)
    batch_head = tl.program_id(1).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    q_head = head_pointer(q_ptr, stride_qb, stride_qh, batch, head, ALIGN)
    k_head = head_pointer(k_ptr, stride_kb, stride_kh, batch, head, ALIGN)
    stride_q, stride_k = stride_qs * ALIGN, stride_ks * ALIGN
    q = load_rows(q_head, stride_q, tile * TILE_M, length_q, TILE_M, HEAD_DIM, PADDED_DIM, True)
    row = tile * TILE_M + tl.arange(0, TILE_M)

    if HAS_LSE:
        lse = tl.load(lse_ptr + batch_head * length_q + row, mask=row < length_q, other=0.0)
        lse = lse * 1.4426950408889634
    else:
        maximum = tl.full((TILE_M,), -float("inf"), tl.float32)
        total = tl.zeros((TILE_M,), tl.float32)
        for first in range(0, length_k, TILE_N):
            scores = scaled_scores(
                q, k_head, stride_k, first, length_k, scale_log2,
                TILE_N, HEAD_DIM, PADDED_DIM, RAGGED_K, PRECISION,
            )  # fmt: skip
            higher = tl.maximum(maximum, tl.max(scores, 1))
            total = total * tl.math.exp2(maximum - higher)
            total += tl.sum(tl.math.exp2(scores - higher[:, None]), 1)
            maximum = higher
        lse = maximum + tl.math.log2(total)

    # Queries past the end count nothing.
    lse = tl.where(row < length_q, lse, float("inf"))
    sums_ptr = energy_ptr + (batch_head * tiles + tile) * key_blocks
    for block in range(key_blocks):
        sums = tl.zeros((TILE_M,), tl.float32)
        for part in range(KEY_TILES):
            first = (block * KEY_TILES + part) * TILE_N
            scores = scaled_scores(
                q, k_head, stride_k, first, length_k, scale_log2,
                TILE_N, HEAD_DIM, PADDED_DIM, RAGGED_K or KEY_TILES > 1, PRECISION,
            )  # fmt: skip
            sums += tl.sum(tl.math.exp2(scores - lse[:, None]), 1)
        # Summed as a row: triton 3.7 can't lay out the sum of a vector beside tcgen05.
        tl.store(sums_ptr + block + tl.arange(0, 1), tl.sum(sums[None, :], 1))


def energy_constexprs(config: LaunchConfig, *, has_lse: bool) -> dict[str, Any]:
    """Compile-time arguments of `energy_tile`: those of the attention kernels that it shares."""
    shared = {name: value for name, value in config.constexprs.items() if name != "ROW_TILES"}
    return shared | {"HAS_LSE": has_lse}


def triton_energy(
    q: Tensor, k: Tensor, block: tuple[int, int], scale: float, lse: Tensor | None
) -> Tensor:
    """Return block energies, float32 (B, H, query_blocks, key_blocks).

    Args:
        q: (B, H, Sq, D), float32, bfloat16 or float16; strides other than unit along D, or not
            16-byte aligned, cost a copy.
        k: (B, H, Sk, D).
        block: tokens a query block, tokens a key block.
        scale: factor on the scores.
        lse: (B, H, Sq), natural log-sum-exp of the scaled scores, or None.

    Raises:
        KernelError: dtype or head dim that no portable kernel takes.
    """
    batch, heads, length_q, head_dim = q.shape
    length_k = k.shape[2]
    blocks = BlockPattern.dense(1, length_q, length_k, block)
    config = launch_config(blocks, arch=architecture(q.device), dtype=q.dtype, head_dim=head_dim)
    q, k = aligned(q.detach(), config), aligned(k.detach(), config)
    if lse is not None:
        lse = lse.detach().float().contiguous()
    row_tiles, align = config.constexprs["ROW_TILES"], config.constexprs["ALIGN"]
    assert isinstance(row_tiles, int)
    assert isinstance(align, int)
    tiles = blocks.query_blocks * row_tiles
    sums = torch.zeros(batch, heads, tiles, blocks.key_blocks, dtype=torch.float32, device=q.device)
    strides = [x.stride(axis) // align for x in (q, k) for axis in (0, 1, 2)]
    with on_device(q):
        energy_tile[-(-length_q // config.settings.m), batch * heads](
            q,
            k,
            sums if lse is None else lse,
            sums,
            **dict(zip(STRIDES, strides, strict=True)),
            heads=heads,
            length_q=length_q,
            length_k=length_k,
            tiles=tiles,
            key_blocks=blocks.key_blocks,
            scale_log2=scale * math.log2(math.e),
            **energy_constexprs(config, has_lse=lse is not None),
            **config.options,
        )
    shape = (batch, heads, blocks.query_blocks, row_tiles, blocks.key_blocks)
    energy: Tensor = sums.view(shape).sum(3)
    energy[:, :, :-1] /= block[0]
    energy[:, :, -1] /= length_q - (blocks.query_blocks - 1) * block[0]
    return energy
