"""One kernel for every pattern: it reads the kept key blocks from a table on the device.

It never compiles per plan: lengths, heads and tables are run-time arguments. It also serves a site
until that site's baked kernel is compiled, and recomputes the calls of either whose fixed softmax
reference overflowed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from calibatt_compiler.kernels.common.operands import (
    check_operands,
    check_specialisation,
    empty_output,
)
from calibatt_compiler.kernels.common.pooling import pool
from calibatt_compiler.kernels.common.row_copies import NO_COPIES, DeviceCopies
from calibatt_compiler.kernels.portable.index_tables import index_tables
from calibatt_compiler.kernels.portable.launch import (
    STRIDES,
    DeviceKernel,
    LaunchConfig,
    aligned,
    call_arguments,
    grid,
    key_sources,
    on_device,
)
from calibatt_compiler.kernels.portable.primitives import (
    attend_tile,
    flag_overflow,
    gather_rows,
    head_rows,
    load_rows,
    part_bias,
    reference_maximum,
    scatter_rows,
    split_tiles,
    store_rows,
)
from calibatt_compiler.kernels.portable.tiles import TileSettings
from calibatt_compiler.kernels.request import KernelRequest
from calibatt_compiler.plan.pattern import BlockPattern


@triton.jit
def attend_kept(
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
):
    """Attend the kept key blocks of the row whose first entry `offsets_ptr` points at.

    Returns the new acc, maximum and total: see `attend_tile`, and `table_attention` for the tables.
    """
    entry = tl.load(offsets_ptr) + 1
    past = tl.load(offsets_ptr + 1)
    end_block = tl.load(blocks_ptr + past - 1).to(tl.int32) + 1
    tiles, ragged = split_tiles(past - entry, end_block, length_k, KEY_TILES, TILE_N)
    if FIXED:
        reference = tl.load(blocks_ptr + entry - 1).to(tl.int32) * KEY_TILES
        maximum = reference_maximum(
            q, k_ptr, stride_ks, reference * TILE_N, length_k, scale_log2,
            TILE_N, HEAD_DIM, PADDED_DIM, PRECISION, batch, head, TMA,
        )  # fmt: skip
    weight = 0.0
    # One flat loop over all blocks, so that the pipeline never drains between two of them. Each
    # tile is looked up while the one before is attended, or the loads of keys would wait for it.
    after = tl.load(blocks_ptr + entry).to(tl.int32) * KEY_TILES
    for position in tl.range(0, tiles):
        key_tile = after
        block = entry + (position + 1) // KEY_TILES
        after = tl.load(blocks_ptr + block).to(tl.int32) * KEY_TILES + (position + 1) % KEY_TILES
        if WEIGHTED:
            weight = tl.load(weights_ptr + entry + position // KEY_TILES).to(tl.float32)
        acc, maximum, total = attend_tile(
            q, k_ptr, v_ptr, stride_ks, stride_vs, key_tile * TILE_N, length_k,
            acc, maximum, total, scale_log2, TILE_N, HEAD_DIM, PADDED_DIM, False, PRECISION,
            weight, WEIGHTED, batch, head, FIXED, TMA,
        )  # fmt: skip
    # Not `and`: RAGGED_K is decided when compiling, `ragged` when running.
    if RAGGED_K:  # noqa: SIM102
        if ragged:
            if WEIGHTED:
                weight = tl.load(weights_ptr + past - 1).to(tl.float32)
            acc, maximum, total = attend_tile(
                q, k_ptr, v_ptr, stride_ks, stride_vs, length_k // TILE_N * TILE_N, length_k,
                acc, maximum, total, scale_log2, TILE_N, HEAD_DIM, PADDED_DIM, True, PRECISION,
                weight, WEIGHTED, batch, head, FIXED, TMA,
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


# Integers are not specialised: a stride or a length that happens to be 1 or a multiple of 16 must
# not compile another kernel.
@triton.jit(
    do_not_specialize=[
        *STRIDES, "heads", "query_blocks", "length_q", "length_k", "parts", "computed_rows", "slots"
    ]
)  # fmt: skip
def table_attention(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    flag_ptr,
    repairs_ptr,
    offsets_ptr,
    blocks_ptr,
    weights_ptr,
    kept_ptr,
    pooled_k_ptr,
    pooled_v_ptr,
    repetitive_ptr,
    computed_ptr,
    targets_ptr,
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
    parts,
    computed_rows,
    slots,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    ROW_TILES: tl.constexpr,
    KEY_TILES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ALIGN: tl.constexpr,
    RAGGED_K: tl.constexpr,
    PRECISION: tl.constexpr,
    WEIGHTED: tl.constexpr,
    FIXED: tl.constexpr,
    TMA: tl.constexpr,
    POOLED: tl.constexpr,
    COPIES: tl.constexpr,
    REPAIR: tl.constexpr,
):
    """Attention of TILE_M queries of one head over the kept key blocks of their row of blocks.

    q, o: (B, H, Sq, D) and k, v: (B, H, Sk, D) by strides in units of ALIGN elements; with TMA, k
    and v are descriptors. Row `r = head * query_blocks + block` owns the entries offsets[r] to
    offsets[r + 1] of `blocks`: the block of the reference, then those to attend, upwards. If
    WEIGHTED, an entry's `weights` is added to the log2 scores of its block. If FIXED, the flag is
    set where the result can't be trusted; if REPAIR, nothing is done unless it is set, and
    `repairs` counts what is done. If POOLED, pooled keys and values (B, H, parts, D), contiguous,
    follow for the blocks of which the row's bits in `kept` are not set, POOLED to a block. If
    COPIES, the heads of which `repetitive` is not 0 have `computed_rows` rows, at the positions
    `computed`; the output of each goes to its `targets` (slots, computed_rows).
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

    row = head * query_blocks + tile // ROW_TILES
    acc, maximum, total = attend_kept(
        q, k_head, v_head, stride_ks, stride_vs, offsets_ptr + row, blocks_ptr, weights_ptr,
        length_k, acc, maximum, total, scale_log2, TILE_N, KEY_TILES, HEAD_DIM, PADDED_DIM,
        RAGGED_K, PRECISION, WEIGHTED, batch, head, FIXED, TMA,
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
    if COPIES:
        scatter_rows(
            o_head, stride_os, targets_ptr, repetitive, slots, first, length_q, acc, total,
            TILE_M, HEAD_DIM, PADDED_DIM,
        )  # fmt: skip
    else:
        store_rows(o_head, stride_os, first, length_q, acc, total, TILE_M, HEAD_DIM, PADDED_DIM)


class TableAttention(DeviceKernel):
    """Block-sparse attention by the table kernel.

    Attributes:
        kind: "triton-table".
        density: the pattern's own density, and the pooled keys as part of it.

    Raises:
        KernelError: dtype or head dim that no portable kernel takes.
    """

    kind = "triton-table"

    def __init__(
        self, request: KernelRequest[BlockPattern], settings: TileSettings | None = None
    ) -> None:
        super().__init__(request, settings)
        self.density = self.pattern.computed_density
        self.tables = index_tables(self.pattern, request.device)
        self.copies = DeviceCopies.upload(self.pattern, request.device)
        fixed = self.config.softmax == "fixed"
        self._repairs = torch.zeros(1, dtype=torch.int32, device=request.device) if fixed else None

    @property
    def table_bytes(self) -> int:
        """Bytes of its tables, shared or not."""
        return self.tables.nbytes + (0 if self.copies is None else self.copies.nbytes)

    @property
    def repairs(self) -> int:
        """Calls whose fixed softmax shift failed, and that were computed again.

        Reading it waits for the device.
        """
        return 0 if self._repairs is None else int(self._repairs.item())

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        """Attend; see `ReferenceAttention` for the meaning.

        Args:
            q: (B, H, Sq, D); strides other than unit along D, or not 16-byte aligned, cost a copy.
            k: (B, H, Sk, D).
            v: (B, H, Sk, D).
            scale: factor on the scores; default 1 / sqrt(D).

        Returns:
            (B, H, Sq, D), laid out as contiguous (B, Sq, H, D).

        Raises:
            KernelError: the operands don't fit the pattern or this kernel.
        """
        check_operands(self.pattern, q, k, v)
        check_specialisation(q, self.request)
        q, k, v = (aligned(tensor, self.config) for tensor in (q, k, v))
        out = empty_output(q)
        q, arguments = call_arguments(q, k, v, out, scale, self.config)
        with on_device(q):
            flag = self.flag()
            self._launch((q, k, v, out), flag, arguments, self.config)
            if flag is not None:
                self.repair((q, k, v, out), flag, arguments)
        return out

    def repair(
        self,
        operands: tuple[Tensor, Tensor, Tensor, Tensor],
        flag: Tensor,
        arguments: dict[str, Any],
    ) -> None:
        """Compute a call again by the running maximum if its flag is set; the host never knows.

        Args:
            operands: q, k, v as they were launched, and the output.
            flag: from `flag`, which that launch may have set.
            arguments: from `call_arguments`.
        """
        self._launch(operands, flag, arguments, self.config.repair())

    def _launch(
        self,
        operands: tuple[Tensor, Tensor, Tensor, Tensor],
        flag: Tensor | None,
        arguments: dict[str, Any],
        config: LaunchConfig,
    ) -> None:
        pattern = self.pattern
        q, k, v, out = operands
        pooled = (pool(k, pattern), pool(v, pattern)) if pattern.pooled else (k, v)
        table_attention[grid(pattern, config, q.shape[0])](
            q,
            *key_sources(k, v, config),
            out,
            flag,
            self._repairs,
            *self.tables.tensors,
            *pooled,
            **(NO_COPIES if self.copies is None else self.copies.arguments()),
            **arguments,
            heads=pattern.heads,
            query_blocks=pattern.query_blocks,
            length_q=pattern.query_length,
            length_k=pattern.key_length,
            parts=pattern.key_blocks * pattern.pooled,
            POOLED=pattern.pooled,
            WEIGHTED=pattern.weights is not None,
            COPIES=self.copies is not None,
            REPAIR=config.softmax == "repair",
            **config.constexprs,
            **config.options,
        )
