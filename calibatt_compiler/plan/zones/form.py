"""What a pattern of zones holds: its arrays and the sizes that follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from calibatt_compiler.plan.intervals import expand, sums_before
from calibatt_compiler.plan.text import TextPosition
from calibatt_compiler.plan.zones.drawing import FORMULA, Ints


def video_blocks(length: int, video: int, block: int, text: TextPosition | None) -> tuple[int, int]:
    """Return the first block of a sequence that holds no text token, and one past the last."""
    blocks = -(-length // block)
    if text is None or length <= video:
        return 0, blocks
    if text == "first":
        return min(-(-(length - video) // block), blocks), blocks
    return 0, video // block


@dataclass(frozen=True, eq=False)
class ZoneForm:
    """The arrays of `plan.zones.ZonePattern`, which says what they mean and checks them."""

    heads: int
    query_length: int
    key_length: int
    block_m: int
    block_n: int
    group_rows: Ints
    diagonal: npt.NDArray[np.uint8]
    leads: Ints
    counts: Ints
    cuts: Ints
    octaves: npt.NDArray[np.uint8]
    video: int = 0
    text: TextPosition | None = None
    seed: int = 0
    formula: int = FORMULA

    def octave_at(self, where: Ints) -> npt.NDArray[np.uint8]:
        """Octave of each group at a key block, stated as its runs are; uint8 (groups,)."""
        groups = np.arange(len(self.counts))
        cut_group = np.repeat(groups, self.counts - 1)
        behind = np.bincount(cut_group[self.cuts <= where[cut_group]], minlength=len(groups))
        found: npt.NDArray[np.uint8] = self.octaves[self.run_offsets[:-1] + behind]
        return found

    @property
    def query_blocks(self) -> int:
        """Number of query blocks, the ragged last one included."""
        return -(-self.query_length // self.block_m)

    @property
    def key_blocks(self) -> int:
        """Number of key blocks, the ragged last one included."""
        return -(-self.key_length // self.block_n)

    @property
    def rows(self) -> tuple[int, int]:
        """First query block without text, and one past the last."""
        return video_blocks(self.query_length, self.video, self.block_m, self.text)

    @property
    def columns(self) -> tuple[int, int]:
        """First key block without text, and one past the last."""
        return video_blocks(self.key_length, self.video, self.block_n, self.text)

    @property
    def head_groups(self) -> npt.NDArray[np.int64]:
        """Groups of each head, int64 (heads,)."""
        if self.columns[0] == self.columns[1]:
            return np.zeros(self.heads, np.int64)
        return -(-(self.rows[1] - self.rows[0]) // self.group_rows.astype(np.int64))

    @cached_property
    def run_offsets(self) -> npt.NDArray[np.int64]:
        """Which runs each group owns, int64 (groups + 1,)."""
        return sums_before(self.counts)

    @property
    def group_edges(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """First row of each group and one past its last, rows without text counted from 0."""
        groups = self.head_groups
        size = np.repeat(self.group_rows.astype(np.int64), groups)
        first = expand(np.zeros_like(groups), groups) * size
        return first, np.minimum(first + size, self.rows[1] - self.rows[0])
