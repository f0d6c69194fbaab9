"""The energy threshold eps(t): how much attention mass a step must keep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Thresholds:
    """Numbers of `eps(t) = A + (C - A) * exp(-k * t / T)`; names: see arXiv 2603.05503.

    Attributes:
        A: share of attention mass to keep at late steps.
        C: share to keep at the first, noisiest step.
        k: how fast the threshold falls from C to A.
    """

    A: float
    C: float
    k: float

    @classmethod
    def recorded(cls, figures: Mapping[str, float]) -> Thresholds | None:
        """Return those of `PlanMetadata.thresholds`; None of a plan that was made from masks."""
        if not {"A", "C", "k"} <= set(figures):
            return None
        return cls(figures["A"], figures["C"], figures["k"])

    def at(self, step: int, steps: int) -> float:
        """Return eps at `step` (0 is the noisiest) of `steps`."""
        return self.A + (self.C - self.A) * math.exp(-self.k * step / steps)


MANY_STEPS = Thresholds(A=0.84, C=0.99, k=16.0)
"""The paper's for Wan with 50 steps."""

FEW_STEPS = Thresholds(A=0.763, C=0.863, k=5.64)
"""The paper's for distilled models of 4 steps: no near-dense first step."""

FEW = 8
"""Up to this many steps `FEW_STEPS` is the default; between 4 and 50 the paper gives none.

The formula reads its curve at t / T, so a sampler of 8 steps has the thresholds of one of 4 at
every other step, and none above C = 0.863: no step is near dense.
"""


def default_thresholds(steps: int) -> Thresholds:
    """Return the paper's thresholds for a sampler of `steps` steps."""
    return FEW_STEPS if steps <= FEW else MANY_STEPS
