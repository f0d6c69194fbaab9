"""Which kernel serves a pattern: chosen here, by capability, and nowhere else.

| device | dtype | lowering | kernel |
|---|---|---|---|
| any | any float | reference | `ReferenceAttention` |
| CPU | any float | any other | `NativeCpuAttention` (C++) |
| CUDA, sm_80 and newer | float32, bfloat16, float16 | table | `TableAttention` (Triton) |
| CUDA, sm_80 and newer | float32, bfloat16, float16 | baked | `BakedAttention` (Triton) |
| CUDA, sm_90, unless `hopper=False` | bfloat16, float16 | table | `HopperAttention` (Gluon) |
| CUDA, sm_90, unless `hopper=False` | bfloat16, float16 | baked | `BakedAttention` (Gluon) |
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.cpu.attention import NativeCpuAttention
from calibatt_compiler.kernels.hopper.capability import hopper_serves
from calibatt_compiler.kernels.hopper.fallback import WithFallback
from calibatt_compiler.kernels.portable.tiles import HOPPER, architecture
from calibatt_compiler.kernels.protocol import AttentionKernel
from calibatt_compiler.kernels.reference.attention import ReferenceAttention
from calibatt_compiler.options import Lowering, Softmax
from calibatt_compiler.plan.pattern import BlockPattern

if TYPE_CHECKING:
    from calibatt_compiler.kernels.baked.attention import BakedAttention
    from calibatt_compiler.kernels.portable.attention import TableAttention

CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make_attention(
    pattern: BlockPattern,
    *,
    lowering: Lowering,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    hopper: bool = True,
    softmax: Softmax = "auto",
) -> AttentionKernel:
    """Return the kernel that serves a pattern.

    Args:
        pattern: which blocks are kept.
        lowering: "baked", "table" or "reference"; on a CPU the first two mean the same.
        device: of the operands.
        dtype: of the operands.
        head_dim: of the operands.
        hopper: take the kernel for Hopper GPUs where it serves; where not, on such a GPU, `reason`
            says why.
        softmax: as in `CompileOptions`.

    Raises:
        KernelError: there is no kernel for this device, dtype and head dim.
    """
    if not dtype.is_floating_point:
        raise KernelError(
            "attention needs a floating-point dtype",
            expected="float64, float32, bfloat16 or float16",
            got=dtype,
            remedy="cast the model",
        )
    if lowering == "reference":
        return ReferenceAttention(pattern)
    if device.type == "cpu":
        return NativeCpuAttention(pattern, dtype=dtype, head_dim=head_dim)
    if device.type == "cuda":
        softmax = softmax_for(pattern, softmax)
        serve = _hopper_kernel if hopper and architecture(device) == HOPPER else _cuda_kernel
        return serve(pattern, lowering, device, dtype, head_dim, softmax)
    raise KernelError(
        "there is no block-sparse kernel for this device",
        expected="cpu or cuda",
        got=device.type,
        remedy="use the option lowering='reference', which runs everywhere, slowly",
    )


def _cuda_kernel(
    pattern: BlockPattern,
    lowering: Lowering,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    softmax: Softmax,
) -> BakedAttention | TableAttention:
    if not triton_serves(device, dtype):
        raise KernelError(
            "the Triton kernels don't serve this GPU or dtype",
            expected="an NVIDIA GPU of compute capability 8.0 (Ampere) or newer; float32, bfloat16 "
            "or float16",
            got=f"{torch.cuda.get_device_name(device)}, {dtype}",
            remedy="use the option lowering='reference'",
        )
    where: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "head_dim": head_dim,
        "softmax": softmax,
    }
    if lowering == "table":
        from calibatt_compiler.kernels.portable.attention import TableAttention

        return TableAttention(pattern, **where)
    from calibatt_compiler.kernels.baked.attention import BakedAttention

    return BakedAttention(pattern, **where)


def _hopper_kernel(
    pattern: BlockPattern,
    lowering: Lowering,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    softmax: Softmax,
) -> AttentionKernel:
    """The Hopper kernel, or a portable one that says why."""
    where: dict[str, Any] = {"device": device, "dtype": dtype, "head_dim": head_dim}
    reason = hopper_serves(device, dtype, head_dim, pattern)
    if reason is not None:
        portable = _cuda_kernel(pattern, lowering, **where, softmax=softmax)
        portable.reason = portable.reason or f"no Hopper kernel: {reason}"
        return portable
    kernel: AttentionKernel
    if lowering == "table":
        from calibatt_compiler.kernels.hopper.attention import HopperAttention

        kernel = HopperAttention(pattern, **where, softmax=softmax)
    else:
        from calibatt_compiler.kernels.baked.attention import BakedAttention

        kernel = BakedAttention(pattern, **where, hopper=True, softmax=softmax)
    return WithFallback(kernel, lambda: _cuda_kernel(pattern, lowering, **where, softmax=softmax))


FIXED_FROM = 8192
"""Keys from which on a fixed softmax reference is asked for. On short sequences the launch of its
repair (61 microseconds of the host, measured beside an H100) outweighs what it saves."""


def softmax_for(pattern: BlockPattern, softmax: Softmax) -> Softmax:
    """The softmax to ask a kernel for: short sequences take the exact one."""
    return "exact" if pattern.key_length < FIXED_FROM else softmax


def triton_serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the portable Triton kernels serve a device and a dtype."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and dtype in CUDA_DTYPES
    )
