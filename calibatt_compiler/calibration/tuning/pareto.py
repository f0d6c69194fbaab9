"""What a search found: points, their Pareto front, and the one that is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from calibatt_compiler.calibration.config import SelectionConfig
from calibatt_compiler.errors import OptionError
from calibatt_compiler.plan import Plan

CEILING = 100.0
"""PSNR in dB that equal videos count as: a search can't rank infinities."""


@dataclass(frozen=True)
class SearchPoint:
    """What is searched of a `SelectionConfig` of masks."""

    A: float
    C: float
    k: float
    rho: float
    pooled: int = 0
    gamma: float | None = None

    def selection(self, others: SelectionConfig) -> SelectionConfig:
        """Return the selection of a plan; what is not searched is that of `others`."""
        return SelectionConfig.of(others, **asdict(self))

    def shown(self) -> dict[str, str]:
        """Return the values as they are shown, by name."""
        return {
            "A": f"{self.A:.3f}",
            "C": f"{self.C:.3f}",
            "k": f"{self.k:.2f}",
            "rho": f"{self.rho:.2f}",
            "pooled": str(self.pooled),
            "gamma": "" if self.gamma is None else f"{self.gamma:.2f}",
        }


@dataclass(frozen=True)
class ZonePoint:
    """What is searched of zones: the density asked for, which `calibrate` takes."""

    density: float

    def shown(self) -> dict[str, str]:
        """Return the values as they are shown, by name."""
        return {"asked": f"{self.density:.4g}"}


Settings = SearchPoint | ZonePoint
"""What a trial tries."""


@dataclass(frozen=True)
class Point:
    """One trial.

    Attributes:
        settings: of the plan; which class they are of says which form it has.
        fidelity: mean PSNR against the dense videos in dB, at most `CEILING`; by proxy, the mean
            share of attention mass kept.
        cost: share of the attention that is computed, pooled keys included; what the search keeps
            small.
        density: of the plan, text included.
        digest: of the plan.
    """

    settings: Settings
    fidelity: float
    cost: float
    density: float
    digest: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON, in which settings have always been called knobs."""
        found = asdict(self)
        return {"knobs": found.pop("settings"), **found}


@dataclass(frozen=True)
class StepTime:
    """Predicted seconds of a denoising step: a straight line through two measured plans.

    A step is what is not attention, which no plan changes, and attention, whose kernel takes time
    in proportion to the blocks it computes: seconds = fixed + slope * cost. Both are taken from
    two plans at the ends of the search, so within it the line only interpolates.

    Attributes:
        dense: measured, all attention dense by the stock kernel.
        costs: share of the attention that the two measured plans compute.
        seconds: of a step under each.
    """

    dense: float
    costs: tuple[float, float]
    seconds: tuple[float, float]

    def at(self, cost: float) -> float:
        """Return the predicted seconds of a step under a plan of this cost."""
        (low, high), (fast, slow) = self.costs, self.seconds
        if high - low < 1e-6:
            return (fast + slow) / 2
        return fast + (slow - fast) * (cost - low) / (high - low)

    def speed_up(self, cost: float) -> float:
        """Return dense time / predicted time of a step."""
        return self.dense / self.at(cost)

    def cost(self, speed_up: float) -> float | None:
        """Return the cost of this speed-up; None if costlier plans were not measured slower."""
        (low, high), (fast, slow) = self.costs, self.seconds
        if high - low < 1e-6 or slow <= fast:
            return None
        return low + (self.dense / speed_up - fast) * (high - low) / (slow - fast)


def cost_of(plan: Plan) -> float:
    """Share of dense attention that a plan computes: kept blocks, and pooled keys of the others.

    Kept blocks of a row-shared head are those of the rows that it computes.

    Pooled keys are counted for every block, as the kernels attend those of every block:
    `pooled / block`, the same for all patterns of a site.
    """
    first = [site.at(0) for site in plan.sites.values()]
    return plan.density() + sum(each.pooled / each.block_n for each in first) / len(first)


def front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other beats in both fidelity and cost, cheapest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.fidelity)):
        if not best or point.fidelity > best[-1].fidelity:
            best.append(point)
    return best


def choose(
    points: Sequence[Point],
    times: StepTime,
    *,
    speed_up: float | None = None,
    fidelity: float | None = None,
) -> Point | None:
    """Return the best point that reaches a goal, or None if none does or no goal is given.

    Args:
        points: all of them.
        times: predicts the time of each.
        speed_up: of those at least so fast, the one of highest fidelity.
        fidelity: of those at least so faithful, the fastest.

    Raises:
        OptionError: two goals.
    """
    if speed_up is not None and fidelity is not None:
        raise OptionError(
            "a search has one goal",
            expected="a speed-up to reach, or a fidelity",
            got="both",
            remedy="give one; the picture of the front shows the rest",
        )
    best = front(points)
    if speed_up is not None:
        fast = [point for point in best if times.speed_up(point.cost) >= speed_up]
        return max(fast, key=lambda point: point.fidelity, default=None)
    if fidelity is not None:
        good = [point for point in best if point.fidelity >= fidelity]
        return min(good, key=lambda point: times.at(point.cost), default=None)
    return None


@dataclass(frozen=True)
class Tuning:
    """What a search found.

    Attributes:
        points: all trials, in order.
        times: predicts the time of a step.
        proxy: whether fidelity is a share of mass instead of PSNR.
        chosen: the point that reaches the goal best; None if none does, or none was asked for.
        plan: of that point.
    """

    points: tuple[Point, ...]
    times: StepTime
    proxy: bool
    chosen: Point | None
    plan: Plan | None

    @property
    def front(self) -> list[Point]:
        """Points that no other beats in both fidelity and time, fastest first."""
        return front(self.points)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        best = self.front

        def about(point: Point) -> dict[str, Any]:
            return {
                **point.to_dict(),
                "step_seconds": self.times.at(point.cost),
                "speed_up": self.times.speed_up(point.cost),
                "on_front": point in best,
            }

        return {
            "schema": 1,
            "fidelity": "share of attention mass kept" if self.proxy else "PSNR, dB",
            "step_times": asdict(self.times),
            "trials": [about(point) for point in self.points],
            "chosen": None if self.chosen is None else about(self.chosen),
        }
