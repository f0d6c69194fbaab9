"""Zones of one site: in which groups, in which coordinates, in which runs, at a price."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from calibatt_compiler.calibration.select.zones import native
from calibatt_compiler.calibration.select.zones.lines import (
    Floats,
    Solved,
    absolute_lines,
    diagonal_lines,
    solve,
)
from calibatt_compiler.calibration.zone_target import BUDGET
from calibatt_compiler.errors import OptionError
from calibatt_compiler.plan.zones.groups import HeadGroups

GROUP_ROWS = (4, 16, 64, 256)
"""Rows a group that a head may have, beside all its rows."""

NUMBER_PRICE = 0.25
"""Kept blocks that a number is worth where the budget is not in the way."""

_RISE = 2.0**0.5
"""By what the price of a number rises until a site keeps its budget."""

_MOST = 1e12
"""At this price each head is one run of octave 0."""


@dataclass(frozen=True)
class SiteZones:
    """What was chosen for one site and step group.

    Attributes:
        heads: the groups of each head.
        kept: expected kept blocks.
        variance: expected, summed over rows; relative to a row's output.
        numbers: runs, and a lead a group.
        number: what a number was priced at.
    """

    heads: tuple[HeadGroups, ...]
    kept: float
    variance: float
    numbers: int
    number: float


class SiteFit:
    """Fits zones to one site and step group, at one price after another.

    Args:
        squares: float (heads, rows, columns), mean squared energies of blocks without text.
        budget: numbers that all heads together may have.
        number: kept blocks that a number is worth at least.
        group_rows: rows a group to choose from; all rows of a head can always be chosen.

    Attributes:
        rise: how many times the price of a number had to rise, the last time.

    Raises:
        OptionError: a budget below two numbers a head: a run and a lead.
    """

    def __init__(
        self,
        squares: npt.NDArray[np.floating],
        budget: int = BUDGET,
        number: float = NUMBER_PRICE,
        group_rows: tuple[int, ...] = GROUP_ROWS,
    ) -> None:
        self._heads, rows, _ = squares.shape
        if budget < 2 * self._heads:
            raise OptionError(
                "a site can't be described in so few numbers",
                expected=f"at least {2 * self._heads}, two for each of its {self._heads} heads",
                got=budget,
                remedy="allow more numbers a site",
            )
        self._budget, self._number, self.rise = budget, number, 0
        self._compiled = native.pays(squares.size)
        # Groups so small that a head of them would take a multiple of its share are left out.
        few = 2 * budget / self._heads
        sizes = {size for size in group_rows if size < rows and 2 * (rows / size) <= few}
        self._lines = {
            size: (absolute_lines(squares, size), diagonal_lines(squares, size))
            for size in sorted({*sizes, rows})
        }

    @property
    def bytes(self) -> int:
        """Memory of the sums that are held."""
        return sum(some.bytes for both in self._lines.values() for some in both)

    def at(self, price: float, rise: int = 0) -> SiteZones:
        """Return the cheapest zones within the budget.

        Args:
            price: variance that a kept block is worth.
            rise: where the search for the price of a number begins; the nearer the faster.
        """
        self.rise = rise
        found = self._priced(price, rise)
        while found.numbers > self._budget:
            # Numbers fall more slowly than their price rises, so this is no step too far.
            self.rise += max(1, round(2 * math.log2(found.numbers / self._budget)))
            found = self._priced(price, self.rise)
        while self.rise:
            cheaper = self._priced(price, self.rise - 1)
            if cheaper.numbers > self._budget:
                break
            self.rise -= 1
            found = cheaper
        return found

    def _priced(self, price: float, rise: int) -> SiteZones:
        number = min((self._number or NUMBER_PRICE) * _RISE**rise, _MOST) if rise else self._number
        chosen = [self._solved(size, price, number) for size in self._lines]
        costs = np.stack([some.costs for some in chosen])
        best = costs.argmin(0)
        heads = tuple(chosen[which].head(index) for index, which in enumerate(best))
        picked = [(chosen[which], index) for index, which in enumerate(best)]
        return SiteZones(
            heads,
            float(sum(some.kept[index] for some, index in picked)),
            float(sum(some.variance[index] for some, index in picked)),
            int(sum(some.numbers[index] for some, index in picked)),
            number,
        )

    def _solved(self, size: int, price: float, number: float) -> _Grouping:
        absolute, diagonal = self._lines[size]
        straight, slanted = (
            solve(lines, price, number, compiled=self._compiled) for lines in (absolute, diagonal)
        )
        sides = [some.cost(price, number) for some in (straight, slanted)]
        slants = (sides[1] < sides[0]) & (diagonal.leads >= 0)
        heads = self._heads

        def both(name: str) -> npt.NDArray[Any]:
            values: npt.NDArray[Any] = np.where(
                slants, getattr(slanted, name), getattr(straight, name)
            )
            return values.reshape(heads, -1)

        runs = both("runs")
        groups = runs.shape[1]
        return _Grouping(
            size,
            slants.reshape(heads, -1),
            np.where(slants, diagonal.leads, absolute.leads).reshape(heads, -1),
            straight,
            slanted,
            both("kept").sum(1),
            both("variance").sum(1),
            runs.sum(1) + groups,
            np.where(slants, sides[1], sides[0]).reshape(heads, -1).sum(1) + number * groups,
        )


@dataclass(frozen=True)
class _Grouping:
    """All heads in groups of one size; arrays (heads, groups) or (heads,)."""

    rows: int
    diagonal: npt.NDArray[np.bool_]
    leads: npt.NDArray[np.int64]
    straight: Solved
    slanted: Solved
    kept: Floats
    variance: Floats
    numbers: npt.NDArray[np.int64]
    costs: Floats

    def head(self, index: int) -> HeadGroups:
        groups = self.diagonal.shape[1]
        part = slice(index * groups, (index + 1) * groups)
        lines = self.slanted.octaves[part].copy()
        straight = ~self.diagonal[index]
        lines[straight, : self.straight.octaves.shape[1]] = self.straight.octaves[part][straight]
        return HeadGroups(self.rows, self.diagonal[index], self.leads[index], lines)
