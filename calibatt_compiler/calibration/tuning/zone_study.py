"""Which densities of zones a search tries: one number, so no sampler is needed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibatt_compiler.calibration.tuning.pareto import Point, StepTime, ZonePoint
from calibatt_compiler.calibration.tuning.study import Study, inside

RESOLUTION = 0.02
"""Densities closer than this, relative to them, need not be told apart to decide a goal."""

_LEAST_GAP = RESOLUTION / 4
"""Nor are any tried that are closer."""


@dataclass(frozen=True)
class DensitySearch:
    """Says which density comes next, by the finished trials alone.

    The first trial is where it is configured. With a goal the next ones close in on the density
    that decides it: for a speed-up the one that the measured times predict, for a fidelity by
    bisection, taking fidelity to rise with density. All others fill the range evenly by logarithm:
    each is as far from those before as can be.

    Attributes:
        space: least and largest density.
        start: of the first trial, moved into the space.
        times: of a step; the two plans measured are those of the ends of the space.
        speed_up: goal, or None.
        fidelity: goal, or None.
    """

    space: tuple[float, float]
    start: float
    times: StepTime
    speed_up: float | None = None
    fidelity: float | None = None

    def next(self, points: Sequence[Point]) -> float | None:
        """Return the density to try after these; None if all that differ were tried."""
        if not points:
            return inside(self.start, self.space)
        tried = sorted(_density(point) for point in points)
        wanted = self._wanted(points)
        if wanted is not None and _distance(wanted, tried) > _LEAST_GAP:
            return wanted
        low, high = self.space
        middles = [self._rounded(math.sqrt(a * b)) for a, b in itertools.pairwise(tried)]
        found = max([low, *middles, high], key=lambda at: _distance(at, tried))
        return found if _distance(found, tried) > _LEAST_GAP else None

    def _wanted(self, points: Sequence[Point]) -> float | None:
        """Return the density that tells most of the goal; None if it is decided, or none is set."""
        if self.speed_up is not None:
            return self._fast_enough(points, self.times.cost(self.speed_up))
        if self.fidelity is not None:
            return self._good_enough(points, self.fidelity)
        return None

    def _fast_enough(self, points: Sequence[Point], most: float | None) -> float | None:
        """Return the largest density whose cost is predicted to be `most`, or a little less."""
        if most is None:
            return None
        # Costs rise with density, in a line where text is kept whole.
        known = dict(zip(self.space, self.times.costs, strict=True))
        known |= {_density(point): point.cost for point in points}
        below = max((at for at, cost in known.items() if cost <= most), default=None)
        if below is None:
            return None  # no plan of the space is so fast
        slow = min((at for at, cost in known.items() if at > below), default=None)
        aim = most * (1 - RESOLUTION / 2)
        if slow is None or known[below] >= aim:
            return below
        share = (aim - known[below]) / (known[slow] - known[below])
        return self._rounded(below + share * (slow - below))

    def _good_enough(self, points: Sequence[Point], least: float) -> float | None:
        """Return a density between the sparsest trial that is so faithful and the one below it."""
        low, high = self.space
        good = min((_density(p) for p in points if p.fidelity >= least), default=None)
        tried = [_density(point) for point in points]
        poor = max((at for at in tried if good is None or at < good), default=None)
        if good is None and poor is not None and math.log(high / poor) <= RESOLUTION:
            return high
        first, last = low if poor is None else poor, high if good is None else good
        if math.log(last / first) <= RESOLUTION:
            return None
        return self._rounded(math.sqrt(first * last))

    def _rounded(self, density: float) -> float:
        return inside(float(f"{density:.4g}"), self.space)


def _density(point: Point) -> float:
    assert isinstance(point.settings, ZonePoint)
    return point.settings.density


def _distance(density: float, others: Sequence[float]) -> float:
    return min(abs(math.log(density / other)) for other in others)


class ZoneStudy(Study):
    """A study of the density of zones.

    Args:
        path: see `Study`.
        search: says what is tried.

    Raises:
        OptionError: Optuna is not installed.
    """

    kind = ZonePoint

    def __init__(self, path: Path, search: DensitySearch) -> None:
        super().__init__(path)
        self._search = search
        # Everything is enqueued; the default for two objectives would prepare a population.
        self._study.sampler = self._optuna.samplers.RandomSampler(seed=0)

    def _ask(self) -> Any:
        density = self._search.next(self.points())
        if density is None:
            return None
        self._study.enqueue_trial({"density": density})
        trial = self._study.ask()
        while self._suggested(trial).density != density:
            # A killed search left it waiting, and went for another goal.
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
            trial = self._study.ask()
        return trial

    def _suggested(self, trial: Any) -> ZonePoint:
        return ZonePoint(trial.suggest_float("density", *self._search.space, log=True))
