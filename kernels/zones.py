"""Attention by octave zones: the kernel that serves a step group of a site."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from calibatt_compiler.kernels.common.zone_step import ZoneKernel
from calibatt_compiler.kernels.cpu.zones import CpuZones
from calibatt_compiler.kernels.dispatch import Choice, DeviceFacts, choose
from calibatt_compiler.kernels.reference.zones import ReferenceZones
from calibatt_compiler.kernels.request import KernelRequest
from calibatt_compiler.kernels.tiered import Tier, TieredZones
from calibatt_compiler.plan.zones import ZonePattern

if TYPE_CHECKING:
    from calibatt_compiler.kernels.hopper.zones import HopperZones
    from calibatt_compiler.kernels.portable.zones import ZoneAttention


def make_zones(request: KernelRequest[ZonePattern], choice: Choice | None = None) -> ZoneKernel:
    """Return the kernel that serves zones, at every step of their group.

    Args:
        request: what to serve.
        choice: which kernel; default: what `choose` says.

    Raises:
        KernelError: there is no kernel for this device, dtype and head dim, or the pattern has too
            many blocks.
    """
    if choice is None:
        choice = choose(request, DeviceFacts.of(request.device))
    if choice.kernel == "reference":
        return ReferenceZones(request.pattern)
    if choice.kernel == "native-cpu-zones":
        return CpuZones(request.pattern, dtype=request.dtype, head_dim=request.head_dim)
    asked = replace(request, softmax=choice.softmax)
    if choice.target == "portable":
        return _on_gpu(asked, choice)
    return TieredZones(
        [
            Tier(partial(_on_gpu, asked, choice), "no Hopper kernel: "),
            Tier(partial(make_zones, replace(request, hopper=False))),
        ]
    )


def _on_gpu(request: KernelRequest[ZonePattern], choice: Choice) -> ZoneKernel:
    """The kernel that was chosen for a GPU."""
    if choice.generated:
        from calibatt_compiler.kernels.baked.zones import baked_zones

        return baked_zones(request, choice.target, reason=choice.reason)
    kernel: HopperZones | ZoneAttention
    if choice.target == "hopper":
        from calibatt_compiler.kernels.hopper.zones import HopperZones

        kernel = HopperZones(request)
    else:
        from calibatt_compiler.kernels.portable.zones import ZoneAttention

        kernel = ZoneAttention(request)
    kernel.reason = choice.reason
    return kernel
