"""How the Hopper kernel is called: descriptors, compile-time arguments, arguments by name.

One place, so that a kernel compiled ahead of time has exactly the signature a launch asks for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from calibatt_compiler.kernels.common.row_copies import DeviceCopies
from calibatt_compiler.kernels.common.uploads import Uploaded
from calibatt_compiler.kernels.hopper.arguments import (
    Draw,
    Results,
    RowPointers,
    RowSizes,
    Sizes,
    TileTables,
    Variant,
)
from calibatt_compiler.kernels.portable.launch import fixed_shift, positive_scale
from calibatt_compiler.kernels.request import Softmax
from calibatt_compiler.plan.pattern import BlockPattern
from calibatt_compiler.plan.zones import ZonePattern

ALIGNMENT = 16
"""Bytes to which TMA wants pointers and strides aligned."""

QUERY_ROWS = 64
"""Rows of a consumer warpgroup, so of a tile of queries or outputs."""

COPY_UNIT = 8
"""Elements in which strides of gathered queries are counted: 16 bytes of them."""

COUNT_TILES = 128
"""Tiles that one program of `hopper_counts` counts."""

# Bytes of shared memory for keys and values on their way.
_RING = 128 * 1024
# Registers and warps are the kernel's own; see `portable` for why fused multiply-add is asked for.
_OPTIONS: dict[str, int | bool] = {"num_warps": 4, "enable_fp_fusion": True}


@dataclass(frozen=True)
class HopperConfig:
    """What a Hopper kernel is specialised on.

    Attributes:
        block_n: keys a block: 64 or 128.
        head_dim: 64 or 128.
        dtype: bfloat16 or float16.
        fixed: fixed softmax shift with a repair launch, else exact online softmax.
        ragged: the last key block is not whole.
        weighted: blocks of the pattern have weights.
        lse: the log-sum-exp is written.
        lengths: each batch item has a number of valid keys.
        energy: the sums of each query and key block are written.
        copies: some heads are row-shared.
        zones: tiles and runs are those of zones, a step is drawn from them.
    """

    block_n: int
    head_dim: int
    dtype: torch.dtype
    fixed: bool
    ragged: bool
    weighted: bool = False
    lse: bool = False
    lengths: bool = False
    energy: bool = False
    copies: bool = False
    zones: bool = False

    def variant(self, *, repair: bool = False) -> Variant:
        """The compile-time argument of `hopper_attention`, the source of the indices aside."""
        return Variant(
            block_n=self.block_n,
            head_dim=self.head_dim,
            stages=_RING // (2 * self.block_n * self.head_dim * self.dtype.itemsize),
            # The repair launch computes by the exact form.
            fixed=self.fixed and not repair,
            repair=repair,
            ragged=self.ragged or self.lengths,
            lengths=self.lengths,
            weighted=self.weighted,
            lse=self.lse,
            energy=self.energy,
            copies=self.copies,
            zones=self.zones,
        )

    @property
    def repairs(self) -> tuple[bool, ...]:
        """Launches of one call, in order: whether each is the repair."""
        return (False, True) if self.fixed else (False,)

    def variant_name(self, *, repair: bool) -> str:
        """Name of what one source is compiled for, without optional operands."""
        import triton

        softmax = "repair" if repair else "fixed" if self.fixed else "exact"
        return (
            f"sm_90-{str(self.dtype).removeprefix('torch.')}-d{self.head_dim}-n{self.block_n}-"
            f"{softmax}-{'ragged' if self.ragged else 'whole'}{'-copies' if self.copies else ''}"
            f"{'-zones' if self.zones else ''}-triton{triton.__version__}"
        )

    def with_outputs(
        self, *, lse: bool, lengths: bool = False, energy: bool = False
    ) -> HopperConfig:
        """The same with optional operands."""
        return replace(self, lse=lse, lengths=lengths, energy=energy)


def hopper_config(
    pattern: BlockPattern | ZonePattern,
    *,
    dtype: torch.dtype,
    head_dim: int,
    softmax: Softmax = "auto",
) -> HopperConfig:
    """The configuration that serves a pattern, without optional operands.

    Raises:
        KernelError: a fixed shift for a dtype whose range is too small.
    """
    fixed = fixed_shift(dtype, softmax)
    ragged = pattern.key_length % pattern.block_n != 0
    if isinstance(pattern, ZonePattern):
        return HopperConfig(pattern.block_n, head_dim, dtype, fixed, ragged, zones=True)
    weighted, copies = pattern.weights is not None, pattern.repetitive is not None
    return HopperConfig(pattern.block_n, head_dim, dtype, fixed, ragged, weighted, copies=copies)


def launch_options() -> dict[str, int | bool]:
    """Triton's own launch options."""
    return dict(_OPTIONS)


@cache
def _layout(rows: int, head_dim: int, element: Any) -> Any:
    """Of a tile in shared memory; made once, for every call asks for it four times."""
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, head_dim], element)


def descriptor(tensor: Tensor, rows: int) -> Any:
    """TMA descriptor of (B, H, S, D) by its strides, for tiles of `rows` tokens of one head."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    element = gl.bfloat16 if tensor.dtype == torch.bfloat16 else gl.float16
    box = [1, 1, rows, tensor.shape[3]]
    layout = _layout(rows, tensor.shape[3], element)
    strides = [
        # An axis of one element may have any stride; TMA wants a multiple of its alignment.
        stride if size > 1 else tensor.shape[3]
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides[:3], 1], box, layout)


def readable(tensor: Tensor) -> Tensor:
    """`tensor` (B, H, S, D) itself if TMA can read it, else a contiguous copy.

    Readable is unit stride along D, pointer and other strides aligned to 16 bytes: permuted views
    of (B, S, H, D) are, whatever else of the same allocation lies between their tokens.
    """
    steps = [s for s, size in zip(tensor.stride()[:3], tensor.shape[:3], strict=True) if size > 1]
    fits = all(step > 0 and step * tensor.itemsize % ALIGNMENT == 0 for step in steps)
    if fits and tensor.stride(3) == 1 and tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


@dataclass(frozen=True, eq=False)
class Tables:
    """A schedule on the device; see `schedule.Schedule`.

    Attributes:
        tiles: int32 (T + 1, 4).
        starts: int32 (programs + 1).
        runs: int32 (runs + 1).
        codes: of the weights of blocks, see `schedule.BlockCodes`; None without weights.
        code_starts: see `schedule.BlockCodes`; None without weights.
        copies: what row-shared heads compute and copy, filled up to whole tiles, or None.
        uploaded: behind their copies.
    """

    tiles: Tensor
    starts: Tensor
    runs: Tensor
    codes: Tensor | None
    code_starts: Tensor | None
    copies: DeviceCopies | None
    uploaded: Uploaded

    @property
    def count(self) -> int:
        """Number of tiles."""
        return self.tiles.shape[0] - 1

    @property
    def nbytes(self) -> int:
        """Bytes that they take on the device."""
        optional = (self.codes, self.code_starts, self.copies)
        more = sum(table.nbytes for table in optional if table is not None)
        return self.tiles.nbytes + self.starts.nbytes + self.runs.nbytes + more

    @property
    def programs(self) -> int:
        """Number of programs."""
        return self.starts.shape[0] - 1

    def arguments(self, counts: Tensor | None, lengths: Tensor | None) -> TileTables:
        """Their argument of `hopper_attention`."""
        weights = (self.codes, self.code_starts)
        return TileTables(self.tiles, self.starts, self.runs, *weights, counts, lengths)


def arguments(
    operands: Sequence[Tensor],
    tables: Tables,
    results: Results,
    *,
    block_n: int,
    scale: float | None,
    lengths: Tensor | None = None,
    counts: Tensor | None = None,
    draw: Draw | None = None,
) -> dict[str, Any]:
    """Run-time arguments of `hopper_attention` by name.

    Args:
        operands: q, k, v and the output, each (B, H, S, D) and readable by TMA.
        tables: the pattern's.
        results: what is written beside the output.
        block_n: keys a block.
        scale: factor on the scores; default 1 / sqrt(D).
        lengths: int32 (B), valid keys of each batch item.
        counts: int32 (B + 1, T), from `hopper_counts`; with lengths.
        draw: of zones only.
    """
    q, k, v, out = operands
    q, scale = positive_scale(q, scale)
    rows, row_sizes = row_arguments(q, out, tables.copies)
    batches, heads, length_q = q.shape[:3]
    query_blocks = -(-length_q // (2 * QUERY_ROWS))
    sizes = Sizes(batches, heads, tables.count, query_blocks, length_q, k.shape[2])
    return {
        "q_desc": descriptor(q, QUERY_ROWS),
        "k_desc": descriptor(k, block_n),
        "v_desc": descriptor(v, block_n),
        "o_desc": descriptor(out, QUERY_ROWS),
        "tables": tables.arguments(counts, lengths),
        "results": results,
        "rows": rows,
        "scale_log2": scale * math.log2(math.e),
        **sizes._asdict(),
        **row_sizes._asdict(),
        **(draw or Draw())._asdict(),
    }


def row_arguments(
    q: Tensor, out: Tensor, copies: DeviceCopies | None
) -> tuple[RowPointers, RowSizes]:
    """Arguments that only patterns with row-shared heads have.

    Args:
        q: (B, H, Sq, D), readable by TMA.
        out: (B, H, Sq, D), laid out as contiguous (B, Sq, H, D).
        copies: their tables, filled up to whole tiles, or None.
    """
    if copies is None:
        return RowPointers(), RowSizes()
    assert out.transpose(1, 2).is_contiguous()
    sizes = zip(q.stride(), q.shape, strict=True)
    units = [stride // COPY_UNIT if size > 1 else 0 for stride, size in sizes]
    slots, rows = copies.shared.targets.shape
    pieces = 2 * QUERY_ROWS // 8 * (q.shape[3] // 64)
    pointers = RowPointers(q, out, copies.shared.computed, copies.shared.targets)
    return pointers, RowSizes(units[0], units[1], units[2], rows, slots * pieces)
