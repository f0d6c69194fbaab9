"""How the portable kernels are called: operands, strides, constexprs.

One place for it: a kernel compiled ahead of time has the signature that the launch asks for.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.common.padding import KeyPadding
from calibatt_compiler.kernels.portable.tiles import TileSettings, architecture, tile_settings
from calibatt_compiler.kernels.request import KernelRequest, Softmax
from calibatt_compiler.plan.pattern import BlockPattern
from calibatt_compiler.plan.zones import ZonePattern

STRIDES = tuple(f"stride_{tensor}{axis}" for tensor in "qkvo" for axis in "bhs")
"""Stride arguments of every portable kernel: tensors q, k, v, o by batch, head, token."""

ALIGNMENT = 16
"""Bytes to which pointers and strides are aligned, so that every load moves 16 bytes at once."""


@dataclass(frozen=True)
class LaunchConfig:
    """What a portable kernel is specialised on, besides its source.

    Attributes:
        constexprs: the kernel's compile-time arguments by name.
        options: Triton's own launch options.
        settings: the tiles they are made from.
        softmax: "exact": the running maximum; "fixed": a fixed shift and a flag; "repair": the
            running maximum, if the flag is set.
        descriptors: keys and values are passed as TMA descriptors.
    """

    constexprs: dict[str, int | str | bool]
    options: dict[str, int | bool]
    settings: TileSettings
    softmax: Literal["exact", "fixed", "repair"] = "exact"
    descriptors: bool = False

    def repair(self) -> LaunchConfig:
        """Of the launch behind one with a fixed shift."""
        return replace(self, constexprs={**self.constexprs, "FIXED": False}, softmax="repair")


def launch_config(
    pattern: BlockPattern | ZonePattern,
    *,
    arch: int,
    dtype: torch.dtype,
    head_dim: int,
    settings: TileSettings | None = None,
    softmax: Softmax = "auto",
) -> LaunchConfig:
    """Derive the compile-time arguments for a pattern.

    Args:
        pattern: whose blocks are walked.
        arch: compute capability as one number.
        dtype: float16, bfloat16 or float32.
        head_dim: elements a head.
        settings: tiles to use instead of the table's, which must divide the blocks.
        softmax: "auto" takes a fixed shift where `fixed_shift` allows it.

    Raises:
        KernelError: dtype or head_dim that no portable kernel takes, or a fixed shift that is
            insisted on where there is none.
    """
    check_dtype(dtype)
    tiles = settings or tile_settings(pattern, arch=arch, dtype=dtype, head_dim=head_dim)
    blocks = {"ROW_TILES": pattern.block_m // tiles.m, "KEY_TILES": pattern.block_n // tiles.n}
    config = tiled_config(tiles, blocks, pattern.key_length, dtype=dtype, head_dim=head_dim)
    fixed = fixed_shift(dtype, softmax)
    # TMA wants tokens that are aligned to 16 bytes.
    descriptors = tiles.descriptors and config.constexprs["ALIGN"] != 1
    return replace(
        config,
        constexprs={**config.constexprs, "FIXED": fixed, "TMA": descriptors},
        softmax="fixed" if fixed else "exact",
        descriptors=descriptors,
    )


def fixed_shift(dtype: torch.dtype, softmax: Softmax) -> bool:
    """Whether the softmax takes a fixed shift, with a launch that recomputes behind it.

    It asks for the range of float32, which float16 lacks. "auto" leaves float32 itself exact: its
    products take no tensor core, so little would be gained.

    Raises:
        KernelError: "fixed" for float16.
    """
    if softmax == "fixed" and dtype == torch.float16:
        raise KernelError(
            "a fixed softmax shift needs the range of bfloat16",
            expected="softmax='auto' or 'exact'",
            got=dtype,
            remedy="leave softmax out, or run the model in bfloat16",
        )
    return softmax == "fixed" or (softmax == "auto" and dtype == torch.bfloat16)


def check_dtype(dtype: torch.dtype) -> None:
    """Raise `KernelError` unless the portable kernels take a dtype."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise KernelError(
            "no Triton kernel for this dtype",
            expected="float16, bfloat16 or float32",
            got=dtype,
            remedy="run the model under bfloat16 autocast, or take lowering='reference'",
        )


def tiled_config(
    tiles: TileSettings,
    blocks: dict[str, int],
    key_length: int,
    *,
    dtype: torch.dtype,
    head_dim: int,
) -> LaunchConfig:
    """Compile-time arguments of a kernel with these tiles.

    Args:
        tiles: how it is tiled and launched.
        blocks: arguments that say how tiles and blocks relate.
        key_length: keys of the call.
        dtype: of the operands.
        head_dim: elements a head.
    """
    elements = ALIGNMENT // dtype.itemsize
    constexprs: dict[str, int | str | bool] = {
        "TILE_M": tiles.m,
        "TILE_N": tiles.n,
        **blocks,
        "HEAD_DIM": head_dim,
        "PADDED_DIM": max(16, 1 << (head_dim - 1).bit_length()),
        "ALIGN": elements if head_dim % elements == 0 else 1,
        "RAGGED_K": key_length % tiles.n != 0,
        # float32 operands mean that the caller wants float32 results: no TF32.
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }
    # Triton means to turn fused multiply-add off by default; the softmax is written for it.
    options: dict[str, int | bool] = {
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        "enable_fp_fusion": True,
    }
    if tiles.registers is not None:
        options["maxnreg"] = tiles.registers
    return LaunchConfig(constexprs, options, tiles)


def grid(pattern: BlockPattern | ZonePattern, config: LaunchConfig, batch: int) -> tuple[int, int]:
    """Programs: tiles of queries by (batch, head)."""
    return -(-pattern.query_length // config.settings.m), batch * pattern.heads


def aligned(tensor: Tensor, config: LaunchConfig) -> Tensor:
    """`tensor` (B, H, S, D) itself if the kernel can read it, else a contiguous copy.

    Readable is unit stride along D and, where D allows it, pointer and strides aligned to 16 bytes:
    permuted views of (B, S, H, D) are. TMA also takes no tensor that repeats itself.
    """
    align = config.constexprs["ALIGN"]
    assert isinstance(align, int)
    strides_fit = tensor.stride(3) == 1 and all(
        stride % align == 0 and (stride > 0 or not config.descriptors)
        for stride in tensor.stride()[:3]
    )
    if strides_fit and (tensor.data_ptr() % ALIGNMENT == 0):
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def stride_arguments(config: LaunchConfig, **tensors: Tensor) -> dict[str, int]:
    """Stride arguments by name, for tensors (B, H, S, D) by the letter that the kernel calls them.

    They count units of ALIGN elements: see `head_rows`.
    """
    align = config.constexprs["ALIGN"]
    assert isinstance(align, int)
    return {
        f"stride_{letter}{axis}": tensor.stride(number) // align
        for letter, tensor in tensors.items()
        for number, axis in enumerate("bhs")
    }


def call_arguments(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, scale: float | None, config: LaunchConfig
) -> tuple[Tensor, dict[str, Any]]:
    """Return the queries to pass (other ones if scale <= 0), strides and scale by name."""
    q, scale = positive_scale(q, scale)
    strides = stride_arguments(config, q=q, k=k, v=v, o=o)
    return q, {**strides, "scale_log2": scale * math.log2(math.e)}


def padding_arguments(padding: KeyPadding | None) -> dict[str, Any]:
    """Return what a mask says of the keys, by name; one that all samples share has strides of 0."""
    if padding is None:
        return {}
    each = int(len(padding.bias) > 1)
    return {
        "bias_ptr": padding.bias,
        "bounds_ptr": padding.bounds,
        "bias_stride": each * padding.bias.stride(0),
        "bounds_stride": each * padding.bounds.stride(0),
        "PADDED": True,
        "PADDED_ROWS": padding.rows,
    }


def key_sources(k: Tensor, v: Tensor, config: LaunchConfig) -> tuple[Any, Any]:
    """What a kernel loads keys and values from: `aligned` tensors, or TMA descriptors of them."""
    if not config.descriptors:
        return k, v
    from triton.tools.tensor_descriptor import TensorDescriptor

    tile = [1, 1, config.settings.n, config.constexprs["PADDED_DIM"]]
    return tuple(TensorDescriptor(x, list(x.shape), list(x.stride()), tile) for x in (k, v))


def positive_scale(q: Tensor, scale: float | None) -> tuple[Tensor, float]:
    """Return queries (other ones if scale <= 0) and a positive scale with the same scores.

    The kernels scale the row maximum instead of every score, which asks for a positive scale.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (q * 0, 1.0)


def on_device(q: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the GPU of `q` current: Triton launches on the current one."""
    if q.device.type != "cuda" or q.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(q.device)


class DeviceKernel:
    """What table and baked kernels have in common: pattern, configuration, device.

    Args:
        request: what to serve; on a CPU, under the Triton interpreter.
        settings: tiles to use instead of the architecture's own.
    """

    reason: str | None = None

    def __init__(self, request: KernelRequest[Any], settings: TileSettings | None = None) -> None:
        self.request = request
        self.pattern = request.pattern
        self.arch = architecture(request.device)
        self.config = launch_config(
            request.pattern,
            arch=self.arch,
            dtype=request.dtype,
            head_dim=request.head_dim,
            settings=settings,
            softmax=request.softmax,
        )

    def flag(self) -> Tensor | None:
        """A flag for one call whose softmax has a fixed shift, else None.

        One a call: calls on other streams have theirs, and a graph replays its zero.
        """
        if self.config.softmax != "fixed":
            return None
        return torch.zeros(1, dtype=torch.int32, device=self.request.device)
