"""Tables of a pattern's copied rows, as kernels read them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calibatt_compiler.kernels.common.uploads import DeviceTableCache, Uploaded, to_device
from calibatt_compiler.plan.copies import AnchorRows
from calibatt_compiler.plan.pattern import BlockPattern


@dataclass(frozen=True, eq=False)
class CopyTables:
    """What a row-shared head computes and where it stores it.

    Attributes:
        computed: int32 (n,), the positions that are computed, increasing.
        targets: int32 (slots, n), the positions that take the output of each of them, itself
            among them, increasing; -1 where there are fewer than `slots`. Read-only, contiguous.
    """

    computed: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]


def copy_tables(pattern: BlockPattern) -> CopyTables | None:
    """Return the tables of a pattern, None if no head is row-shared."""
    if pattern.repetitive is None:
        return None
    assert pattern.copies is not None
    return _tables(pattern.copies, pattern.query_length)


@functools.lru_cache(maxsize=32)
def _tables(copies: AnchorRows, length: int) -> CopyTables:
    computed, sources = copies.computed(length), copies.sources(length)
    order = np.argsort(sources, kind="stable")
    source = sources[order]
    counts = np.bincount(source)
    slot = np.arange(length) - (np.cumsum(counts) - counts)[source]
    targets = np.full((counts.max(), len(computed)), -1, np.int32)
    targets[slot, source] = order
    targets.setflags(write=False)
    return CopyTables(computed, targets)


@dataclass(frozen=True, eq=False)
class _Shared:
    """The tables of `CopyTables` on a device, for all heads and patterns that copy alike."""

    computed: Tensor
    targets: Tensor
    uploaded: Uploaded


@dataclass(frozen=True, eq=False)
class DeviceCopies:
    """A pattern's copied rows on a device.

    Attributes:
        repetitive: uint8 (heads,), which heads are row-shared.
        shared: what these compute and copy.
    """

    repetitive: Tensor
    shared: _Shared

    @property
    def nbytes(self) -> int:
        """Bytes that the tables take on the device, shared or not."""
        return self.repetitive.nbytes + self.shared.computed.nbytes + self.shared.targets.nbytes

    def arguments(self) -> dict[str, Any]:
        """The tables and their sizes as arguments of a kernel, by name."""
        slots, rows = self.shared.targets.shape
        return {
            "repetitive_ptr": self.repetitive,
            "computed_ptr": self.shared.computed,
            "targets_ptr": self.shared.targets,
            "computed_rows": rows,
            "slots": slots,
        }

    @classmethod
    def upload(
        cls, pattern: BlockPattern, device: torch.device, *, whole: int = 1
    ) -> DeviceCopies | None:
        """Return the tables of a pattern on a device, None if no head is row-shared.

        They are filled up to a multiple of `whole` rows: by the last row, which no token takes from
        there.

        To a GPU they are copied from pinned memory on the current stream, and not waited for.
        """
        tables = copy_tables(pattern)
        if tables is None or pattern.repetitive is None:
            return None

        def make() -> _Shared:
            more = -len(tables.computed) % whole
            computed = np.pad(tables.computed, (0, more), mode="edge")
            targets = np.pad(tables.targets, ((0, 0), (0, more)), constant_values=-1)
            on_device = to_device(computed, device), to_device(targets, device)
            return _Shared(*on_device, Uploaded(device))

        shared = _shared.get((pattern.copies, pattern.query_length, whole, str(device)), make)
        return cls(to_device(pattern.repetitive.view(np.uint8), device), shared)


_shared: DeviceTableCache[_Shared] = DeviceTableCache()
