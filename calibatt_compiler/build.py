"""A plan's kernels, compiled ahead of their first use."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from calibatt_compiler.errors import PlanError
from calibatt_compiler.kernels.compiler import BuildReport, KernelSpec, shared_compiler
from calibatt_compiler.plan import Plan


def specs_of(
    plan: Plan, archs: Sequence[int], dtype: torch.dtype, head_dim: int | None = None
) -> list[KernelSpec]:
    """Return what a plan needs compiled: each distinct pattern once for each GPU generation.

    Patterns that keep every block are left out: the stock dense kernel serves them.

    Args:
        plan: the plan.
        archs: compute capabilities, each as one number, such as 90.
        dtype: of the model.
        head_dim: channels a head, for sites of which the plan does not record it.

    Raises:
        PlanError: the plan does not record the channels of a head, and none were given.
    """
    specs: dict[tuple[object, ...], KernelSpec] = {}
    for name, site in plan.sites.items():
        channels = site.head_dim or head_dim
        if channels is None:
            raise PlanError(
                f"the plan does not say how many channels a head of {name} has",
                expected="a plan from `calibatt calibrate`, or --head-dim",
                got="a plan made from masks",
                remedy="give --head-dim, such as 128 for Wan",
            )
        for pattern in site.patterns:
            if pattern.density == 1.0:
                continue
            for arch in archs:
                spec = KernelSpec(pattern, dtype, channels, arch)
                specs[spec.key] = spec
    return list(specs.values())


def build_for_device(
    specs: Sequence[KernelSpec], on_progress: Callable[[int, int], object] | None = None
) -> BuildReport:
    """Compile kernels with the compiler that this process's models wait for."""
    return shared_compiler().build(specs, on_progress)


def arch_of(device: torch.device) -> int:
    """Return the compute capability of a CUDA device as one number."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
