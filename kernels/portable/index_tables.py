"""A pattern's kept key blocks on a device, as the table kernel reads them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calibatt_compiler.kernels.common.uploads import DeviceTableCache, Uploaded, to_device
from calibatt_compiler.plan.intervals import (
    Intervals,
    expand,
    first_behind,
    runs_of_bits,
    sums_before,
)
from calibatt_compiler.plan.pattern import BlockPattern
from calibatt_compiler.plan.weights import STEPS


@dataclass(frozen=True, eq=False)
class IndexTables:
    """The kept key blocks of a pattern on a device, row after row.

    One entry a block, not one an interval: the kernel can then ask for the next entry before it
    needs it. Measured on an H100 that is worth 6 to 9 % of the time.

    Attributes:
        offsets: int32 (heads * query_blocks + 1), first entry of each row.
        blocks: int16 or int32 (entries + 1), key blocks. Of each row that keeps any: the one with
            the keys of a fixed softmax shift, which is the lowest kept one from the diagonal
            on, or the highest; then all kept ones, increasing. A spare behind the last.
        weights: float16 (entries), log2 of each block's weight; empty if all count once.
        kept: uint8 (heads * query_blocks * bytes a row), a bit a key block; empty without pooling.
        uploaded: behind their copies.
    """

    offsets: Tensor
    blocks: Tensor
    weights: Tensor
    kept: Tensor
    uploaded: Uploaded

    def arguments(self) -> dict[str, Tensor]:
        """The tables as arguments of `portable_attention`, by name."""
        names = ("offsets", "blocks", "weights", "kept")
        return {f"{name}_ptr": getattr(self, name) for name in names}

    @property
    def nbytes(self) -> int:
        """Bytes that they take on the device."""
        return sum(tensor.nbytes for tensor in self.arguments().values())

    @classmethod
    def upload(cls, pattern: BlockPattern, device: torch.device) -> IndexTables:
        """Make the tables of `pattern`; 16-bit entries where they suffice.

        To a GPU they are copied from pinned memory on the current stream, and not waited for.
        """
        runs = runs_of_bits(pattern.bits)
        counts = np.diff(runs.offsets)
        rows = np.flatnonzero(counts)
        # Each row that keeps a block has another run before its own: its reference.
        more = sums_before(counts > 0)
        starts = np.empty(len(runs.starts) + len(rows), np.int32)
        lengths = np.ones(len(starts), np.int32)
        place = np.arange(len(runs.starts)) + np.repeat(more[1:], counts)
        starts[place], lengths[place] = runs.starts, runs.ends - runs.starts
        references = runs.offsets[rows] + more[rows]
        starts[references] = _reference(pattern, runs, rows)
        first = runs.offsets + more
        kept = expand(starts, lengths)
        offsets = sums_before(lengths)[first]
        blocks = np.zeros(len(kept) + 1, np.int16 if pattern.key_blocks < 2**15 else np.int32)
        blocks[:-1] = kept
        log2_weights = np.empty(0, dtype=np.float16)
        if pattern.weights is not None:
            kept += np.repeat(np.arange(len(counts)) * pattern.key_blocks, np.diff(offsets))
            # Sixteenths below 16: exact in 16 bits.
            codes = pattern.weights.reshape(-1)[kept]
            log2_weights = codes.astype(np.float16) / np.float16(STEPS)
        bits = pattern.bits.ravel() if pattern.pooled else np.empty(0, dtype=np.uint8)
        arrays = (offsets.astype(np.int32), blocks, log2_weights, bits)
        bounds, entries, weights, bytes_kept = (to_device(array, device) for array in arrays)
        return cls(bounds, entries, weights, bytes_kept, Uploaded(device))


def _reference(
    pattern: BlockPattern, runs: Intervals, rows: npt.NDArray[np.int64]
) -> npt.NDArray[np.int32]:
    """The reference block of each of `rows`."""
    diagonal = rows % pattern.query_blocks * pattern.block_m // pattern.block_n
    at = first_behind(runs, rows, np.minimum(diagonal, pattern.key_blocks), pattern.key_blocks)
    behind = runs.offsets[rows + 1]
    found: npt.NDArray[np.int32] = np.where(
        at < behind,
        np.maximum(runs.starts[np.minimum(at, behind - 1)], diagonal),
        runs.ends[behind - 1] - 1,
    )
    return found


_tables: DeviceTableCache[IndexTables] = DeviceTableCache()


def index_tables(pattern: BlockPattern, device: torch.device) -> IndexTables:
    """Tables of `pattern` on `device`, shared by the kernels of equal patterns while one lives."""
    key = (pattern.digest, str(device))
    return _tables.get(key, lambda: IndexTables.upload(pattern, device))
