"""A plan's kernels, compiled ahead of their first use."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch

from calibatt_compiler.errors import PlanError
from calibatt_compiler.kernels.attention import softmax_for
from calibatt_compiler.kernels.baked.cache import Target
from calibatt_compiler.kernels.baked.compiler import BuildReport, KernelSpec, shared_compiler
from calibatt_compiler.kernels.baked.cover import WIDENED
from calibatt_compiler.kernels.hopper.capability import operand_reason
from calibatt_compiler.kernels.portable.tiles import HOPPER
from calibatt_compiler.plan import BlockPattern, Plan, SitePatterns


class PlanSpecs(Collection[KernelSpec]):
    """What a plan needs compiled: each distinct pattern once for each GPU generation.

    Iterating decodes one pattern after the other, so that the patterns of a large plan are never
    in memory together. Those that keep every block are left out, for the stock dense kernel serves
    them; so are those with weights or pooled keys, which have no generated kernel.

    Args:
        plan: the plan.
        archs: compute capabilities, each as one number, such as 90.
        dtype: of the model.
        head_dim: channels a head, for sites of which the plan does not record it.
        hopper: for sm_90, the Hopper kernels; False: the portable ones, for `hopper=False`.

    Raises:
        PlanError: the plan does not record the channels of a head, and none were given.
    """

    def __init__(
        self,
        plan: Plan,
        archs: Sequence[int],
        dtype: torch.dtype,
        head_dim: int | None = None,
        *,
        hopper: bool = True,
    ) -> None:
        self._dtype = dtype
        self._hopper = hopper
        found: dict[tuple[str, int, int], tuple[SitePatterns, int]] = {}
        for name, site in plan.sites.items():
            channels = site.head_dim or head_dim
            if channels is None:
                raise PlanError(
                    f"the plan does not say how many channels a head of {name} has",
                    expected="a plan from `calibatt calibrate`, or --head-dim",
                    got="a plan made from masks",
                    remedy="give --head-dim, such as 128 for Wan",
                )
            if site.weighted or site.size.pooled:
                continue
            for step, index in enumerate(site.steps):
                if site.kept_at(step) == site.size.blocks and not site.repetitive_at(step):
                    continue
                for arch in archs:
                    found.setdefault((site.digests[index], channels, arch), (site, index))
        self._found = found

    def __len__(self) -> int:
        return len(self._found)

    def __iter__(self) -> Iterator[KernelSpec]:
        for (_, channels, arch), (site, index) in self._found.items():
            yield self._spec(site.patterns[index], channels, arch)

    def __contains__(self, spec: object) -> bool:
        if not isinstance(spec, KernelSpec):
            return False
        known = (spec.pattern.digest, spec.head_dim, spec.arch) in self._found
        return known and self._spec(spec.pattern, spec.head_dim, spec.arch).key == spec.key

    def _spec(self, pattern: BlockPattern, head_dim: int, arch: int) -> KernelSpec:
        served = operand_reason(self._dtype, head_dim, pattern) is None
        target: Target = "hopper" if self._hopper and arch == HOPPER and served else "portable"
        softmax = softmax_for(pattern, "auto")
        return KernelSpec(pattern, self._dtype, head_dim, arch, WIDENED, target, softmax)


def build_for_device(
    specs: Collection[KernelSpec], on_progress: Callable[[int, int], object] | None = None
) -> BuildReport:
    """Compile kernels with the compiler that this process's models wait for."""
    return shared_compiler().build(specs, on_progress)


def arch_of(device: torch.device) -> int:
    """Return the compute capability of a CUDA device as one number."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
