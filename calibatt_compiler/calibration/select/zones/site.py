"""From mean squared energies to a plan's zones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from calibatt_compiler.calibration.select.zones.fit import NUMBER_PRICE
from calibatt_compiler.calibration.select.zones.price import (
    Priced,
    Squares,
    ZonePricing,
    ZoneSource,
)
from calibatt_compiler.calibration.zone_target import BUDGET, STEP_GROUPS, ZoneTarget
from calibatt_compiler.plan.text import TextPosition
from calibatt_compiler.plan.zones import ZonePattern
from calibatt_compiler.plan.zones.form import video_blocks
from calibatt_compiler.plan.zones.groups import HeadGroups, pack


@dataclass(frozen=True)
class ZoneMap:
    """What is known of one site at one step group.

    Attributes:
        heads: number of heads.
        lengths: tokens on the query and the key side.
        block: tokens a query block, tokens a key block.
        squares: returns mean squared energies, float (heads, rows, columns), of the blocks that
            hold no text.
        steps: how many steps the group has.
        video: tokens that are not text, if there is text.
        text: where it stands.
        seed: of the pattern.
        factor: see `ZoneSource`. The price is found without it, so that this map becomes denser
            and no other one sparser.
    """

    heads: int
    lengths: tuple[int, int]
    block: tuple[int, int]
    squares: Callable[[], Squares]
    steps: int
    video: int = 0
    text: TextPosition | None = None
    seed: int = 0
    factor: float = 1.0

    @property
    def rows(self) -> int:
        """Query blocks without text."""
        top, bottom = video_blocks(self.lengths[0], self.video, self.block[0], self.text)
        return bottom - top

    @property
    def columns(self) -> int:
        """Key blocks without text."""
        left, right = video_blocks(self.lengths[1], self.video, self.block[1], self.text)
        return right - left

    def source(self, *, raised: bool = True) -> ZoneSource:
        """Return it as the pricing takes it, without its factor unless `raised`."""
        rows, columns = (
            -(-length // size) for length, size in zip(self.lengths, self.block, strict=True)
        )
        return ZoneSource(
            self.squares,
            self.steps,
            rows=self.heads * rows,
            blocks=self.heads * rows * columns,
            text_blocks=self.heads * (rows * columns - self.rows * self.columns),
            factor=self.factor if raised else 1.0,
        )


@dataclass(frozen=True)
class FittedZones:
    """The zones of a whole plan.

    Attributes:
        patterns: of each map.
        variances: of each map, expected relative variance of a row's output, mean over all rows;
            what it would be at that price without its factor.
        found: what the plan is.
    """

    patterns: list[ZonePattern]
    variances: list[float]
    found: Priced


def fit_zones(
    maps: Sequence[ZoneMap],
    target: ZoneTarget,
    *,
    budget: int = BUDGET,
    number: float = NUMBER_PRICE,
) -> FittedZones:
    """Fit the zones of a whole plan at one price.

    Args:
        maps: of all sites and step groups.
        target: what the plan is to be.
        budget: numbers a site may have at a step group.
        number: kept blocks that a number is worth at least.
    """
    # Maps that are all text have nothing to choose; they are dense.
    open_ = [entry.rows * entry.columns > 0 for entry in maps]
    chosen = [entry for entry, some in zip(maps, open_, strict=True) if some]
    raised = [entry for entry in chosen if entry.factor != 1]

    def unraised(entries: Sequence[ZoneMap]) -> ZonePricing:
        return ZonePricing([entry.source(raised=False) for entry in entries], budget, number)

    promised: Iterator[float] = iter(())
    if raised:
        price = target.price or unraised(chosen).search(target).price
        target = ZoneTarget(price=price)
        # Now, so that their sums are not held beside those of all.
        promised = iter([zones.variance for zones in unraised(raised).fits(price)])
    pricing = ZonePricing([entry.source() for entry in chosen], budget, number)
    found = pricing.search(target)
    fits = zip(pricing.sources, pricing.fits(found.price), strict=True)
    patterns, variances = [], []
    for entry, some in zip(maps, open_, strict=True):
        sizes = (entry.heads, *entry.lengths, *entry.block)
        heads: Sequence[HeadGroups] = [HeadGroups.none(entry.rows)] * entry.heads
        variance = 0.0
        if some:
            source, zones = next(fits)
            heads = zones.heads
            variance = zones.variance if entry.factor == 1 else next(promised)
            variance /= source.rows
        variances.append(variance)
        arrays = pack(heads, entry.rows, entry.columns)
        patterns.append(
            ZonePattern.from_arrays(
                sizes, arrays, video=entry.video, text=entry.text, seed=entry.seed
            )
        )
    return FittedZones(patterns, variances, found)


def group_of(position: int, steps: int, groups: int = STEP_GROUPS) -> int:
    """Return the step group of a place in a schedule of so many steps."""
    groups = min(groups, steps)
    return min(position, steps - 1) * groups // steps
