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
