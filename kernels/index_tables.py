"""A pattern's kept key blocks on a device, as the table kernel reads them."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calibatt_compiler.kernels.uploads import Uploaded, to_device
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
            the keys of a fixed softmax reference, which is the lowest kept one from the diagonal
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

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in the order of the kernel's arguments."""
        return self.offsets, self.blocks, self.weights, self.kept

    @property
    def nbytes(self) -> int:
        """Bytes that they take on the device."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @classmethod
    def upload(cls, pattern: BlockPattern, device: torch.device) -> IndexTables:
        """Make the tables of `pattern`; 16-bit entries where they suffice.

        To a GPU they are copied from pinned memory on the current stream, and not waited for.
        """
        runs = pattern.intervals()
        lengths = (runs.ends - runs.starts).astype(np.int64)
        sums = np.concatenate([[0], np.cumsum(lengths)])
        kept = np.arange(sums[-1]) + np.repeat(runs.starts - sums[:-1], lengths)
        first = sums[runs.offsets]
        # Each row that keeps a block has another entry before its blocks.
        more = np.concatenate([[0], np.cumsum(np.diff(first) > 0)])
        offsets = first + more
        places = np.arange(sums[-1]) + np.repeat(more[1:], np.diff(first))
        blocks = np.zeros(offsets[-1] + 1, np.int16 if pattern.key_blocks < 2**15 else np.int32)
        blocks[places] = kept
        rows = np.flatnonzero(np.diff(first))
        blocks[offsets[rows]] = kept[_reference(pattern, kept, first, rows)]
        log2_weights = np.empty(0, dtype=np.float16)
        if runs.log_weights is not None:
            # Sixteenths below 16: exact in 16 bits.
            each = np.round(runs.log_weights * (STEPS * math.log2(math.e))) / STEPS
            log2_weights = np.zeros(offsets[-1], dtype=np.float16)
            log2_weights[places] = np.repeat(each, lengths)
        bits = pattern.bits.ravel() if pattern.pooled else np.empty(0, dtype=np.uint8)
        arrays = (offsets.astype(np.int32), blocks, log2_weights, bits)
        starts, entries, weights, bytes_kept = (to_device(array, device) for array in arrays)
        return cls(starts, entries, weights, bytes_kept, Uploaded(device))


def _reference(
    pattern: BlockPattern,
    kept: npt.NDArray[np.int64],
    first: npt.NDArray[np.int64],
    rows: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """Where in `kept` the reference block of each of `rows` is; `first` is where a row starts."""
    columns = pattern.key_blocks
    ranks = np.repeat(np.arange(len(first) - 1), np.diff(first)) * columns + kept
    diagonal = rows % pattern.query_blocks * pattern.block_m // pattern.block_n
    found = np.searchsorted(ranks, rows * columns + np.minimum(diagonal, columns))
    at: npt.NDArray[np.int64] = np.minimum(found, first[rows + 1] - 1)
    return at


_lock = threading.Lock()
_tables: WeakValueDictionary[tuple[str, str], IndexTables] = WeakValueDictionary()


def index_tables(pattern: BlockPattern, device: torch.device) -> IndexTables:
    """Tables of `pattern` on `device`, shared by the kernels of equal patterns while one lives."""
    key = (pattern.digest, str(device))
    with _lock:
        tables = _tables.get(key)
    if tables is None:
        made = IndexTables.upload(pattern, device)
        with _lock:
            tables = _tables.setdefault(key, made)
    tables.uploaded.wait()  # perhaps by another thread, on another stream
    return tables
