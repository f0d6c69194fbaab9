"""What monitored calls keep of their attention mass, beside what the plan was to keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from calibatt_compiler.plan import Plan
from calibatt_compiler.plan.thresholds import Thresholds
from calibatt_compiler.runtime.monitor import KeptMassMonitor

MARGIN = 0.05
"""A site has drifted if it keeps less than it was calibrated to by more than this share of mass;
wider than in validation, for few calls are looked at."""


@dataclass(frozen=True)
class Drift:
    """One site, over the calls that were looked at.

    Attributes:
        samples: how many these were.
        kept: mean share of attention mass in the kept blocks.
        calibrated: mean over the same calls of the share that their step was calibrated to keep,
            eps(t) and what it was raised by; None if the plan records no thresholds.
    """

    samples: int
    kept: float
    calibrated: float | None

    @property
    def drifted(self) -> bool:
        """Whether less is kept than should be."""
        return self.calibrated is not None and self.calibrated - self.kept > MARGIN

    @classmethod
    def of(cls, plan: Plan, site: str, monitor: KeptMassMonitor | None) -> Drift | None:
        """Return what a monitor has found so far, or None if no call was looked at."""
        samples = 0 if monitor is None else monitor.samples.total()
        if monitor is None or not samples:
            return None
        kept = _mean(monitor.kept(), monitor.samples)
        recorded = plan.metadata.thresholds
        thresholds = Thresholds.recorded(recorded)
        if thresholds is None:
            return cls(samples, kept, None)
        raised = recorded.get(f"raised:{site}", 0.0)
        wanted = {
            step: min(1.0, thresholds.at(step, plan.steps) + raised) for step in monitor.samples
        }
        return cls(samples, kept, _mean(wanted, monitor.samples))


def _mean(values: Mapping[int, float], counts: Mapping[int, int]) -> float:
    return sum(values[step] * n for step, n in counts.items()) / sum(counts.values())
