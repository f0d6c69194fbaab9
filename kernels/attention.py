"""Block-sparse attention: the kernel that serves a pattern."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.cpu.attention import NativeCpuAttention
from calibatt_compiler.kernels.dispatch import Choice, DeviceFacts, choose
from calibatt_compiler.kernels.protocol import AttentionKernel
from calibatt_compiler.kernels.reference.attention import ReferenceAttention
from calibatt_compiler.kernels.request import KernelRequest
from calibatt_compiler.kernels.tiered import Tier, TieredKernel
from calibatt_compiler.plan.pattern import BlockPattern

if TYPE_CHECKING:
    from calibatt_compiler.kernels.hopper.attention import HopperAttention
    from calibatt_compiler.kernels.hopper.padded import HopperTails
    from calibatt_compiler.kernels.portable.attention import TableAttention


def make_attention(
    request: KernelRequest[BlockPattern], choice: Choice | None = None
) -> AttentionKernel:
    """Return the kernel that serves a request.

    Args:
        request: what to serve.
        choice: which kernel, other than stock dense attention; default: what `choose` says.

    Raises:
        KernelError: there is no kernel for this device, dtype and head dim.
    """
    if choice is None:
        choice = choose(replace(request, dense=False), DeviceFacts.of(request.device))
    if choice.kernel == "reference":
        return ReferenceAttention(request.pattern)
    if choice.kernel == "native-cpu":
        return NativeCpuAttention(request.pattern, dtype=request.dtype, head_dim=request.head_dim)
    asked = replace(request, softmax=choice.softmax)
    if choice.target == "portable":
        return _on_gpu(asked, choice)
    return TieredKernel(
        [
            Tier(partial(_on_gpu, asked, choice), "no Hopper kernel: "),
            Tier(partial(make_attention, replace(request, hopper=False))),
        ]
    )


def _on_gpu(request: KernelRequest[BlockPattern], choice: Choice) -> AttentionKernel:
    """The kernel that was chosen for a GPU."""
    if choice.generated:
        from calibatt_compiler.kernels.baked.attention import baked_attention

        return baked_attention(request, choice.target, reason=choice.reason)
    kernel: HopperAttention | HopperTails | TableAttention
    if choice.target == "hopper" and request.padded:
        from calibatt_compiler.kernels.hopper.padded import HopperTails

        kernel = HopperTails(request)
    elif choice.target == "hopper":
        from calibatt_compiler.kernels.hopper.attention import HopperAttention

        kernel = HopperAttention(request)
    else:
        from calibatt_compiler.kernels.portable.attention import TableAttention

        kernel = TableAttention(request)
    kernel.reason = choice.reason
    return kernel


def attention_like(pattern: BlockPattern, q: Tensor, *, padded: bool = False) -> AttentionKernel:
    """Return what serves a pattern by tables for operands such as `q`.

    The reference where there is no such kernel, for instance for float64 on a GPU. If `padded`, its
    calls have a mask over keys.
    """
    device, dtype = q.device, q.dtype
    request = KernelRequest(
        pattern,
        device=device,
        dtype=dtype,
        head_dim=q.shape[3],
        lowering="table",
        padded="any" if padded else "",
    )
    try:
        choice = choose(request, DeviceFacts.of(device))
    except KernelError:
        choice = Choice("reference")
    return make_attention(request, choice)
