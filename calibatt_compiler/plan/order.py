"""Token orders: how the tokens of a latent grid are laid out before they are cut into blocks.

A model's sequence is in raster order: frame by frame, row by row. A block of consecutive tokens is
then a few thin rows. Tokens taken tile by tile make blocks that are compact in space and time, and
attention, which is local, needs fewer of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from calibatt_compiler.errors import PlanError

_TILE = re.compile(r"([1-9]\d{0,3})x([1-9]\d{0,3})x([1-9]\d{0,3})")


@dataclass(frozen=True)
class TokenOrder:
    """An order of the tokens of a grid.

    Attributes:
        tile: frames, height and width of a tile, in tokens; tiles come in raster order, tokens
            within a tile too, and tiles at the grid's end are cut off there. None: raster order.
    """

    tile: tuple[int, int, int] | None = None

    @classmethod
    def parse(cls, name: str) -> TokenOrder:
        """Read what `str` gives: `raster`, or a tile such as `2x8x8`.

        Raises:
            PlanError: neither.
        """
        if name == "raster":
            return cls()
        match = _TILE.fullmatch(name)
        if match is None:
            raise PlanError(
                "no such order of tokens",
                expected="raster, or frames x height x width of a tile, such as 2x8x8",
                got=repr(name),
                remedy="name one of these",
            )
        frames, height, width = (int(size) for size in match.groups())
        return cls((frames, height, width))

    def __str__(self) -> str:
        return "raster" if self.tile is None else "x".join(map(str, self.tile))

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
        frames, height, width = np.indices(grid).reshape(3, -1)
        of_tile = [x // size for x, size in zip((frames, height, width), self.tile, strict=True)]
        # Stable: tokens of one tile stay in raster order.
        order = np.lexsort(of_tile[::-1])
        if (order == np.arange(order.size)).all():
            return None
        tokens = np.arange(order.size if length is None else length)
        tokens[first : first + order.size] = first + order
        return tokens


RASTER = TokenOrder()
