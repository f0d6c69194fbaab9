"""One price for the whole plan: what a kept block is worth, so that the plan is as wanted."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt

from calibatt_compiler.calibration.select.zones import native
from calibatt_compiler.calibration.select.zones.fit import (
    GROUP_ROWS,
    NUMBER_PRICE,
    SiteFit,
    SiteZones,
)
from calibatt_compiler.calibration.zone_target import BUDGET, ZoneTarget

TOLERANCE = 0.003
"""How far the plan may be from what was wanted, relative to it."""

TRIES = 24

MEMORY = 1 << 32
"""Bytes of sums that are held from one price to the next; what does not fit is read again."""

THREADS = 8
"""Sites that are fitted at a time, at most: each has its squares in memory while it is read."""

Squares = npt.NDArray[np.floating]


@dataclass(frozen=True)
class ZoneSource:
    """Where the squares of one site and step group come from.

    Attributes:
        squares: returns float (heads, rows, columns), mean squared energies without text.
        steps: how many steps use them.
        rows: query blocks over all heads, those with text included.
        blocks: all blocks, those with text included.
        text_blocks: blocks with text, which are kept in any case.
        factor: zones are fitted to the squares times the square of this.
    """

    squares: Callable[[], Squares]
    steps: int
    rows: int
    blocks: int
    text_blocks: int = 0
    factor: float = 1.0


@dataclass(frozen=True)
class Priced:
    """A plan at one price.

    Attributes:
        price: variance that a kept block is worth.
        density: expected.
        error: root of the mean relative variance of a row's output.
    """

    price: float
    density: float
    error: float


@dataclass
class ZonePricing:
    """Fits all sites and step groups of a plan at one price.

    Args:
        sources: of all sites and step groups, in order.
        budget: numbers a site may have at a step group.
        number: see `SiteFit`.
        group_rows: see `SiteFit`.
    """

    sources: Sequence[ZoneSource]
    budget: int = BUDGET
    number: float = NUMBER_PRICE
    group_rows: tuple[int, ...] = GROUP_ROWS
    _held: dict[int, SiteFit] = field(default_factory=dict, init=False, repr=False)
    _rises: dict[int, int] = field(default_factory=dict, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def search(self, target: ZoneTarget) -> Priced:
        """Find the price at which the plan is as wanted, or as near as it can be.

        Density falls and error rises with the price, so the price is bracketed, and the bracket
        cut where a power law through its ends says.
        """
        if target.price is not None:
            return self.at(target.price)
        wanted = target.error if target.error is not None else target.wanted_density
        assert wanted is not None

        def miss(at: Priced) -> float:
            """Log of found / wanted, rising with the price."""
            if target.error is None:
                return math.log(wanted / at.density)
            return math.log(max(at.error, 1e-300) / wanted)

        low, high = self._bracket(miss)
        for _ in range(TRIES):
            nearest = min((low, high), key=lambda at: abs(miss(at)))
            if abs(miss(nearest)) <= TOLERANCE or high.price / low.price < 1 + 1e-6:
                return nearest
            share = miss(low) / (miss(low) - miss(high))
            # Away from the ends, so that the bracket shrinks from both sides.
            share = min(max(share, 0.1), 0.9)
            price = math.exp((1 - share) * math.log(low.price) + share * math.log(high.price))
            found = self.at(price)
            low, high = (found, high) if miss(found) < 0 else (low, found)
        return min((low, high), key=lambda at: abs(miss(at)))

    def _bracket(self, miss: Callable[[Priced], float]) -> tuple[Priced, Priced]:
        """Prices on both sides of the wanted one; both the same if it lies outside of all."""
        found = self.at(1e-5)
        grow = 16.0 if miss(found) < 0 else 1 / 16
        for _ in range(TRIES):
            other = self.at(found.price * grow)
            if (miss(other) < 0) != (miss(found) < 0):
                return (found, other) if grow > 1 else (other, found)
            found = other
        return found, found

    def at(self, price: float) -> Priced:
        """Return what the plan is at a price."""
        kept = blocks = variance = rows = 0.0
        for source, zones in zip(self.sources, self.fits(price), strict=True):
            kept += source.steps * (zones.kept + source.text_blocks)
            blocks += source.steps * source.blocks
            variance += source.steps * zones.variance / source.factor**2
            rows += source.steps * source.rows
        return Priced(price, kept / blocks, math.sqrt(variance / rows))

    def fits(self, price: float) -> Iterator[SiteZones]:
        """Fit all sites and step groups, in order."""
        # numpy's own form of the fit is many small steps, which hold threads up.
        side_by_side = all(native.pays(source.blocks) for source in self.sources)
        threads = min(THREADS, os.cpu_count() or 1) if side_by_side else 1
        with ThreadPoolExecutor(threads) as pool:
            try:
                yield from pool.map(partial(self._zones, price), range(len(self.sources)))
            finally:
                pool.shutdown(cancel_futures=True)

    def _zones(self, price: float, index: int) -> SiteZones:
        fit = self._fit(index)
        # What a number costs starts from what it cost last: prices come near one another.
        found = fit.at(price, self._rises.get(index, 0))
        self._rises[index] = fit.rise
        return found

    def _fit(self, index: int) -> SiteFit:
        if index in self._held:
            return self._held[index]
        source = self.sources[index]
        squares = source.squares()
        if source.factor != 1:
            squares = squares * source.factor**2
        fit = SiteFit(squares, self.budget, self.number, self.group_rows)
        with self._lock:
            if sum(held.bytes for held in self._held.values()) + fit.bytes <= MEMORY:
                self._held[index] = fit
        return fit
