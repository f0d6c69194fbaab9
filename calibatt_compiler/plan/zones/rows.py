"""The runs that each row of zones crosses: its group's, in the row's own key blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from calibatt_compiler.plan.intervals import expand, sums_before
from calibatt_compiler.plan.sizes import MAX_LENGTH
from calibatt_compiler.plan.zones.drawing import BITS, Ints
from calibatt_compiler.plan.zones.form import ZoneForm


@dataclass(frozen=True)
class RowRuns:
    """The runs that each row crosses, row by row, the way of a compressed row matrix.

    Attributes:
        offsets: int64 (heads * query_blocks + 1,).
        begins: int32, first key block of each run.
        ends: int32, one past its last.
        octaves: uint8.
    """

    offsets: npt.NDArray[np.int64]
    begins: Ints
    ends: Ints
    octaves: npt.NDArray[np.uint8]

    def units(self) -> npt.NDArray[np.int64]:
        """Expected kept blocks of each row in units of 1 / `UNIT`, int64 (rows,)."""
        each = (self.ends - self.begins).astype(np.int64) << (BITS - self.octaves).astype(np.int64)
        return np.diff(sums_before(each)[self.offsets])


def row_runs(zones: ZoneForm) -> RowRuns:
    """Return the runs that each row crosses, those of text included."""
    (top, bottom), (left, right) = zones.rows, zones.columns
    rows, every = zones.query_blocks, np.arange(zones.heads * zones.query_blocks)
    if left == right:
        return _text_rows(every, zones.key_blocks)
    first, last = zones.group_edges
    group = np.repeat(np.arange(len(first)), last - first)  # of each row without text
    row = expand(first, last - first)
    number = zones.counts[group].astype(np.int64)
    run = expand(zones.run_offsets[group], number)
    owner = np.repeat(np.arange(len(group)), number)
    # Cuts of a group stand behind one another, a run's own cut is where it begins.
    begin_of = np.full(len(zones.octaves), -2 * MAX_LENGTH, np.int64)
    inner = np.ones(len(zones.octaves), np.bool_)
    inner[zones.run_offsets[:-1]] = False
    begin_of[inner] = zones.cuts
    end_of = np.full(len(zones.octaves), 2 * MAX_LENGTH, np.int64)
    end_of[np.flatnonzero(inner) - 1] = zones.cuts
    shift = (row * zones.diagonal[group])[owner]
    begins = np.clip(begin_of[run] + shift, 0, right - left) + left
    ends = np.clip(end_of[run] + shift, 0, right - left) + left
    crossed = ends > begins
    head = np.repeat(np.arange(zones.heads), bottom - top)
    found = _Runs(
        (head * rows + top + row)[owner[crossed]],
        begins[crossed],
        ends[crossed],
        zones.octaves[run[crossed]],
    )
    with_text = every[~np.isin(every % rows, np.arange(top, bottom))]
    others = np.setdiff1d(every, with_text)
    parts = [found, _Runs.same(with_text, 0, zones.key_blocks)]
    parts += [_Runs.same(others, 0, left)] if left else []
    parts += [_Runs.same(others, right, zones.key_blocks)] if right < zones.key_blocks else []
    return _Runs.joined(parts).by_row(len(every))


@dataclass(frozen=True)
class _Runs:
    """Runs with the number of their row, in any order."""

    row: npt.NDArray[np.int64]
    begins: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    octaves: npt.NDArray[np.uint8]

    @classmethod
    def same(cls, row: npt.NDArray[np.int64], begin: int, end: int) -> Self:
        """A run of octave 0 in each row."""
        return cls(
            row, np.full_like(row, begin), np.full_like(row, end), np.zeros(len(row), np.uint8)
        )

    @classmethod
    def joined(cls, parts: list[_Runs]) -> _Runs:
        """Put runs together, row by row, in the order of keys."""
        parts = [part for part in parts if len(part.row)]
        if len(parts) == 1:
            return parts[0]
        arrays = [
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("row", "begins", "ends", "octaves")
        ]
        order = np.lexsort((arrays[1], arrays[0]))
        return cls(*(array[order] for array in arrays))

    def by_row(self, rows: int) -> RowRuns:
        """Return them as a compressed row matrix; they must be in order."""
        return RowRuns(
            sums_before(np.bincount(self.row, minlength=rows)),
            self.begins.astype(np.int32),
            self.ends.astype(np.int32),
            self.octaves,
        )


def _text_rows(every: npt.NDArray[np.int64], columns: int) -> RowRuns:
    return _Runs.same(every, 0, columns).by_row(len(every))
