"""Energies that wait on disk until the number of steps, and so their threshold, is known."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt


class Spool:
    """Arrays in a folder, given back in the order they came.

    Args:
        folder: made at the first array, removed by `clear`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._entries: list[tuple[str, int, Path]] = []

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
        shutil.rmtree(self._folder, ignore_errors=True)
