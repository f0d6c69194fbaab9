"""Kept key blocks as runs: what kernels walk."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Intervals:
    """Runs of kept key blocks, row by row, as in a compressed sparse row matrix.

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
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    runs = Intervals(offsets, start.astype(np.int32), (end + 1).astype(np.int32))
    return runs, values[row, start]


def runs_of_bits(bits: npt.NDArray[np.uint8]) -> Intervals:
    """Runs of set bits in each row of a packed matrix, without weights.

    The same as `runs_of`, several times as fast: it is what a sampler waits for when a step begins.

    Args:
        bits: uint8 (..., bytes a row), little-endian bit order; padding bits are zero.
    """
    width = bits.shape[-1]
    packed = bits.reshape(-1, width)
    one, seven = np.uint8(1), np.uint8(7)
    before, after = packed << one, packed >> one
    before[:, 1:] |= packed[:, :-1] >> seven
    after[:, :-1] |= packed[:, 1:] << seven
    first, last = _set_bits(packed & ~before), _set_bits(packed & ~after)
    row, start = np.divmod(first, 8 * width)
    offsets = np.searchsorted(row, np.arange(len(packed) + 1)).astype(np.int32)
    end = last - row * (8 * width) + 1
    return Intervals(offsets, start.astype(np.int32), end.astype(np.int32))


def _set_bits(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    return np.flatnonzero(np.unpackbits(packed.reshape(-1), bitorder="little").view(np.bool_))
