"""One kernel for every pattern: it reads the kept key blocks from tables on the device.

It never compiles per plan: lengths, heads and tables are run-time arguments. It also serves a site
until that site's baked kernel is compiled.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from calibatt_compiler.kernels.copies import NO_COPIES, DeviceCopies
from calibatt_compiler.kernels.index_tables import index_tables
from calibatt_compiler.kernels.operands import check_operands, empty_output
from calibatt_compiler.kernels.pooling import pool
from calibatt_compiler.kernels.tiles import TileSettings
from calibatt_compiler.kernels.triton_body import (
    attend_tile,
    check_rows,
    count_repair,
    gather_rows,
    head_rows,
    load_rows,
    part_bias,
    reference_maximum,
    scatter_rows,
    split_tiles,
    store_rows,
)
from calibatt_compiler.kernels.triton_launch import (
    STRIDES,
    DeviceKernel,
    Softmax,
    aligned,
    call_arguments,
)
from calibatt_compiler.plan.pattern import BlockPattern


# Integers are not specialised: a stride or a length that happens to be 1 or a multiple of 16 must
# not compile another kernel.
@triton.jit(
    do_not_specialize=[
        *STRIDES, "heads", "query_blocks", "length_q", "length_k", "parts", "computed_rows", "slots"
    ]
)  # fmt: skip
def table_attention(  # noqa: PLR0912, PLR0915  one kernel, its forms decided when compiling
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    offsets_ptr,
    blocks_ptr,
    weights_ptr,
    kept_ptr,
    pooled_k_ptr,
    pooled_v_ptr,
    repetitive_ptr,
    computed_ptr,
    targets_ptr,
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
    POOLED: tl.constexpr,
    COPIES: tl.constexpr,
    FIXED: tl.constexpr,
    REPAIR: tl.constexpr,
):
    """Attention of TILE_M queries of one head over the kept blocks of their row of blocks.

    q, o: (B, H, Sq, D) and k, v: (B, H, Sk, D) by strides in units of ALIGN elements. Row
    `r = head * query_blocks + block` owns the entries offsets[r] to offsets[r + 1] of `blocks`; if
    WEIGHTED, an entry's `weights` is added to the log2 scores of its block. If POOLED, pooled keys
    and values (B, H, parts, D), contiguous, follow for the blocks of which the row's bits in `kept`
    are not set, POOLED to a block. If COPIES, the heads of which `repetitive` is not 0 have
    `computed_rows` rows, at the positions `computed`; the output of each goes to its `targets`
    (slots, computed_rows). FIXED: see `reference_maximum`; where that fails `flag` is set. REPAIR:
    nothing is done unless it is.
    """
    if REPAIR:  # noqa: SIM102
        if tl.load(flag_ptr) == 0:
            return
    count_repair(repairs_ptr, REPAIR)
    tile = tl.program_id(0)
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    first = tile * TILE_M
    q_head, stride_qs = head_rows(q_ptr, stride_qb, stride_qh, stride_qs, batch, head, ALIGN)
    k_head, stride_ks = head_rows(k_ptr, stride_kb, stride_kh, stride_ks, batch, head, ALIGN)
    v_head, stride_vs = head_rows(v_ptr, stride_vb, stride_vh, stride_vs, batch, head, ALIGN)
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
    maximum = reference_maximum(
        q, k_head, stride_ks, first, length_k, scale_log2,
        TILE_M, TILE_N, HEAD_DIM, PADDED_DIM, PRECISION, FIXED,
    )  # fmt: skip
    total = tl.zeros([TILE_M], tl.float32)

    row = head * query_blocks + tile // ROW_TILES
    cursor = tl.load(offsets_ptr + row)
    past = tl.load(offsets_ptr + row + 1)
    end_block = tl.load(blocks_ptr + past - 1).to(tl.int32) + 1
    tiles, ragged = split_tiles(past - cursor, end_block, length_k, KEY_TILES, TILE_N)
    following = tl.load(blocks_ptr + cursor).to(tl.int32) * KEY_TILES
    weight = 0.0
    for position in tl.range(0, tiles):
        key_tile = following
        # An iteration ahead, so that no load of keys waits for it; behind the last lies a spare.
        after = position + 1
        block = tl.load(blocks_ptr + cursor + after // KEY_TILES).to(tl.int32)
        following = block * KEY_TILES + after % KEY_TILES
        if WEIGHTED:
            weight = tl.load(weights_ptr + cursor + position // KEY_TILES).to(tl.float32)
        acc, maximum, total = attend_tile(
            q, k_head, v_head, stride_ks, stride_vs, key_tile * TILE_N, length_k,
            acc, maximum, total, scale_log2, TILE_N, HEAD_DIM, PADDED_DIM, False, PRECISION,
            weight, WEIGHTED, FIXED,
        )  # fmt: skip
    # Not `and`: RAGGED_K is decided when compiling, `ragged` when running.
    if RAGGED_K:  # noqa: SIM102
        if ragged:
            if WEIGHTED:
                weight = tl.load(weights_ptr + past - 1).to(tl.float32)
            acc, maximum, total = attend_tile(
                q, k_head, v_head, stride_ks, stride_vs, length_k // TILE_N * TILE_N, length_k,
                acc, maximum, total, scale_log2, TILE_N, HEAD_DIM, PADDED_DIM, True, PRECISION,
                weight, WEIGHTED, FIXED,
            )  # fmt: skip
    if POOLED > 0:
        kept_row = kept_ptr + row * ((parts // POOLED + 7) // 8)
        head_parts = tl.cast(tl.program_id(1), tl.int64) * parts * HEAD_DIM
        for start in tl.range(0, parts, TILE_N):
            bias = part_bias(
                kept_row, start, parts, length_k, POOLED, KEY_TILES * TILE_N // POOLED, TILE_N
            )
            acc, maximum, total = attend_tile(
                q, pooled_k_ptr + head_parts, pooled_v_ptr + head_parts, HEAD_DIM, HEAD_DIM, start,
                parts, acc, maximum, total, scale_log2, TILE_N, HEAD_DIM, PADDED_DIM, True,
                PRECISION, bias[None, :], True, FIXED,
            )  # fmt: skip
    check_rows(acc, total, flag_ptr, FIXED)
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
    reason: str | None = None

    def __init__(
        self,
        pattern: BlockPattern,
        *,
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int,
        settings: TileSettings | None = None,
        softmax: Softmax = "auto",
    ) -> None:
        super().__init__(
            pattern,
            device=device,
            dtype=dtype,
            head_dim=head_dim,
            settings=settings,
            softmax=softmax,
        )
        self.density = pattern.computed_density
        self.tables = index_tables(pattern, device)
        self.copies = DeviceCopies.upload(pattern, device)

    @property
    def table_bytes(self) -> int:
        """Bytes of its tables, shared or not."""
        return self.tables.nbytes + (0 if self.copies is None else self.copies.nbytes)

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
        pattern, config, tables = self.pattern, self.config, self.tables
        check_operands(pattern, q, k, v)
        self.check_specialisation(q)
        q, k, v = (aligned(tensor, config) for tensor in (q, k, v))
        out = empty_output(q)
        pooled = (pool(k, pattern), pool(v, pattern)) if pattern.pooled else (k, v)
        q, arguments = call_arguments(q, k, v, out, scale, config)
        self.launch(
            table_attention,
            (q, k, v, out, *tables.tensors, *pooled),
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
        )
        return out
