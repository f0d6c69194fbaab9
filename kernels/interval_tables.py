"""A pattern's intervals on a device, as the table kernel reads them."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from calibatt_compiler.kernels.copies import to_device
from calibatt_compiler.plan.pattern import BlockPattern


@dataclass(frozen=True, eq=False)
class IntervalTables:
    """A pattern's intervals on a device, packed row after row.

    Attributes:
        offsets: int32 (heads * query_blocks + 1), first entry of each row.
        ends: int16 or int32 (entries), kept blocks of the row up to the end of each interval.
        shifts: likewise, key block minus its position among the kept blocks of its row.
        weights: float32 (entries), log2 of each interval's weight; empty if all count once.
        kept: uint8 (heads * query_blocks * bytes a row), a bit a key block; empty without pooling.
        uploaded: recorded behind their copies to a GPU.
    """

    offsets: Tensor
    ends: Tensor
    shifts: Tensor
    weights: Tensor
    kept: Tensor
    uploaded: torch.cuda.Event | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in the order of the kernel's arguments."""
        return self.offsets, self.ends, self.shifts, self.weights, self.kept

    @property
    def nbytes(self) -> int:
        """Bytes that they take on the device."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @classmethod
    def upload(cls, pattern: BlockPattern, device: torch.device) -> IntervalTables:
        """Make the tables of `pattern`; 16-bit entries where they suffice.

        To a GPU they are copied from pinned memory on the current stream, and not waited for.
        """
        runs = pattern.intervals()
        lengths = runs.ends - runs.starts
        sums = np.cumsum(lengths, dtype=np.int64)
        row_start = np.concatenate([[0], sums])[runs.offsets[:-1]]
        sums -= np.repeat(row_start, np.diff(runs.offsets))
        moved = runs.ends - sums
        entry = np.int16 if pattern.key_blocks < 2**15 else np.int32
        log2_weights = np.empty(0, dtype=np.float32)
        if runs.log_weights is not None:
            log2_weights = runs.log_weights * np.float32(math.log2(math.e))
        bits = pattern.bits.ravel() if pattern.pooled else np.empty(0, dtype=np.uint8)
        arrays = (runs.offsets, sums.astype(entry), moved.astype(entry), log2_weights, bits)
        offsets, ends, shifts, weights, kept = (to_device(array, device) for array in arrays)
        uploaded = None
        if device.type == "cuda":
            uploaded = torch.cuda.Event()  # type: ignore[no-untyped-call]
            uploaded.record(torch.cuda.current_stream(device))
        return cls(offsets, ends, shifts, weights, kept, uploaded)


_lock = threading.Lock()
_tables: WeakValueDictionary[tuple[str, str], IntervalTables] = WeakValueDictionary()


def interval_tables(pattern: BlockPattern, device: torch.device) -> IntervalTables:
    """Tables of `pattern` on `device`, shared by the kernels of equal patterns while one lives."""
    key = (pattern.digest, str(device))
    with _lock:
        tables = _tables.get(key)
    if tables is None:
        made = IntervalTables.upload(pattern, device)
        with _lock:
            tables = _tables.setdefault(key, made)
    if tables.uploaded is not None:  # perhaps by another thread, on another stream
        torch.cuda.current_stream(device).wait_event(tables.uploaded)
    return tables
