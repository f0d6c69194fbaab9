"""Kept key blocks as runs: what kernels walk."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Intervals:
    """Runs of kept key blocks, row by row, the way of a compressed sparse row matrix.

    Row `head * query_blocks + query_block` owns the runs `offsets[row]` to `offsets[row + 1]`;
    run `i` covers the key blocks `starts[i]` to `ends[i]` (exclusive). Runs of a row are sorted
    and neither overlap nor, if of one weight, touch. Offsets and bounds are int32.

    Attributes:
        log_weights: float32, natural logarithm of each run's weight; None if all count once.
    """

    offsets: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int32]
    ends: npt.NDArray[np.int32]
    log_weights: npt.NDArray[np.float32] | None = None


def sums_before(counts: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Sum of all numbers before each, and of all at the end; one more than there are numbers."""
    sums = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=sums[1:])
    return sums


def expand(starts: npt.NDArray[Any], lengths: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """The numbers of runs, `starts[i]` to `starts[i] + lengths[i]`, one run after another."""
    sums = sums_before(lengths)
    return np.arange(sums[-1]) + np.repeat(starts - sums[:-1], lengths)


def first_behind(
    runs: Intervals, rows: npt.NDArray[Any], wanted: npt.NDArray[Any], columns: int
) -> npt.NDArray[np.int64]:
    """For each of `rows` its first run that ends behind a key block; `offsets[row + 1]` for none.

    Args:
        runs: of all rows.
        rows: some of them, each with a run.
        wanted: a key block for each of `rows`.
        columns: key blocks of a row.
    """
    counts = np.diff(runs.offsets)
    numbers = np.arange(len(counts), dtype=_index_type(len(counts) * (columns + 1)))
    ranks = runs.ends + np.repeat(numbers * (columns + 1), counts)
    found = np.searchsorted(ranks, rows * (columns + 1) + wanted, side="right")
    at: npt.NDArray[np.int64] = np.minimum(found, runs.offsets[rows + 1])
    return at


def runs_of(values: npt.NDArray[np.int16]) -> tuple[Intervals, npt.NDArray[np.int16]]:
    """Runs of equal values in each row of a matrix; negative values are in no run.

    Returns:
        The runs, without weights, and the value of each.
    """
    rows, columns = values.shape
    edged = np.full((rows, columns + 2), -1, dtype=np.int16)
    edged[:, 1:-1] = values
    change = edged[:, 1:] != edged[:, :-1]
    row, start = np.nonzero(change[:, :-1] & (values >= 0))
    _, end = np.nonzero(change[:, 1:] & (values >= 0))
    counts = np.bincount(row, minlength=rows)
    offsets = sums_before(counts).astype(np.int32)
    runs = Intervals(offsets, start.astype(np.int32), (end + 1).astype(np.int32))
    return runs, values[row, start]


def runs_of_bits(bits: npt.NDArray[np.uint8]) -> Intervals:
    """Runs of set bits in each row of a packed matrix, without weights.

    The same as `runs_of`, several times as fast: it is what a sampler waits for when a step begins.

    Args:
        bits: uint8 (..., bytes a row), little-endian bit order; padding bits are zero.
    """
    width = bits.shape[-1] + 1  # a spare byte, where a run that reaches the end can end
    edged = np.zeros((math.prod(bits.shape[:-1]), width), np.uint8)
    edged[:, :-1] = bits.reshape(-1, width - 1)
    # A bit where the row changes: starts and ends take turns.
    change = edged ^ (edged << np.uint8(1))
    change[:, 1:] ^= edged[:, :-1] >> np.uint8(7)
    places = np.flatnonzero(np.unpackbits(change.reshape(-1), bitorder="little").view(np.bool_))
    index = _index_type(8 * edged.size)
    starts, ends = places[::2].astype(index), places[1::2].astype(index)
    row_starts = np.arange(len(edged) + 1, dtype=index) * (8 * width)
    offsets = np.searchsorted(starts, row_starts)
    base = np.repeat(row_starts[:-1], np.diff(offsets))
    starts -= base
    ends -= base
    return Intervals(
        offsets.astype(np.int32),
        starts.astype(np.int32, copy=False),
        ends.astype(np.int32, copy=False),
    )


def _index_type(most: int) -> type[np.signedinteger[Any]]:
    """The smaller integer that holds numbers up to `most`: half the memory to go through."""
    return np.int32 if most < 1 << 31 else np.int64
