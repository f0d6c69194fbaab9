"""Compares the timesteps that come with the plan's steps, to notice another sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

from calibatt_compiler.logs import logger
from calibatt_compiler.plan import Plan
from calibatt_compiler.plan.plan import TIMESTEP_TOLERANCE

log = logger("kernels")

LISTED = 64
"""Most timesteps that are listed."""

Side = Literal["within", "before", "after"]


class SamplerWatch:
    """Remembers the timesteps that a compiled graph was given.

    Args:
        plan: whose steps they should be.
        say: receives, in words, that one is none of them.

    Attributes:
        strange: those that are no step of the plan, beyond what bfloat16 rounds away.
    """

    def __init__(self, plan: Plan, say: Callable[[str], None] = log.warning) -> None:
        self._plan = plan
        self._say = say
        self._seen: dict[float, Side] = {}
        self.strange: list[float] = []

    def see(self, timestep: float) -> None:
        """Record a finite timestep; warn of the first that is no step of the plan."""
        if timestep in self._seen:
            return
        self._seen[timestep] = self._side(timestep)
        nearest = min(abs(timestep - step) for step in self._plan.timesteps)
        if nearest > abs(timestep) * TIMESTEP_TOLERANCE:
            self.strange.append(timestep)
            if len(self.strange) == 1:
                self._say(str(self.note()))

    def fits(self, timestep: float) -> bool:
        """Whether a timestep that was seen may be served by the plan's nearest step.

        Beyond its first and last step a plan serves half a step more. But the timesteps of another
        transformer of the pipeline begin there, too (Wan 2.2): so those that come after the plan's
        last step are served only if some within its range came, those before its first one only
        if none came from farther out.
        """
        if self.overlaps:
            return True
        far = any(self._plan.step_of(seen) is None for seen in self._seen)
        return self._seen[timestep] == "before" and not far

    @property
    def overlaps(self) -> bool:
        """Whether a timestep within the plan's range was seen."""
        return "within" in self._seen.values()

    def note(self) -> str | None:
        """Return what was seen beside what the plan has, in words; None if all are its steps."""
        if not self.strange:
            return None
        return (
            f"the sampler's timesteps are not the plan's: {len(self.strange)} of "
            f"{len(self._seen)} seen are none of its {self._plan.steps} steps; "
            f"seen {listed(self._seen)}; the plan's {listed(self._plan.timesteps)}"
        )

    def range(self) -> str:
        """Return the plan's timesteps, first and last, in words."""
        first, last = self._plan.timesteps[0], self._plan.timesteps[-1]
        return f"timesteps from {first:g} to {last:g}"

    def seen(self) -> str:
        """Return the timesteps that were seen, in words."""
        return f"timesteps {listed(self._seen)}"

    def _side(self, timestep: float) -> Side:
        first, last = self._plan.timesteps[0], self._plan.timesteps[-1]
        margin = abs(timestep) * TIMESTEP_TOLERANCE
        if min(first, last) - margin <= timestep <= max(first, last) + margin:
            return "within"
        return "before" if (timestep > first) == (first >= last) else "after"


def listed(timesteps: Iterable[float]) -> str:
    """Return timesteps with commas between them, those in the middle left out if they are many."""
    texts = [f"{timestep:g}" for timestep in timesteps]
    if len(texts) > LISTED:
        texts[LISTED // 2 : -LISTED // 2] = [f"... {len(texts) - LISTED} more ..."]
    return ", ".join(texts)
