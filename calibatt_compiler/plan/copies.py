"""Spatial repetition: heads that compute a few rows of each frame and copy the others.

In some heads all rows of a frame attend alike. Such a *row-shared* head computes the tokens of a
few *anchor rows* of each frame, and each other row takes, column by column, the output of the
anchor row nearest to it (arXiv 2603.05503). Text tokens are always computed.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from calibatt_compiler.errors import PlanError
from calibatt_compiler.plan.order import RASTER, TokenOrder

Positions = npt.NDArray[np.int32]


@dataclass(frozen=True)
class AnchorRows:
    """Which queries a row-shared head computes, and where each output goes.

    Row `i` of the `k = min(anchor_rows, height)` anchor rows of a frame is
    `floor((2 i + 1) * height / (2 k))`: the middle one of `k` equal parts. A row `y` copies the
    anchor row `a` with the least `|y - a|`, the upper one (the smaller `a`) if there are two.

    Attributes:
        grid: tokens (frames, height, width) of the video.
        anchor_rows: rows of each frame that are computed; from `height` on all of them are.
        first: position of the grid's first token in the sequence: tokens of text before it.
        order: how the grid's tokens are laid out in the sequence.

    Raises:
        PlanError: a size out of range.
    """

    grid: tuple[int, int, int]
    anchor_rows: int
    first: int = 0
    order: TokenOrder = RASTER

    def __post_init__(self) -> None:
        sizes = (*self.grid, self.anchor_rows, self.first + 1)
        if len(self.grid) != 3 or any(type(size) is not int or size < 1 for size in sizes):
            raise PlanError(
                "copied rows need a grid and a number of anchor rows",
                expected="a grid of three positive integers, anchor_rows >= 1, first >= 0",
                got=f"grid {self.grid}, anchor_rows {self.anchor_rows!r}, first {self.first!r}",
                remedy="take the grid of the plan, and 5 anchor rows",
            )

    @property
    def video(self) -> int:
        """Tokens of the grid."""
        return math.prod(self.grid)

    @property
    def anchors(self) -> npt.NDArray[np.int64]:
        """Int64 (min(anchor_rows, height),): the anchor rows of a frame, increasing."""
        height = self.grid[1]
        count = min(self.anchor_rows, height)
        return (2 * np.arange(count) + 1) * height // (2 * count)

    def computed(self, length: int) -> Positions:
        """Return the positions that are computed, int32 (n,), increasing; read-only.

        Args:
            length: tokens of the sequence, text included.

        Raises:
            PlanError: the sequence is too short for the grid.
        """
        return _tables(self, length)[0]

    def sources(self, length: int) -> Positions:
        """Return for each position whose output it takes, int32 (length,); read-only.

        An output is named by its index into `computed`.

        Args:
            length: tokens of the sequence, text included.

        Raises:
            PlanError: the sequence is too short for the grid.
        """
        return _tables(self, length)[1]

    def __str__(self) -> str:
        grid = "x".join(map(str, self.grid))
        return f"{self.anchor_rows} rows of {grid} from {self.first} in {self.order}"


RowCopies = AnchorRows
"""The name of before, for one version."""


@functools.lru_cache(maxsize=8)
def _tables(copies: AnchorRows, length: int) -> tuple[Positions, Positions]:
    if length < copies.first + copies.video:
        raise PlanError(
            "the rows of this grid are not in a sequence of this length",
            expected=f"at least {copies.first} + {copies.video} tokens",
            got=length,
            remedy="give the grid of the video, and the tokens of text before it",
        )
    of_position = copies.order.tokens(copies.grid, length=length, first=copies.first)
    tokens = np.arange(length) if of_position is None else of_position
    _, height, width = copies.grid
    anchors = copies.anchors
    # An anchor serves the rows up to the middle between it and the next, that one included.
    middles = (anchors[:-1] + anchors[1:]) // 2
    nearest = anchors[np.searchsorted(middles, np.arange(height))]
    source = np.arange(length)
    video = source[copies.first : copies.first + copies.video].reshape(copies.grid)
    video += ((nearest - np.arange(height)) * width)[:, None]
    # From the model's tokens to positions: position p takes what token source[tokens[p]] has.
    computed = np.flatnonzero(source[tokens] == tokens)
    index = np.empty(length, np.int32)
    index[tokens[computed]] = np.arange(len(computed))
    found = computed.astype(np.int32), index[source[tokens]]
    for table in found:
        table.setflags(write=False)
    return found


def check_rows(
    bits: npt.NDArray[np.uint8], computed: npt.NDArray[np.bool_], *, repetitive: bool
) -> None:
    """Raise `PlanError` unless each computed row keeps a block, and no other row does.

    Args:
        bits: uint8 (heads, query_blocks, bytes), of which any bit that is set is a kept block.
        computed: bool (heads, query_blocks).
        repetitive: whether some head is row-shared.
    """
    kept = bits.any(axis=-1)
    empty = computed & ~kept
    if empty.any():
        head, row = (int(i) for i in np.argwhere(empty)[0])
        raise PlanError(
            "a query block has no kept key block, so its attention is undefined",
            expected="at least one kept key block in each row",
            got=f"{int(empty.sum())} empty rows, first: head {head}, query block {row}",
            remedy="keep the diagonal block of each row, or lower the agreement threshold",
        )
    beyond = kept & ~computed
    if repetitive and beyond.any():
        head, row = (int(i) for i in np.argwhere(beyond)[0])
        raise PlanError(
            "a row-shared head keeps key blocks for rows that it does not compute",
            expected=f"{int(computed[head].sum())} rows of blocks in head {head}",
            got=f"blocks in row {row}",
            remedy="build patterns with BlockPattern.from_mask",
        )


def check_repetitive(
    repetitive: npt.NDArray[np.bool_], heads: int, copies: AnchorRows | None
) -> None:
    """Raise `PlanError` unless there is one flag a head, and copies for them; make it read-only."""
    if repetitive.dtype != np.bool_ or repetitive.shape != (heads,) or copies is None:
        raise PlanError(
            "row-shared heads need one flag a head and the rows that they copy",
            expected=f"bool ({heads},), and copies",
            got=f"{repetitive.dtype} {repetitive.shape}, copies {copies}",
            remedy="give BlockPattern.from_mask both repetitive and copies",
        )
    repetitive.setflags(write=False)
