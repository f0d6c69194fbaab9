"""The symbolic form of a covered mask: segments of rows, intervals with affine bounds.

A row's intervals are read in order. The bounds of interval k of row r are

    start_k = Min(Max(start_slope * r + start_offset, end_{k-1}), limit_k)          end_{-1} = 0
    end_k   = Max(Min(end_slope * r + end_offset, limit_k), start_k)

with `limit_k` the start of the next interval of slope 0, or the number of key blocks: bands slide
under global columns and out of the matrix. An interval may be empty in some rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import sympy

from calibatt_compiler.errors import PlanFormatError

ROW = sympy.Symbol("row", integer=True, nonnegative=True)
"""The query block, in the expressions of a segment."""


@dataclass(frozen=True)
class Affine:
    """`slope * row + offset`, in key blocks."""

    slope: int
    offset: int

    def at(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Values at these query blocks."""
        return self.slope * rows + self.offset

    @property
    def expression(self) -> Any:
        """As a sympy expression of `ROW`."""
        return self.slope * ROW + self.offset


@dataclass(frozen=True)
class Term:
    """One interval [start, end) of key blocks, before clipping."""

    start: Affine
    end: Affine


@dataclass(frozen=True)
class Segment:
    """Query blocks `first` to `last` (exclusive), which share their terms."""

    first: int
    last: int
    terms: tuple[Term, ...]

    def limits(self, key_blocks: int) -> list[int]:
        """Upper limit of each interval: the next one of slope 0, or the end of the keys."""
        limits, limit = [], key_blocks
        for term in reversed(self.terms):
            limits.append(limit)
            if term.start.slope == 0:
                limit = term.start.offset
        return limits[::-1]

    def bounds(self, key_blocks: int) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """Start and end of each interval in each row of the segment, by the module's formula."""
        rows = np.arange(self.first, self.last)
        before = np.zeros_like(rows)
        bounds = []
        for term, limit in zip(self.terms, self.limits(key_blocks), strict=True):
            start = np.minimum(np.maximum(term.start.at(rows), before), limit)
            before = np.maximum(np.minimum(term.end.at(rows), limit), start)
            bounds.append((start, before))
        return bounds

    def expressions(self, key_blocks: int) -> list[tuple[Any, Any]]:
        """Start and end of each interval as sympy expressions of `ROW`.

        A Max or Min that never decides within the segment's rows is left out, and sympy drops the
        arguments that others dominate: parallel bands leave one Max or Min each.
        """
        rows = np.arange(self.first, self.last)
        before, previous = np.zeros_like(rows), sympy.Integer(0)
        result = []
        everything = zip(self.terms, self.limits(key_blocks), self.bounds(key_blocks), strict=True)
        for term, limit, (start, end) in everything:
            first, raw = term.start.expression, term.start.at(rows)
            if not (raw >= before).all():
                first, raw = sympy.Max(first, previous), np.maximum(raw, before)
            if not (raw <= limit).all():
                first = sympy.Min(first, limit)
            last, raw = term.end.expression, term.end.at(rows)
            if not (raw <= limit).all():
                last, raw = sympy.Min(last, limit), np.minimum(raw, limit)
            if not (raw >= start).all():
                last = sympy.Max(last, first)
            result.append((first, last))
            before, previous = end, last
        return result


@dataclass(frozen=True)
class Cover:
    """A mask in symbolic form.

    Attributes:
        query_blocks: rows of the mask.
        key_blocks: columns of the mask.
        forms: the segments of each distinct head, in row order and without holes.
        head_forms: index into `forms`, by head.
    """

    query_blocks: int
    key_blocks: int
    forms: tuple[tuple[Segment, ...], ...]
    head_forms: tuple[int, ...]

    @cached_property
    def literals(self) -> int:
        """Numbers that the generated source holds: two a term, one a segment."""
        return sum(1 + 2 * len(segment.terms) for form in self.forms for segment in form)

    @cached_property
    def max_intervals(self) -> int:
        """Most terms of any segment."""
        return max(len(segment.terms) for form in self.forms for segment in form)

    def mask(self) -> npt.NDArray[np.bool_]:
        """The mask that this cover denotes: bool (heads, query_blocks, key_blocks)."""
        step = np.zeros((len(self.forms), self.query_blocks, self.key_blocks + 1), np.int32)
        for index, form in enumerate(self.forms):
            for segment in form:
                rows = np.arange(segment.first, segment.last)
                for start, end in segment.bounds(self.key_blocks):
                    # Rows are distinct, so plain indexing adds once a row.
                    step[index, rows, start] += 1
                    step[index, rows, end] -= 1
        forms = np.cumsum(step, axis=-1)[..., :-1] > 0
        return forms[list(self.head_forms)]

    def to_json(self) -> dict[str, Any]:
        """As plain lists and numbers, for the kernel cache."""
        return {
            "query_blocks": self.query_blocks,
            "key_blocks": self.key_blocks,
            "head_forms": list(self.head_forms),
            "forms": [
                [
                    [
                        segment.first,
                        segment.last,
                        [
                            [t.start.slope, t.start.offset, t.end.slope, t.end.offset]
                            for t in segment.terms
                        ],
                    ]
                    for segment in form
                ]
                for form in self.forms
            ],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Cover:
        """Inverse of `to_json`.

        Raises:
            PlanFormatError: not what `to_json` writes.
        """
        try:
            forms = tuple(
                tuple(
                    Segment(
                        int(first),
                        int(last),
                        tuple(
                            Term(Affine(int(a), int(b)), Affine(int(c), int(d)))
                            for a, b, c, d in terms
                        ),
                    )
                    for first, last, terms in form
                )
                for form in data["forms"]
            )
            return cls(
                int(data["query_blocks"]),
                int(data["key_blocks"]),
                forms,
                tuple(int(form) for form in data["head_forms"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PlanFormatError(
                "a cached cover is damaged",
                expected="segments and terms as lists of integers",
                got=repr(error),
                remedy="delete the entry from the kernel cache; it will be generated again",
            ) from error
