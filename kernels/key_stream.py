"""A pattern's kept key blocks on a device, one after the other, as the table kernel reads them.

Intervals would be smaller where masks have long runs. But a kernel that walks them has to compare,
and to load the next one, between one block and the next, and is 5 to 7 % slower on an H100:
benchmarks/RESULTS.md, "Which form of the portable kernel".
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calibatt_compiler.kernels.copies import to_device
from calibatt_compiler.plan.pattern import BlockPattern


@dataclass(frozen=True, eq=False)
class KeyStream:
    """A pattern's kept blocks on a device, packed row after row.

    Attributes:
        offsets: int32 (heads * query_blocks + 1), first entry of each row.
        blocks: int16 or int32 (entries + 1). Of each row, if it keeps any block: the one that holds
            the keys of a fixed softmax reference (see `reference_blocks`), then all kept ones from
            the lowest upwards. A spare entry at the end, for a kernel that reads one ahead.
        weights: uint8 (entries), code of each entry's weight; empty if all blocks count once.
        kept: uint8 (heads * query_blocks * bytes a row), a bit a key block; empty without pooling.
        uploaded: recorded behind their copies to a GPU.
    """

    offsets: Tensor
    blocks: Tensor
    weights: Tensor
    kept: Tensor
    uploaded: torch.cuda.Event | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in the order of the kernel's arguments."""
        return self.offsets, self.blocks, self.weights, self.kept

    @property
    def nbytes(self) -> int:
        """Bytes that they take on the device."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @classmethod
    def upload(cls, pattern: BlockPattern, device: torch.device) -> KeyStream:
        """Make the stream of `pattern`; 16-bit entries where they suffice.

        To a GPU it is copied from pinned memory on the current stream, and not waited for.
        """
        none = np.empty(0, dtype=np.uint8)
        offsets, blocks = key_blocks(pattern)
        weights = none
        if pattern.weights is not None:
            codes = pattern.weights.reshape(-1, pattern.key_blocks)
            weights = codes[np.repeat(np.arange(len(codes)), np.diff(offsets)), blocks[:-1]]
        bits = pattern.bits.ravel() if pattern.pooled else none
        made = (to_device(array, device) for array in (offsets, blocks, weights, bits))
        on_offsets, on_blocks, on_weights, on_bits = made
        uploaded = None
        if device.type == "cuda":
            uploaded = torch.cuda.Event()  # type: ignore[no-untyped-call]
            uploaded.record(torch.cuda.current_stream(device))
        return cls(on_offsets, on_blocks, on_weights, on_bits, uploaded)


def key_blocks(pattern: BlockPattern) -> tuple[npt.NDArray[np.int32], npt.NDArray[Any]]:
    """`offsets` and `blocks` of a pattern's `KeyStream`."""
    columns = pattern.key_blocks
    # One more column before the others, for the entry of the reference.
    marked = np.empty((pattern.heads * pattern.query_blocks, columns + 1), np.bool_)
    marked[:, 1:] = pattern.numpy_mask().reshape(-1, columns)
    marked[:, 0] = pattern.bits.any(-1).ravel()
    position = np.flatnonzero(marked)
    offsets = np.searchsorted(position, np.arange(len(marked) + 1) * (columns + 1))
    row = np.repeat(np.arange(len(marked)), np.diff(offsets))
    blocks = np.empty(len(position) + 1, np.int16 if columns < 2**15 else np.int32)
    blocks[:-1] = position - row * (columns + 1) - 1
    blocks[-1] = 0
    rows = np.flatnonzero(marked[:, 0])
    diagonal = rows % pattern.query_blocks * pattern.block_m // pattern.block_n
    found = np.searchsorted(position, rows * (columns + 1) + 1 + np.minimum(diagonal, columns))
    blocks[offsets[rows]] = blocks[np.minimum(found, offsets[rows + 1] - 1)]
    return offsets.astype(np.int32), blocks


_lock = threading.Lock()
_streams: WeakValueDictionary[tuple[str, str], KeyStream] = WeakValueDictionary()


def key_stream(pattern: BlockPattern, device: torch.device) -> KeyStream:
    """Stream of `pattern` on `device`, shared by the kernels of equal patterns while one lives."""
    key = (pattern.digest, str(device))
    with _lock:
        stream = _streams.get(key)
    if stream is None:
        made = KeyStream.upload(pattern, device)
        with _lock:
            stream = _streams.setdefault(key, made)
    if stream.uploaded is not None:  # perhaps by another thread, on another stream
        torch.cuda.current_stream(device).wait_event(stream.uploaded)
    return stream
