"""The search behind a cover: rows merged into segments, the cheapest merge first.

Bit sets are Python integers: a union is one `|`, counting runs one shift and one popcount.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from calibatt_compiler.kernels.baked.cover_template import Affine, Segment, Term

COARSE_FACTOR = 8
"""From this many times the budget on, rows are paired blindly before the search."""


def _runs(bits: int) -> Iterator[tuple[int, int]]:
    """Start and end of each run of ones in a bit set."""
    position = 0
    while bits:
        skip = (bits & -bits).bit_length() - 1
        bits >>= skip
        length = (~bits & (bits + 1)).bit_length() - 1
        yield position + skip, position + skip + length
        bits >>= length
        position += skip + length


def _count_runs(bits: int) -> int:
    return (bits & ~(bits << 1)).bit_count()


def _hull(bits: int) -> int:
    """All bits from the first to the last one set."""
    return (1 << bits.bit_length()) - (bits & -bits)


def _smallest_gaps(bits: int) -> tuple[int, int]:
    """Width of the narrowest gaps between the runs of a bit set, and all gaps of that width."""
    previous, width, gaps = None, 0, 0
    for start, end in _runs(bits):
        if previous is not None:
            gap = start - previous
            fill = ((1 << gap) - 1) << previous
            if width == 0 or gap < width:
                width, gaps = gap, fill
            elif gap == width:
                gaps |= fill
        previous = end
    return width, gaps


def _clipped_sum(offset: int, slope: int, rows: tuple[int, int], low: int, high: int) -> int:
    """Sum of `slope * r + offset`, clipped to [low, high], over the rows."""
    first, last = rows
    rising = min(max(-((offset - low) // slope), first), last)
    flat = min(max(-((offset - high) // slope), rising), last)
    count = flat - rising
    middle = slope * (rising + flat - 1) * count // 2 + offset * count
    return low * (rising - first) + middle + high * (last - flat)


class TooManyBlocks(Exception):  # noqa: N818 - no error: it ends a search early
    """The cover would add far more blocks than are allowed."""


@dataclass
class _Piece:
    """A segment in the making: its rows' blocks as bit sets, and the form chosen for them."""

    head: int
    first: int
    last: int
    kept: int
    straight: int
    """Union of the rows; bit c is key block c."""
    sheared: int
    """Union without prefix and suffix; bit `c - slope * r + slope * query_blocks`."""
    diagonal: bool = False
    intervals: int = 0
    added: int = 0
    left: _Piece | None = None
    right: _Piece | None = None
    alive: bool = True
    version: int = 0

    @property
    def bits(self) -> int:
        """Bit set of the form that this segment has."""
        return self.sheared if self.diagonal else self.straight

    @property
    def literals(self) -> int:
        return 1 + 2 * self.intervals


class Merger:
    """Greedy merging of the rows of all heads under one budget.

    Raises:
        TooManyBlocks: from `run`, when twice `max_added` blocks are added.
    """

    def __init__(
        self,
        heads: list[npt.NDArray[np.bool_]],
        slope: int,
        literal_budget: int,
        max_intervals: int,
        max_added: float = math.inf,
    ) -> None:
        self.slope = slope
        self.max_added = max_added
        self.added = 0
        self.budget = literal_budget
        self.max_intervals = max_intervals
        self.rows, self.columns = (int(size) for size in heads[0].shape)
        self.zero = slope * self.rows  # bit of the diagonal in a sheared set
        self.prefix: list[int] = []
        self.suffix: list[int] = []
        self.pieces: list[_Piece] = []
        self.literals = 0
        self.heap: list[tuple[float, int, Any]] = []
        self.ticket = 0
        for head, mask in enumerate(heads):
            self._add_head(head, mask)

    def _add_head(self, head: int, mask: npt.NDArray[np.bool_]) -> None:
        # Runs at either edge that nine rows in ten have are global columns of the diagonal form.
        lead = np.where(mask.all(1), self.columns, np.argmin(mask, axis=1))
        tail = np.where(mask.all(1), self.columns, np.argmin(mask[:, ::-1], axis=1))
        prefix, suffix = (int(np.quantile(x, 0.1, method="lower")) for x in (lead, tail))
        if prefix + suffix > self.columns:
            suffix = self.columns - prefix
        self.prefix.append(prefix)
        self.suffix.append(suffix)
        middle = ((1 << self.columns - suffix) - 1) >> prefix << prefix
        previous = None
        for row, packed in enumerate(np.packbits(mask, axis=-1, bitorder="little")):
            bits = int.from_bytes(packed.tobytes(), "little")
            sheared = (bits & middle) << (self.zero - self.slope * row)
            piece = _Piece(head, row, row + 1, bits.bit_count(), bits, sheared, left=previous)
            piece.intervals = _count_runs(bits)
            self.literals += piece.literals
            self.pieces.append(piece)
            if previous is not None:
                previous.right = piece
            previous = piece

    def run(self) -> list[list[Segment]]:
        """Merge until the budget holds; return the segments of each head in order."""
        self._merge_equal()
        self._coarsen()
        for piece in self.pieces:
            while piece.alive and piece.intervals > self.max_intervals:
                self._fill(piece, _smallest_gaps(piece.bits)[1])
        self.pieces = [piece for piece in self.pieces if piece.alive]
        if self.literals > self.budget:
            for piece in self.pieces:
                self._propose(piece)
        while self.heap and self.literals > self.budget:
            self._move(*heapq.heappop(self.heap)[2])
        alive = [piece for piece in self.pieces if piece.alive]
        segments: list[list[Segment]] = [[] for _ in self.prefix]
        for piece in sorted(alive, key=lambda p: (p.head, p.first)):
            segments[piece.head].append(Segment(piece.first, piece.last, self._terms(piece)))
        return segments

    def _move(
        self,
        kind: str,
        piece: _Piece,
        version: int,
        other: _Piece | None = None,
        other_version: int = 0,
        both: _Piece | None = None,
    ) -> None:
        """Make a queued move unless its segments have changed since."""
        if not piece.alive or piece.version != version:
            return
        if other is not None:
            assert both is not None
            if not other.alive or other.version != other_version:
                return
            self._merge(piece, other, both)
            piece = both
        elif kind == "gap":
            self._fill(piece, _smallest_gaps(piece.bits)[1])
        else:
            piece.diagonal = False
            self._fill(piece, _hull(piece.straight))
        self._propose_merge(piece.left, piece)
        self._propose(piece)

    # Before the greedy search.

    def _merge_equal(self) -> None:
        """Merge neighbours wherever that adds nothing, in one pass over the rows."""
        current: _Piece | None = None
        for piece in list(self.pieces):
            found = None
            if current is not None and current.right is piece:
                found = self._union(current, piece, exact=True)
            if found is None:
                current = piece
            else:
                assert current is not None
                self._merge(current, piece, found[1])
                current = found[1]

    def _coarsen(self) -> None:
        """Bring a mask far above the budget near it, without the search's look-ahead.

        At such ratios each final segment has dozens of rows: pairing them blindly costs little and
        keeps the search short.
        """
        limit = COARSE_FACTOR * self.budget
        if self.literals > limit:
            for row in self.pieces:
                if row.alive and row.intervals > 2 * self.max_intervals:
                    self._close_widths(row)
        while self.literals > limit:
            before = self.literals
            first = [piece for piece in self.pieces if piece.alive and piece.left is None]
            for head_piece in first:
                piece: _Piece | None = head_piece
                while piece is not None and piece.right is not None:
                    found = self._union(piece, piece.right)
                    following = piece.right.right
                    if found is not None:
                        self._merge(piece, piece.right, found[1])
                    piece = following
            if self.literals == before:
                break

    def _close_widths(self, piece: _Piece) -> None:
        """Close ever wider gaps of `piece` at once until it has few enough intervals."""
        bits = closed = piece.bits
        gap = 1
        while _count_runs(closed) > 2 * self.max_intervals:
            # Grow every run by `gap` to the right, then take the growth off the runs' ends.
            for _ in range(gap):
                closed |= closed << 1
            for _ in range(gap):
                closed &= closed >> 1
            closed |= bits
            gap *= 2
        self._fill(piece, closed & ~bits)

    # Forms.

    def _area(self, piece: _Piece, bits: int) -> int:
        """Blocks of the diagonal form with the sheared set `bits`, prefix and suffix included."""
        rows = (piece.first, piece.last)
        low, high = self.prefix[piece.head], self.columns - self.suffix[piece.head]
        area = (piece.last - piece.first) * (self.columns - high + low)
        for start, end in _runs(bits):
            area += _clipped_sum(end - self.zero, self.slope, rows, low, high)
            area -= _clipped_sum(start - self.zero, self.slope, rows, low, high)
        return area

    def _edges(self, head: int) -> int:
        return (self.prefix[head] > 0) + (self.suffix[head] > 0)

    def _union(self, a: _Piece, b: _Piece, *, exact: bool = False) -> tuple[float, _Piece] | None:
        """Best form of `a` and `b` together, and the added blocks for each literal saved.

        None where no form saves literals or, with `exact`, where each adds blocks.
        """
        straight, sheared = a.straight | b.straight, a.sheared | b.sheared
        both = _Piece(a.head, a.first, b.last, a.kept + b.kept, straight, sheared)
        best: tuple[float, int] | None = None
        for diagonal in (False, True):
            bits = sheared if diagonal else straight
            edges = self._edges(a.head) if diagonal else 0
            intervals = _count_runs(bits) + edges
            # Many runs take long to measure, and such a form is no good anyway.
            if diagonal and intervals > 4 * self.max_intervals:
                continue
            if not exact:
                bits, intervals = self._capped(bits, intervals, edges)
            saved = a.literals + b.literals - 1 - 2 * intervals
            if saved <= 0:
                continue
            blocks = self._area(both, bits) if diagonal else (b.last - a.first) * bits.bit_count()
            if exact and blocks != both.kept:
                continue
            cost = max(blocks - both.kept - a.added - b.added, 0) / saved
            if best is None or (cost, -saved) < best:
                best = (cost, -saved)
                both.diagonal, both.intervals = diagonal, intervals
                both.added = blocks - both.kept
                both.straight, both.sheared = (straight, bits) if diagonal else (bits, sheared)
        return None if best is None else (best[0], both)

    def _capped(self, bits: int, intervals: int, edges: int) -> tuple[int, int]:
        """Close the narrowest gaps of `bits` until a row has few enough intervals."""
        while intervals > self.max_intervals:
            bits |= _smallest_gaps(bits)[1]
            intervals = _count_runs(bits) + edges
        return bits, intervals

    # Moves.

    def _push(self, cost: float, move: Any) -> None:
        self.ticket += 1
        heapq.heappush(self.heap, (cost, self.ticket, move))

    def _propose_merge(self, a: _Piece | None, b: _Piece | None) -> None:
        if a is None or b is None:
            return
        found = self._union(a, b)
        if found is not None:
            self._push(found[0], ("merge", a, a.version, b, b.version, found[1]))

    def _propose(self, piece: _Piece) -> None:
        """Queue the merge with the right neighbour, and the closing of the smallest gaps."""
        self._propose_merge(piece, piece.right)
        if piece.intervals > 1 + self._edges(piece.head) * piece.diagonal:
            gap, _ = _smallest_gaps(piece.bits)
            cost = gap * (piece.last - piece.first) / 2
            self._push(cost, ("gap", piece, piece.version))
        elif piece.intervals > 1:  # one band between columns: only its hull takes fewer literals
            hull = _hull(piece.straight).bit_count() * (piece.last - piece.first)
            cost = (hull - piece.kept - piece.added) / (2 * piece.intervals - 2)
            self._push(cost, ("hull", piece, piece.version))

    def _merge(self, a: _Piece, b: _Piece, both: _Piece) -> None:
        a.alive = b.alive = False
        both.left, both.right = a.left, b.right
        if both.left is not None:
            both.left.right = both
        if both.right is not None:
            both.right.left = both
        self.literals += both.literals - a.literals - b.literals
        self.pieces.append(both)
        self._account(both.added - a.added - b.added)

    def _fill(self, piece: _Piece, gaps: int) -> None:
        """Add the blocks `gaps` to the form that `piece` has."""
        before, added = piece.literals, piece.added
        if piece.diagonal:
            piece.sheared |= gaps
            piece.intervals = _count_runs(piece.sheared) + self._edges(piece.head)
            piece.added = self._area(piece, piece.sheared) - piece.kept
        else:
            piece.straight |= gaps
            piece.intervals = _count_runs(piece.straight)
            piece.added = (piece.last - piece.first) * piece.straight.bit_count() - piece.kept
        piece.version += 1
        self.literals += piece.literals - before
        self._account(piece.added - added)

    def _account(self, blocks: int) -> None:
        self.added += blocks
        # Not at the limit itself: another form of the same rows may give a few blocks back.
        if self.added > 2 * self.max_added:
            raise TooManyBlocks

    def _terms(self, piece: _Piece) -> tuple[Term, ...]:
        if not piece.diagonal:
            return tuple(Term(Affine(0, s), Affine(0, e)) for s, e in _runs(piece.straight))
        prefix, suffix = self.prefix[piece.head], self.suffix[piece.head]
        terms = [
            Term(Affine(self.slope, start - self.zero), Affine(self.slope, end - self.zero))
            for start, end in _runs(piece.sheared)
        ]
        if prefix:
            terms.insert(0, Term(Affine(0, 0), Affine(0, prefix)))
        if suffix:
            terms.append(Term(Affine(0, self.columns - suffix), Affine(0, self.columns)))
        return tuple(terms)
