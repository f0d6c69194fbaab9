"""Dense attention and its block energies in one kernel: the energies cost next to nothing more.

The online softmax has each row's sum of probabilities for each tile of keys, relative to the row
maximum so far. They are kept until the row's log-sum-exp is known, then summed over rows. A program
does that for one tile of queries after the other, so what is kept is a scratch buffer a program,
not a row a query: log2 of the sums, float32 (key tiles, TILE_M), written and read through L2.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from calibatt_compiler.kernels.energy_parts import energy_launch
from calibatt_compiler.kernels.operands import empty_output
from calibatt_compiler.kernels.tiles import TileSettings, multiprocessors
from calibatt_compiler.kernels.triton_body import (
    attend_tile_sums,
    head_rows,
    load_rows,
    store_rows,
)
from calibatt_compiler.kernels.triton_launch import STRIDES, aligned, call_arguments, on_device

SCRATCH_BYTES = 256 << 20
"""Most that the scratch of all programs may take; fewer programs run where it would take more."""

CHUNK = 16
"""Key tiles whose kept sums are read at once."""


@triton.jit
def keep_sums(kept_ptr, tile, sums, maximum, TILE_M: tl.constexpr):
    """Keep log2 of a key tile's row sums (M,), -inf where all scores were -inf."""
    row = tl.arange(0, TILE_M)
    tl.store(kept_ptr + tile * TILE_M + row, tl.math.log2(sums) + maximum)


@triton.jit
def store_energies(
    kept_ptr,
    parts_ptr,
    lse,
    tiles,
    key_tiles,
    groups,
    TILE_M: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Turn the kept sums of `tiles` key tiles into sums of probabilities by groups of queries.

    `lse` (M,) in units of log2; `parts_ptr` points at the tile's first group, of which `groups`
    are left.
    """
    row = tl.arange(0, TILE_M)
    group = tl.arange(0, TILE_M // GROUP)
    for first in range(0, tiles, CHUNK):
        tile = first + tl.arange(0, CHUNK)
        inside = tile < tiles
        kept = tl.load(
            kept_ptr + tile[:, None] * TILE_M + row[None, :],
            mask=inside[:, None],
            other=-float("inf"),
        )
        probability = tl.math.exp2(kept - lse[None, :])
        sums = tl.sum(tl.reshape(probability, (CHUNK, TILE_M // GROUP, GROUP)), 2)
        tl.store(
            parts_ptr + group[None, :] * key_tiles + tile[:, None],
            sums,
            mask=inside[:, None] & (group < groups)[None, :],
        )


# Lengths and strides are not specialised, as in the attention kernels.
@triton.jit(
    do_not_specialize=[*STRIDES, "heads", "items", "length_q", "length_k", "groups", "key_tiles"]
)
def attention_and_energy(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    kept_ptr,
    parts_ptr,
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
    items,
    length_q,
    length_k,
    groups,
    key_tiles,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ALIGN: tl.constexpr,
    RAGGED_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend all keys for the tiles of queries `program`, `program + programs`, ...

    Grid: (programs,). An item is a tile of queries of one head, all `items` of a head in a row.
    `kept_ptr` is float32 (programs, key_tiles, TILE_M), scratch; `parts_ptr` float32 (batch *
    heads, groups, key_tiles). Strides count units of ALIGN elements. `scale_log2` > 0.
    """
    kept_ptr += tl.program_id(0).to(tl.int64) * key_tiles * TILE_M
    query_tiles = tl.cdiv(length_q, TILE_M)
    whole = length_k // TILE_N
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        batch_head = (item // query_tiles).to(tl.int64)
        batch, head = batch_head // heads, batch_head % heads
        tile = item % query_tiles
        first = tile * TILE_M
        q_head, q_stride = head_rows(q_ptr, stride_qb, stride_qh, stride_qs, batch, head, ALIGN)
        k_head, k_stride = head_rows(k_ptr, stride_kb, stride_kh, stride_ks, batch, head, ALIGN)
        v_head, v_stride = head_rows(v_ptr, stride_vb, stride_vh, stride_vs, batch, head, ALIGN)
        o_head, o_stride = head_rows(o_ptr, stride_ob, stride_oh, stride_os, batch, head, ALIGN)
        q = load_rows(q_head, q_stride, first, length_q, TILE_M, HEAD_DIM, PADDED_DIM, True)
        acc = tl.zeros([TILE_M, PADDED_DIM], tl.float32)
        maximum = tl.full([TILE_M], -float("inf"), tl.float32)
        total = tl.zeros([TILE_M], tl.float32)
        for part in tl.range(0, whole):
            acc, maximum, total, sums = attend_tile_sums(
                q, k_head, v_head, k_stride, v_stride, part * TILE_N, length_k,
                acc, maximum, total, scale_log2, TILE_N, HEAD_DIM, PADDED_DIM, False, PRECISION,
            )  # fmt: skip
            keep_sums(kept_ptr, part, sums, maximum, TILE_M)
        if RAGGED_K:
            acc, maximum, total, sums = attend_tile_sums(
                q, k_head, v_head, k_stride, v_stride, whole * TILE_N, length_k,
                acc, maximum, total, scale_log2, TILE_N, HEAD_DIM, PADDED_DIM, True, PRECISION,
            )  # fmt: skip
            keep_sums(kept_ptr, whole, sums, maximum, TILE_M)
        store_rows(o_head, o_stride, first, length_q, acc, total, TILE_M, HEAD_DIM, PADDED_DIM)
        row = first + tl.arange(0, TILE_M)
        # Queries past the end count nothing.
        lse = tl.where(row < length_q, maximum + tl.math.log2(total), float("inf"))
        group = tile * (TILE_M // GROUP)
        # Other threads read what this one kept, and the next item overwrites what they read.
        tl.debug_barrier()
        store_energies(
            kept_ptr, parts_ptr + (batch_head * groups + group) * key_tiles, lse,
            tl.cdiv(length_k, TILE_N), key_tiles, groups - group, TILE_M, GROUP, CHUNK,
        )  # fmt: skip
        tl.debug_barrier()


def programs_to_run(q: Tensor, items: int, program_bytes: int, warps: int) -> int:
    """As many programs as a GPU holds at once, of those that have an item and fit the budget."""
    fit = multiprocessors(q.device) * (16 // warps)
    return max(1, min(items, fit, SCRATCH_BYTES // program_bytes))


def triton_attention_and_energy(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: tuple[int, int],
    scale: float,
    *,
    settings: TileSettings | None = None,
) -> tuple[Tensor, Tensor]:
    """Return dense attention's output and its block energies.

    Args:
        q: (B, H, Sq, D), float32, bfloat16 or float16; strides other than unit along D, or not
            16-byte aligned, cost a copy.
        k: (B, H, Sk, D).
        v: (B, H, Sk, D).
        block: tokens a query block, tokens a key block.
        scale: factor on the scores.
        settings: tiles to use instead of the architecture's own.

    Returns:
        (B, H, Sq, D) laid out as contiguous (B, Sq, H, D); float32 (B, H, query_blocks,
        key_blocks).

    Raises:
        KernelError: dtype or head dim that no portable kernel takes.
    """
    config, parts = energy_launch(q, k, block, with_output=True, settings=settings)
    q, k, v = (aligned(x.detach(), config) for x in (q, k, v))
    out, sums = empty_output(q), parts.zeros(q)
    q, arguments = call_arguments(q, k, v, out, scale, config)
    batch, heads, length_q, _ = q.shape
    items = batch * heads * -(-length_q // config.settings.m)
    kept_shape = (parts.key_tiles, config.settings.m)
    program_bytes = 4 * kept_shape[0] * kept_shape[1]
    programs = programs_to_run(q, items, program_bytes, config.settings.warps)
    kept = sums.new_empty(programs, *kept_shape)
    with on_device(q):
        attention_and_energy[(programs,)](
            q,
            k,
            v,
            out,
            kept,
            sums,
            **arguments,
            heads=heads,
            items=items,
            length_q=length_q,
            length_k=k.shape[2],
            groups=parts.groups,
            key_tiles=parts.key_tiles,
            CHUNK=CHUNK,
            **config.constexprs,
            **config.options,
        )
    return out, parts.energy(sums)
