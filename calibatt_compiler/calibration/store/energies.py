"""Energies on disk: until their threshold is known, and until their input is stored."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from calibatt_compiler.calibration.store.own_files import remove_spool
from calibatt_compiler.files import naming


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
        votes = len(energy) + (0 if before is None else len(before))
        mapped = self._mapped("kept", energy.dtype, (votes, *energy.shape[1:]))
        mapped[-len(energy) :] = energy
        if before is not None:
            assert isinstance(before, np.memmap)
            mapped[: len(before)] = before
            Path(str(before.filename)).unlink()
        return mapped

    def shelve(self, sums: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Write sums that are not expected to grow, and return them mapped; mapped ones as is."""
        if isinstance(sums, np.memmap):
            return sums
        mapped = self._mapped("sums", sums.dtype, sums.shape)
        mapped[...] = sums
        return mapped

    def _mapped(self, kind: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
        path = self._folder / f"{kind}-{self._kept:06d}.npy"
        self._kept += 1
        with naming(path):
            self._folder.mkdir(parents=True, exist_ok=True)
            mapped = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
            with path.open("r+b") as file:
                # Taken now: a full disk would end the process when a mapped page is written.
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        return mapped

    def put(self, site: str, step: int, energy: npt.NDArray[np.float32]) -> None:
        """Write the energies of one call."""
        with naming(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{len(self._entries):06d}.npy"
        with naming(path):
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
