"""From mean squared energies to a plan's zones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """

    heads: int
    lengths: tuple[int, int]
    block: tuple[int, int]
    squares: Callable[[], Squares]
    steps: int
    video: int = 0
    text: TextPosition | None = None
    seed: int = 0

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

    def source(self) -> ZoneSource:
        """Return it as the pricing takes it."""
        rows, columns = (
            -(-length // size) for length, size in zip(self.lengths, self.block, strict=True)
        )
        return ZoneSource(
            self.squares,
            self.steps,
            rows=self.heads * rows,
            blocks=self.heads * rows * columns,
            text_blocks=self.heads * (rows * columns - self.rows * self.columns),
        )


def fit_zones(
    maps: Sequence[ZoneMap],
    target: ZoneTarget,
    *,
    budget: int = BUDGET,
    number: float = NUMBER_PRICE,
) -> tuple[list[ZonePattern], Priced]:
    """Fit the zones of a whole plan at one price.

    Args:
        maps: of all sites and step groups.
        target: what the plan is to be.
        budget: numbers a site may have at a step group.
        number: kept blocks that a number is worth at least.

    Returns:
        A pattern for each map, and what the plan is.
    """
    # Maps that are all text have nothing to choose; they are dense.
    open_ = [entry.rows * entry.columns > 0 for entry in maps]
    sources = [entry.source() for entry, some in zip(maps, open_, strict=True) if some]
    pricing = ZonePricing(sources, budget, number)
    found = pricing.search(target)
    fits = pricing.fits(found.price)
    patterns = []
    for entry, some in zip(maps, open_, strict=True):
        sizes = (entry.heads, *entry.lengths, *entry.block)
        heads = next(fits).heads if some else [HeadGroups.none(entry.rows)] * entry.heads
        arrays = pack(heads, entry.rows, entry.columns)
        patterns.append(
            ZonePattern.from_arrays(
                sizes, arrays, video=entry.video, text=entry.text, seed=entry.seed
            )
        )
    return patterns, found


def group_of(position: int, steps: int, groups: int = STEP_GROUPS) -> int:
    """Return the step group of a place in a schedule of so many steps."""
    groups = min(groups, steps)
    return min(position, steps - 1) * groups // steps
