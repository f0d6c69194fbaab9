"""A pattern's kept key blocks on a device, as the table kernel reads them."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from weakref import WeakValueDictionary

import numpy as np
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
        blocks: int16 or int32 (entries + 1), key blocks, increasing within a row; a spare behind
            the last.
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
        entry = np.int16 if pattern.key_blocks < 2**15 else np.int32
        blocks = np.zeros(sums[-1] + 1, entry)
        blocks[:-1] = np.arange(sums[-1]) + np.repeat(runs.starts - sums[:-1], lengths)
        log2_weights = np.empty(0, dtype=np.float16)
        if runs.log_weights is not None:
            # Sixteenths below 16: exact in 16 bits.
            each = np.round(runs.log_weights * (STEPS * math.log2(math.e))) / STEPS
            log2_weights = np.repeat(each, lengths).astype(np.float16)
        bits = pattern.bits.ravel() if pattern.pooled else np.empty(0, dtype=np.uint8)
        arrays = (sums[runs.offsets].astype(np.int32), blocks, log2_weights, bits)
        offsets, entries, weights, kept = (to_device(array, device) for array in arrays)
        return cls(offsets, entries, weights, kept, Uploaded(device))


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
