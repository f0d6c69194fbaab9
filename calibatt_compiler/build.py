"""A plan's kernels, compiled ahead of their first use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence

import torch

from calibatt_compiler.errors import KernelError, PlanError
from calibatt_compiler.kernels.baked.compiler import BuildReport, KernelSpec, shared_compiler
from calibatt_compiler.kernels.dispatch import Choice, DeviceFacts, choose
from calibatt_compiler.kernels.request import AnyPattern, KernelRequest, KernelSettings
from calibatt_compiler.plan import BlockPattern, Plan, SitePatterns
from calibatt_compiler.plan.zones import ZonePattern


class PlanSpecs(Collection[KernelSpec]):
    """What a plan needs compiled: each distinct pattern, and each distinct step
    group of zones, once for each GPU generation.

    Iterating decodes one pattern after the other, so that the patterns of a large plan are never
    in memory together. Those that keep every block are left out, for the stock dense kernel serves
    them; so are all others that have no generated kernel.

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
        found: dict[tuple[str, int, int], tuple[SitePatterns, int, Choice]] = {}
        self._steps: Counter[tuple[str, int, int] | str] = Counter()
        for name, site in plan.sites.items():
            channels = site.head_dim or head_dim
            if channels is None:
                raise PlanError(
                    f"the plan does not say how many channels a head of {name} has",
                    expected="a plan from `calibatt calibrate`, or --head-dim",
                    got="a plan made from masks",
                    remedy="give --head-dim, such as 128 for Wan",
                )
            settings = KernelSettings(
                device=torch.device("cuda"), dtype=dtype, head_dim=channels, hopper=hopper
            )
            held = site.steps if site.zones is None else site.zones.groups
            for step, index in enumerate(held):
                request: KernelRequest[AnyPattern]
                if site.zones is None:
                    request = settings.request(site.outline(step), dense=True)
                else:
                    request = settings.request(site.zones.zones[index])
                for arch in archs:
                    try:
                        choice = choose(request, DeviceFacts("cuda", arch))
                    except KernelError:
                        # The site runs dense, and the summary says why.
                        self._steps["dense"] += 1
                        continue
                    if choice.generated:
                        key = (site.digests[index], channels, arch)
                        found.setdefault(key, (site, index, choice))
                        self._steps[key] += 1
                    else:
                        self._steps["dense" if choice.kernel == "sdpa" else "table"] += 1
        self._found = found

    def __len__(self) -> int:
        return len(self._found)

    def __iter__(self) -> Iterator[KernelSpec]:
        for (_, channels, arch), (site, index, choice) in self._found.items():
            pattern = site.patterns[index] if site.zones is None else site.zones.group(index)
            yield self._spec(pattern, channels, arch, choice)

    def __contains__(self, spec: object) -> bool:
        if not isinstance(spec, KernelSpec):
            return False
        found = self._found.get((spec.pattern.digest, spec.head_dim, spec.arch))
        if found is None:
            return False
        return self._spec(spec.pattern, spec.head_dim, spec.arch, found[2]).key == spec.key

    def count_steps(self, report: BuildReport) -> dict[str, int]:
        """Return what serves how many steps, over all sites and GPU generations.

        Args:
            report: of the build of these.

        Returns:
            `generated`: steps whose kernel is compiled; `table`: those that tables serve, for they
            have no generated kernel or it is not ready; `dense`: those that stock attention serves.
        """
        found = dict.fromkeys(("generated", "table", "dense"), 0)
        for key, steps in self._steps.items():
            if isinstance(key, str):
                found[key] += steps
            else:
                found["generated" if key in report.ready else "table"] += steps
        return found

    def _spec(
        self, pattern: BlockPattern | ZonePattern, head_dim: int, arch: int, choice: Choice
    ) -> KernelSpec:
        target, softmax = choice.target, choice.softmax
        return KernelSpec(pattern, self._dtype, head_dim, arch, target=target, softmax=softmax)


def build_for_device(
    specs: Collection[KernelSpec], on_progress: Callable[[int, int], object] | None = None
) -> BuildReport:
    """Compile kernels with the compiler that this process's models wait for."""
    return shared_compiler().build(specs, on_progress)
