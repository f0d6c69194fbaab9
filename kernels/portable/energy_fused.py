"""Dense attention and its block energies in one kernel: the energies cost next to nothing more.

The online softmax has each row's sum of probabilities for each key block, relative to the row
maximum so far. They are kept until the row's log-sum-exp is known, then summed over rows by the
program that kept them: log2 of the sums, float32 (key_blocks, TILE_M), written and read through L2.
Programs that reuse their buffer for one tile of queries after the other would need less of it, but
the compiler then holds the offsets of all operands in registers from tile to tile, and spills. So
a launch serves as many tiles as fit a budget.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from calibatt_compiler.kernels.common.operands import empty_output
from calibatt_compiler.kernels.portable.energy_parts import energy_launch
from calibatt_compiler.kernels.portable.launch import STRIDES, aligned, call_arguments, on_device
from calibatt_compiler.kernels.portable.primitives import (
    attend_tile_sums,
    head_rows,
    load_rows,
    store_rows,
)
from calibatt_compiler.kernels.portable.tiles import TileSettings, multiprocessors

SCRATCH_BYTES = 512 << 20
"""Most that the sums of one launch may take; a call makes as many launches as it needs."""

CHUNK = 16
"""Key blocks whose kept sums are read at once."""


@triton.jit
def keep_sums(
    kept_ptr, tile, block_sums, sums, shrink, maximum, TILE_M: tl.constexpr, KEY_TILES: tl.constexpr
):
    """Add a key tile's row sums (M,) to those of its block, and keep log2 of them.

    The first tile of a block forgets the block before it; each further one overwrites what is kept.
    Where all scores were -inf, that is -inf. Returns the block's sums so far.
    """
    if KEY_TILES > 1:
        sums += tl.where(tile % KEY_TILES == 0, 0.0, block_sums * shrink)
    row = tl.arange(0, TILE_M)
    tl.store(kept_ptr + tile // KEY_TILES * TILE_M + row, tl.math.log2(sums) + maximum)
    return sums


@triton.jit
def store_energies(
    kept_ptr,
    parts_ptr,
    lse,
    key_blocks,
    groups,
    TILE_M: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Turn the kept sums of a tile of queries into sums of probabilities by groups of queries.

    `lse` (M,) in units of log2; `parts_ptr` points at the tile's first group, of which `groups`
    are left.
    """
    row = tl.arange(0, TILE_M)
    group = tl.arange(0, TILE_M // GROUP)
    for first in range(0, key_blocks, CHUNK):
        block = first + tl.arange(0, CHUNK)
        inside = block < key_blocks
        kept = tl.load(
            kept_ptr + block[:, None] * TILE_M + row[None, :],
            mask=inside[:, None],
            other=-float("inf"),
        )
        probability = tl.math.exp2(kept - lse[None, :])
        sums = tl.sum(tl.reshape(probability, (CHUNK, TILE_M // GROUP, GROUP)), 2)
        tl.store(
            parts_ptr + group[None, :] * key_blocks + block[:, None],
            sums,
            mask=inside[:, None] & (group < groups)[None, :],
        )


# Lengths and strides are not specialised, nor are the attention kernels'.
@triton.jit(
    do_not_specialize=[
        *STRIDES,
        "heads",
        "first_item",
        "length_q",
        "length_k",
        "groups",
        "key_blocks",
    ]
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
    first_item,
    length_q,
    length_k,
    groups,
    key_blocks,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    KEY_TILES: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ALIGN: tl.constexpr,
    RAGGED_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend all keys for the tile of queries `first_item + program`; sum probabilities by block.

    Grid: (tiles of this launch,); those of a head follow one another, tiles past the end of the
    queries are not counted. `kept_ptr` is float32 (programs, key_blocks, TILE_M), scratch;
    `parts_ptr` float32 (batch * heads, groups, key_blocks). A key block is KEY_TILES tiles. Strides
    count units of ALIGN elements. `scale_log2` > 0.
    """
    kept_ptr += tl.program_id(0).to(tl.int64) * key_blocks * TILE_M
    item = first_item + tl.program_id(0)
    query_tiles = tl.cdiv(length_q, TILE_M)
    batch_head = (item // query_tiles).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    tile = item % query_tiles
    first = tile * TILE_M
    q_head, stride_qs = head_rows(q_ptr, stride_qb, stride_qh, stride_qs, batch, head, ALIGN)
    k_head, stride_ks = head_rows(k_ptr, stride_kb, stride_kh, stride_ks, batch, head, ALIGN)
    v_head, stride_vs = head_rows(v_ptr, stride_vb, stride_vh, stride_vs, batch, head, ALIGN)
    o_head, stride_os = head_rows(o_ptr, stride_ob, stride_oh, stride_os, batch, head, ALIGN)
    q = load_rows(q_head, stride_qs, first, length_q, TILE_M, HEAD_DIM, PADDED_DIM, True)
    acc = tl.zeros([TILE_M, PADDED_DIM], tl.float32)
    maximum = tl.full([TILE_M], -float("inf"), tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
    block_sums = tl.zeros([TILE_M], tl.float32)
    whole = length_k // TILE_N
    for part in tl.range(0, whole):
        acc, maximum, total, sums, shrink = attend_tile_sums(
            q, k_head, v_head, stride_ks, stride_vs, part * TILE_N, length_k,
            acc, maximum, total, scale_log2, TILE_N, HEAD_DIM, PADDED_DIM, False, PRECISION,
        )  # fmt: skip
        block_sums = keep_sums(kept_ptr, part, block_sums, sums, shrink, maximum, TILE_M, KEY_TILES)
    if RAGGED_K:
        acc, maximum, total, sums, shrink = attend_tile_sums(
            q, k_head, v_head, stride_ks, stride_vs, whole * TILE_N, length_k,
            acc, maximum, total, scale_log2, TILE_N, HEAD_DIM, PADDED_DIM, True, PRECISION,
        )  # fmt: skip
        keep_sums(kept_ptr, whole, block_sums, sums, shrink, maximum, TILE_M, KEY_TILES)
    store_rows(o_head, stride_os, first, length_q, acc, total, TILE_M, HEAD_DIM, PADDED_DIM)
    row = first + tl.arange(0, TILE_M)
    # Queries past the end count nothing.
    lse = tl.where(row < length_q, maximum + tl.math.log2(total), float("inf"))
    group = tile * (TILE_M // GROUP)
    # A thread reads what other threads of the program kept.
    tl.debug_barrier()
    store_energies(
        kept_ptr, parts_ptr + (batch_head * groups + group) * key_blocks, lse,
        key_blocks, groups - group, TILE_M, GROUP, CHUNK,
    )  # fmt: skip


def items_a_launch(q: Tensor, item_bytes: int) -> int:
    """Tiles of queries whose sums fit the budget; whole rounds of the GPU's multiprocessors."""
    fit = max(1, SCRATCH_BYTES // item_bytes)
    return fit // multiprocessors(q.device) * multiprocessors(q.device) or fit


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
    item_floats = parts.key_tiles * config.settings.m
    step = min(items, items_a_launch(q, 4 * item_floats))
    kept = sums.new_empty(step, item_floats)
    with on_device(q):
        for first_item in range(0, items, step):
            attention_and_energy[(min(step, items - first_item),)](
                q,
                k,
                v,
                out,
                kept,
                sums,
                **arguments,
                heads=heads,
                first_item=first_item,
                length_q=length_q,
                length_k=k.shape[2],
                groups=parts.groups,
                key_blocks=parts.key_tiles,
                CHUNK=CHUNK,
                **config.constexprs,
                **config.options,
            )
    return out, parts.energy(sums)
