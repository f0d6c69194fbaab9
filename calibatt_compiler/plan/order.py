"""Token orders: how the tokens of a latent grid are laid out before they are cut into blocks.

A model's sequence is in raster order: frame by frame, row by row. A block of consecutive tokens is
then a few thin rows. Tokens taken tile by tile make blocks that are compact in space and time, and
attention, which is local, needs fewer of them. Where tiles do not divide the grid, those at its
edges are cut off, and all blocks behind them straddle two tiles; tokens taken strip by strip make
blocks that are compact wherever they are cut.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from calibatt_compiler.errors import PlanError

ALL = "all"
"""Stands for the size of a tile along which a strip runs."""

DENSITY, ERROR = "order_density:", "order_error:"
"""Begin the names of a survey's figures in a plan's `quality`; the order's name follows."""

Tile = tuple[int | None, int | None, int | None]

_SIZE = rf"([1-9]\d{{0,3}}|{ALL})"
_TILE = re.compile(f"{_SIZE}x{_SIZE}x{_SIZE}")


@dataclass(frozen=True)
class TokenOrder:
    """An order of the tokens of a grid.

    Tiles come in raster order, tokens within a tile too, and tiles at the grid's end are cut off
    there.

    Ropes run along one axis through the whole grid. The two other axes, of n tokens, are divided
    into p = max(1, floor(n / size + 1/2)) nearly equal parts: token x is in part floor(x p / n).
    Ropes are walked like a ploughed field: those of the first part of the earlier axis first, the
    parts of the later axis forwards and backwards in turn; along its own axis every other strip is
    walked backwards, each of its cross-sections in raster order.

    Attributes:
        tile: frames, height and width of a tile, in tokens; None in place of one: strips along that
            axis, of about this cross-section. None: raster order.
    """

    tile: Tile | None = None

    @classmethod
    def parse(cls, name: str) -> TokenOrder:
        """Read what `str` gives: `raster`, a tile such as `2x8x8`, strips such as `2x8xall`.

        Raises:
            PlanError: none of these.
        """
        if isinstance(name, str) and name == "raster":
            return cls()
        match = _TILE.fullmatch(name) if isinstance(name, str) else None
        if match is None or match.groups().count(ALL) > 1:
            raise PlanError(
                "no such order of tokens",
                expected="raster, or frames x height x width of a tile, such as 2x8x8, or of "
                "strips along one axis, such as 2x8xall",
                got=repr(name),
                remedy="name one of these",
            )
        frames, height, width = (None if size == ALL else int(size) for size in match.groups())
        return cls((frames, height, width))

    def __str__(self) -> str:
        if self.tile is None:
            return "raster"
        return "x".join(ALL if size is None else str(size) for size in self.tile)

    def tokens(
        self, grid: tuple[int, int, int], *, length: int | None = None, first: int = 0
    ) -> npt.NDArray[np.int64] | None:
        """Return the raster index of the token at each position; None if they are the same.

        Args:
            grid: tokens (frames, height, width).
            length: tokens of the whole sequence, if text is part of it; those that are not of the
                grid stay where they are.
            first: position of the grid's first token in the sequence.
        """
        if self.tile is None:
            return None
        order = _strips(grid, self.tile) if None in self.tile else _tiles(grid, self.tile)
        if (order == np.arange(order.size)).all():
            return None
        tokens = np.arange(order.size if length is None else length)
        tokens[first : first + order.size] = first + order
        return tokens


RASTER = TokenOrder()


def parts(tokens: int, size: int) -> int:
    """Into how many nearly equal parts strips of about this size divide an axis."""
    return max(1, (2 * tokens + size) // (2 * size))


def _tiles(grid: tuple[int, int, int], tile: Tile) -> npt.NDArray[np.int64]:
    places = np.indices(grid).reshape(3, -1)
    of_tile = [x // (size or 1) for x, size in zip(places, tile, strict=True)]
    # Stable: tokens of one tile stay in raster order.
    return np.lexsort(of_tile[::-1])


def _strips(grid: tuple[int, int, int], tile: Tile) -> npt.NDArray[np.int64]:
    places = np.indices(grid).reshape(3, -1)
    along = tile.index(None)
    earlier, later = (axis for axis in range(3) if axis != along)
    count = {axis: parts(grid[axis], tile[axis] or 1) for axis in (earlier, later)}
    part = {axis: places[axis] * n // grid[axis] for axis, n in count.items()}
    walked = np.where(part[earlier] % 2, count[later] - 1 - part[later], part[later])
    strip = part[earlier] * count[later] + walked
    way = np.where(strip % 2, -places[along], places[along])
    return np.lexsort((way, strip))


def said(density: Mapping[str, float], error: Mapping[str, float]) -> str:
    """Write what was measured of each order in a line."""
    each = [f"{name} {density[name]:.1%} ({error[name]:.3f})" for name in density]
    return "blocks kept (output error at raster's density): " + ", ".join(each)
