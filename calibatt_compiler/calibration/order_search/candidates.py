"""Which token orders a calibration compares, what it measures of them, and which it takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from calibatt_compiler.calibration.store.order_survey import OrderSurvey
from calibatt_compiler.plan.order import RASTER, TokenOrder, parts

INPUTS = 2
"""Inputs that are surveyed, if there are as many: the second judges the masks of the first."""

STEPS = 4
"""Diffusion steps that a survey measures at, spread evenly over the schedule."""

SAVING = 0.1
"""Share of raster order's blocks that another order must save to be taken; see `choose`."""

_DEEPEST = 8
"""Frames of the longest tile."""


def candidates(grid: tuple[int, int, int], block: tuple[int, int]) -> tuple[TokenOrder, ...]:
    """Return the orders worth measuring: raster first, then tiles and strips, no two alike.

    Both are made for each number of frames up to 8 that divides the smaller block, B tokens, and
    that the grid has:

    - tiles of exactly B tokens, as square in a frame as whole numbers allow; only those that
      divide the grid's height and width. Others are cut off within the sequence and push the
      blocks out of step with the tiles, and strips were better wherever that was measured;
    - strips along the longer side of a frame, as high as a piece of B tokens is long.

    Args:
        grid: tokens (frames, height, width).
        block: tokens a query block, tokens a key block.
    """
    found = {b"": RASTER}
    size = min(block)
    for frames in range(1, min(_DEEPEST, grid[0]) + 1):
        if size % frames == 0:
            for order in (_tile(grid, size, frames), _strip(grid, size, frames)):
                tokens = None if order is None else order.tokens(grid)
                if order is not None and tokens is not None:
                    found.setdefault(tokens.tobytes(), order)
    return tuple(found.values())


def surveyed_steps(steps: int) -> tuple[int, ...]:
    """Return which of a sampler's steps a survey measures at: the middles of `STEPS` spans."""
    return tuple(sorted({(2 * span + 1) * steps // (2 * STEPS) for span in range(STEPS)}))


def choose(density: Mapping[str, float], error: Mapping[str, float]) -> str:
    """Return the order to take: the sparsest that pays; raster order if none does.

    An order pays if

    - it keeps at most `1 - SAVING` of raster's blocks at the steps' thresholds. Reordering costs
      time: queries, keys, values and outputs move once more through memory. At 32,760 tokens of
      40 heads of 128 in bfloat16 that is 2.7 GB a call, written and read; by the traffic alone
      1.1 ms of a GPU with 2.5 TB/s, where a dense call takes some 40 ms and 40 % of it 16 ms. So
      7 % of the blocks only pay for it; longer videos need less, the CPU kernel nothing;
    - it has no larger output error than raster's where both keep as many blocks, by masks of
      another input. Compact blocks hold more attention of the input that they are chosen on, but
      what they hold differs more between inputs than what thin rows hold, and what they drop is
      all far off. On `examples/tiny_wan`, of orders that keep the most attention some have a larger
      error than raster order on prompts other than those calibrated on.

    Args:
        density: kept blocks / all blocks at the steps' thresholds, by order; of equal ones the
            first is taken.
        error: of the output where each order keeps as many blocks as raster's.
    """
    raster = str(RASTER)
    paying = [
        name
        for name, value in density.items()
        if value <= (1 - SAVING) * density[raster] and error[name] <= error[raster]
    ]
    return min(paying, key=lambda name: density[name], default=raster)


@dataclass(frozen=True)
class SquaredError:
    """Of a sparse output.

    Attributes:
        square: sum of squares of its difference from the dense one.
        norm: sum of squares of the dense one.
    """

    square: float = 0.0
    norm: float = 0.0

    def __add__(self, other: SquaredError) -> SquaredError:
        return SquaredError(self.square + other.square, self.norm + other.norm)

    @property
    def relative(self) -> float:
        """Norm of the difference over that of the dense output."""
        return round(math.sqrt(self.square / self.norm), 6) if self.norm else 0.0


@dataclass
class Tally:
    """What is counted of one order at one site.

    Attributes:
        kept: blocks.
        blocks: all there are.
        own: error under masks of the same input.
        others: error under masks of another input.
    """

    kept: int = 0
    blocks: int = 0
    own: SquaredError = SquaredError()
    others: SquaredError = SquaredError()

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.kept + other.kept,
            self.blocks + other.blocks,
            self.own + other.own,
            self.others + other.others,
        )

    @property
    def density(self) -> float:
        """Share of the blocks that is kept."""
        return round(self.kept / self.blocks, 6)


def survey_of(
    inputs: object, steps: Iterable[int], tallies: Mapping[str, Mapping[str, Tally]]
) -> OrderSurvey:
    """Choose by what was counted.

    Args:
        inputs: what they were.
        steps: that were measured at.
        tallies: by order and site.
    """
    whole = {order: sum(sites.values(), Tally()) for order, sites in tallies.items()}
    held_out = any(tally.others.norm for tally in whole.values())
    density = {order: tally.density for order, tally in whole.items()}
    error = {
        order: (tally.others if held_out else tally.own).relative for order, tally in whole.items()
    }
    return OrderSurvey(
        inputs=inputs,
        steps=tuple(steps),
        density=density,
        error=error,
        held_out=held_out,
        sites={
            order: {site: tally.density for site, tally in sites.items()}
            for order, sites in tallies.items()
        },
        chosen=choose(density, error),
    )


def _tile(grid: tuple[int, int, int], size: int, frames: int) -> TokenOrder | None:
    area = size // frames
    height = max(h for h in range(1, math.isqrt(area) + 1) if area % h == 0)
    width = area // height
    if height == 1 or grid[1] % height or grid[2] % width:
        return None
    return TokenOrder((frames, height, width))


def _strip(grid: tuple[int, int, int], size: int, frames: int) -> TokenOrder:
    deep = grid[0] / parts(grid[0], frames)
    side = max(1, round(math.sqrt(size / deep)))
    return TokenOrder((frames, side, None) if grid[2] >= grid[1] else (frames, None, side))
