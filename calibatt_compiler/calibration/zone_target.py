"""The goal that a plan of zones is fitted to: density, predicted speed-up, error or price."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from calibatt_compiler.errors import OptionError

STEP_GROUPS = 5
"""Groups of steps that a plan of zones has: steps of one share runs, each draws its own sample."""


BUDGET = 2048
"""Numbers that a site may have at a step group: what a generated kernel holds."""

DENSITY = 0.25
"""Of a plan, if nothing else is asked for."""


@dataclass(frozen=True)
class ZoneTarget:
    """What a plan of zones is to be; exactly one of `density`, `speed_up`, `error` and `price`.

    Attributes:
        density: expected kept blocks / all blocks, in (0, 1].
        speed_up: predicted dense time / time of a step, at least 1. What is not attention takes
            the same time, attention as much less as the plan keeps fewer blocks.
        error: predicted root of the mean relative variance of a row's output, above 0.
        attention_share: share of a dense step's time that its sites take, in (0, 1]; needed for
            `speed_up`.
        price: relative variance that a kept block is worth, above 0, as plans of zones record it
            in their thresholds.

    Raises:
        OptionError: not exactly one, a value out of range, or a speed-up that no density gives.
    """

    density: float | None = None
    speed_up: float | None = None
    error: float | None = None
    attention_share: float | None = None
    price: float | None = None

    def __post_init__(self) -> None:
        names = ("density", "speed_up", "error", "price")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise _out_of_range("what a plan is to be", "density, speed_up, error or price", given)
        if self.density is not None and not 0 < self.density <= 1:
            raise _out_of_range("density", "a share of all blocks in (0, 1]", self.density)
        if self.error is not None and not (self.error > 0 and math.isfinite(self.error)):
            raise _out_of_range("error", "a relative error above 0", self.error)
        if self.price is not None and not (self.price > 0 and math.isfinite(self.price)):
            raise _out_of_range("price", "a number above 0, as a plan records it", self.price)
        if self.speed_up is not None:
            share = self.attention_share
            if share is None or not 0 < share <= 1:
                raise _out_of_range("attention_share", "a share of the time in (0, 1]", share)
            if not 1 <= self.speed_up < (math.inf if share == 1 else 1 / (1 - share)):
                most = "without end" if share == 1 else f"below {1 / (1 - share):.3g}"
                raise _out_of_range("speed_up", f"1 or more and {most}", self.speed_up)

    @property
    def wanted_density(self) -> float | None:
        """Density that is wanted; None if an error or a price is."""
        if self.speed_up is None:
            return self.density
        assert self.attention_share is not None
        return 1 - (1 - 1 / self.speed_up) / self.attention_share


@dataclass(frozen=True)
class ZoneSelection:
    """How zones are chosen from what a run has stored.

    Attributes:
        target: what the plan is to be.
        step_groups: groups of steps that share runs, where the run is one for masks.
        numbers: that a site may have at a step group.
    """

    target: ZoneTarget = field(default_factory=lambda: ZoneTarget(density=DENSITY))
    step_groups: int = STEP_GROUPS
    numbers: int = BUDGET


def _out_of_range(name: str, expected: object, got: object) -> OptionError:
    return OptionError(
        f"{name} of a plan of zones is out of range",
        expected=expected,
        got=got,
        remedy="ask for one density, speed-up or error that can be had",
    )
