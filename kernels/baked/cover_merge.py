"""The search behind a cover: rows merged into segments wherever that adds no block.

Bit sets are Python integers: a union is one `|`, counting runs one shift and one popcount.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from calibatt_compiler.kernels.baked.cover_template import Affine, Segment, Term


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


def _clipped_sum(offset: int, slope: int, rows: tuple[int, int], low: int, high: int) -> int:
    """Sum of `slope * r + offset`, clipped to [low, high], over the rows."""
    first, last = rows
    rising = min(max(-((offset - low) // slope), first), last)
    flat = min(max(-((offset - high) // slope), rising), last)
    count = flat - rising
    middle = slope * (rising + flat - 1) * count // 2 + offset * count
    return low * (rising - first) + middle + high * (last - flat)


@dataclass(frozen=True)
class _Piece:
    """A segment in the making: its rows' blocks as bit sets, and the form chosen for them."""

    first: int
    last: int
    kept: int
    straight: int
    """Union of the rows; bit c is key block c."""
    sheared: int
    """Union without prefix and suffix; bit `c - slope * r + slope * query_blocks`."""
    intervals: int
    diagonal: bool = False

    @property
    def literals(self) -> int:
        return 1 + 2 * self.intervals


class HeadSegments:
    """Segments of one head: what its rows are merged into.

    Args:
        mask: bool (query_blocks, key_blocks).
        slope: key blocks that a diagonal moves by from row to row.
        max_intervals: that a segment may have, unless one of its rows alone has more.
    """

    def __init__(self, mask: npt.NDArray[np.bool_], slope: int, max_intervals: int) -> None:
        self.slope, self.max_intervals = slope, max_intervals
        rows, self.columns = (int(size) for size in mask.shape)
        self.zero = slope * rows  # bit of the diagonal in a sheared set
        # Runs at either edge that nine rows in ten have are global columns of the diagonal form.
        lead = np.where(mask.all(1), self.columns, np.argmin(mask, axis=1))
        tail = np.where(mask.all(1), self.columns, np.argmin(mask[:, ::-1], axis=1))
        self.prefix, suffix = (int(np.quantile(x, 0.1, method="lower")) for x in (lead, tail))
        self.suffix = min(suffix, self.columns - self.prefix)
        middle = ((1 << self.columns - self.suffix) - 1) >> self.prefix << self.prefix
        self.pieces = []
        for row, packed in enumerate(np.packbits(mask, axis=-1, bitorder="little")):
            bits = int.from_bytes(packed.tobytes(), "little")
            sheared = (bits & middle) << (self.zero - slope * row)
            piece = _Piece(row, row + 1, bits.bit_count(), bits, sheared, _count_runs(bits))
            self.pieces.append(piece)
        while self._merge():
            pass

    def segments(self) -> tuple[Segment, ...]:
        """The segments in row order, without holes."""
        return tuple(Segment(p.first, p.last, self._terms(p)) for p in self.pieces)

    def _merge(self) -> bool:
        """Merge neighbours wherever that adds nothing, in one pass; return whether any were."""
        merged = self.pieces[:1]
        for piece in self.pieces[1:]:
            both = self._union(merged[-1], piece)
            if both is None:
                merged.append(piece)
            else:
                merged[-1] = both
        changed = len(merged) < len(self.pieces)
        self.pieces = merged
        return changed

    def _union(self, a: _Piece, b: _Piece) -> _Piece | None:
        """The form of `a` and `b` together that saves most literals; None where none saves any."""
        kept, straight, sheared = a.kept + b.kept, a.straight | b.straight, a.sheared | b.sheared
        best: _Piece | None = None
        for diagonal, bits in ((False, straight), (True, sheared)):
            intervals = _count_runs(bits) + (self._edges if diagonal else 0)
            both = _Piece(a.first, b.last, kept, straight, sheared, intervals, diagonal)
            if intervals > self.max_intervals or both.literals >= a.literals + b.literals:
                continue
            blocks = self._area(both) if diagonal else (b.last - a.first) * bits.bit_count()
            if blocks == kept and (best is None or both.literals < best.literals):
                best = both
        return best

    @property
    def _edges(self) -> int:
        return (self.prefix > 0) + (self.suffix > 0)

    def _area(self, piece: _Piece) -> int:
        """Blocks of the diagonal form, prefix and suffix included."""
        rows = (piece.first, piece.last)
        low, high = self.prefix, self.columns - self.suffix
        area = (piece.last - piece.first) * (self.columns - high + low)
        for start, end in _runs(piece.sheared):
            area += _clipped_sum(end - self.zero, self.slope, rows, low, high)
            area -= _clipped_sum(start - self.zero, self.slope, rows, low, high)
        return area

    def _terms(self, piece: _Piece) -> tuple[Term, ...]:
        if not piece.diagonal:
            return tuple(Term(Affine(0, s), Affine(0, e)) for s, e in _runs(piece.straight))
        terms = [
            Term(Affine(self.slope, start - self.zero), Affine(self.slope, end - self.zero))
            for start, end in _runs(piece.sheared)
        ]
        if self.prefix:
            terms.insert(0, Term(Affine(0, 0), Affine(0, self.prefix)))
        if self.suffix:
            terms.append(Term(Affine(0, self.columns - self.suffix), Affine(0, self.columns)))
        return tuple(terms)
