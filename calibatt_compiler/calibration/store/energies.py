"""Energies on disk: until their threshold is known, and until their input is stored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from calibatt_compiler.calibration.store.own_files import remove_spool


class EnergyBuffer:
    """Arrays in a folder: some given back in the order they came, others mapped.

    Args:
        folder: made at the first array, removed by `clear`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._entries: list[tuple[str, int, Path]] = []
        self._kept = 0

    def keep(
        self, energy: npt.NDArray[Any], before: npt.NDArray[Any] | None = None
    ) -> npt.NDArray[Any]:
        """Write energies, behind earlier ones of the same call, and return them mapped.

        Args:
            energy: (votes, heads, query_blocks, key_blocks).
            before: what this returned earlier, which is gone afterwards.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"kept-{self._kept:06d}.npy"
        self._kept += 1
        votes = len(energy) + (0 if before is None else len(before))
        shape = (votes, *energy.shape[1:])
        mapped = np.lib.format.open_memmap(path, mode="w+", dtype=energy.dtype, shape=shape)
        mapped[-len(energy) :] = energy
        if before is not None:
            assert isinstance(before, np.memmap)
            mapped[: len(before)] = before
            Path(str(before.filename)).unlink()
        return mapped

    def zeros(self, shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
        """Return whole numbers to be summed up, on disk; 0 at first."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"sums-{self._kept:06d}.npy"
        self._kept += 1
        return np.lib.format.open_memmap(path, mode="w+", dtype=np.int64, shape=shape)

    def put(self, site: str, step: int, energy: npt.NDArray[np.float32]) -> None:
        """Write the energies of one call."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{len(self._entries):06d}.npy"
        np.save(path, energy, allow_pickle=False)
        self._entries.append((site, step, path))

    def drain(self) -> Iterator[tuple[str, int, npt.NDArray[np.float32]]]:
        """Read all back, one at a time, deleting as it goes."""
        for site, step, path in self._entries:
            energy: npt.NDArray[np.float32] = np.load(path, allow_pickle=False)
            path.unlink()
            yield site, step, energy
        self._entries = []

    def clear(self) -> None:
        """Forget and delete everything, what a killed process left included."""
        self._entries = []
        remove_spool(self._folder)
