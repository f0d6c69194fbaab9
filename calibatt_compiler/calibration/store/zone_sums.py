"""Sums of energies over the inputs of a run: what zones are fitted to, however many inputs.

    sums/<rank>-<site>.safetensors      sums of one site over the inputs that a rank observed

An input is added to its sites one after the other, then its own record is written. Each file names
the inputs that it holds, so what was killed between two sites goes on with the next one. Energies
are summed in whole units: the order of inputs and the number of ranks change nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from calibatt_compiler.errors import CalibrationError
from calibatt_compiler.files import replacing

FORMAT = "calibatt-zone-sums"
FOLDER = "sums"

ENERGY_UNITS, SQUARE_UNITS = 1 << 32, 1 << 44
"""Whole units of an energy of 1 and of its square: the square of 1e-6 counts 18."""

Units = npt.NDArray[np.int64]
KINDS = ("energies", "squares")


def units(energy: Tensor) -> dict[str, Tensor]:
    """Sum energies of one call over its votes, in whole units, on their device.

    Args:
        energy: float (votes, heads, rows, columns), finite, at most 1.

    Returns:
        int64 (heads, rows, columns) by kind: `energies` and `squares`.
    """
    exact = energy.double()
    found = {"energies": exact * ENERGY_UNITS, "squares": exact.square() * SQUARE_UNITS}
    return {kind: values.round().long().sum(0) for kind, values in found.items()}


@dataclass
class GroupSums:
    """Sums of one site over one step group.

    Attributes:
        energies: int64 (heads, rows, columns), blocks without text.
        squares: of that shape, of squared energies.
        votes: how many calls' samples were added.
    """

    energies: Units
    squares: Units
    votes: int = 0

    def add(self, sums: Mapping[str, Units], votes: int) -> None:
        """Add what `units` returned, on the host."""
        for kind in KINDS:
            getattr(self, kind)[...] += sums[kind]
        self.votes += votes


class ZoneSums:
    """The sums of a run folder.

    Args:
        run_folder: of the run.
        rank: whose files `add` writes.
    """

    def __init__(self, run_folder: Path, rank: int = 0) -> None:
        self.folder = run_folder / FOLDER
        self._rank = rank

    def add(self, name: str, site: str, groups: Mapping[int, GroupSums]) -> None:
        """Add an input to the sums of a site, unless it is in already.

        Args:
            name: of the input.
            site: its name.
            groups: by step group.

        Raises:
            CalibrationError: a file is damaged.
        """
        if name in self.names(site):
            return
        path = self._path(self._rank, site)
        # Copies: what was handed in stays what it was.
        merged = {
            group: GroupSums(sums.energies.copy(), sums.squares.copy(), sums.votes)
            for group, sums in groups.items()
        }
        names = [name]
        if path.exists():
            header = self._header(path)
            names += header["names"]
            for group, votes in header["votes"].items():
                held = {kind: self._tensor(path, header, kind, int(group)) for kind in KINDS}
                merged[int(group)].add(held, votes)
        tensors = {
            f"{kind}@{group}": getattr(sums, kind)
            for group, sums in merged.items()
            for kind in KINDS
        }
        text = json.dumps(
            {
                "site": site,
                "names": sorted(names),
                "votes": {str(group): sums.votes for group, sums in merged.items()},
                "sha256": {key: _sha256(array) for key, array in tensors.items()},
            },
            sort_keys=True,
        )
        digest = hashlib.sha256(text.encode()).hexdigest()
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={FORMAT: f"{digest}\n{text}"})

    def names(self, site: str) -> set[str]:
        """Return the inputs that were added to a site, by any rank."""
        return {name for path in self._paths(site) for name in self._header(path)["names"]}

    def mean_squares(self, site: str, group: int, names: Sequence[str]) -> npt.NDArray[np.float64]:
        """Return the mean squared energies of a site at a step group.

        Args:
            site: its name.
            group: the step group.
            names: the inputs that are to be in it, no more and no less.

        Returns:
            float64 (heads, rows, columns), blocks without text.

        Raises:
            CalibrationError: other inputs are in it, or a file is damaged.
        """
        if self.names(site) != set(names):
            raise CalibrationError(
                f"the sums of site {site} are of other inputs than the plan",
                expected=f"the inputs {sorted(names)[:8]}",
                got=sorted(self.names(site))[:8],
                remedy="run the same calibration again to finish what was begun; to leave inputs "
                "out, restart the run (--restart, CalibrationConfig(restart=True))",
            )
        total: Units | None = None
        votes = 0
        for path in self._paths(site):
            header = self._header(path)
            squares = self._tensor(path, header, "squares", group)
            total = squares if total is None else total + squares
            votes += header["votes"][str(group)]
        assert total is not None
        found: npt.NDArray[np.float64] = total / (float(SQUARE_UNITS) * votes)
        return found

    def _paths(self, site: str) -> list[Path]:
        return sorted(self.folder.glob(f"*-{_key(site)}.safetensors"))

    def _path(self, rank: int, site: str) -> Path:
        return self.folder / f"{rank:05d}-{_key(site)}.safetensors"

    def _header(self, path: Path) -> dict[str, Any]:
        try:
            with safe_open(path, framework="numpy") as opened:
                entry: dict[str, str] = opened.metadata() or {}
            digest, _, text = entry.get(FORMAT, "").partition("\n")
            if set(entry) != {FORMAT} or digest != hashlib.sha256(text.encode()).hexdigest():
                raise ValueError("its header was changed or is of another format")
            found: dict[str, Any] = json.loads(text)
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(path, error) from error
        return found

    def _tensor(self, path: Path, header: Mapping[str, Any], kind: str, group: int) -> Units:
        key = f"{kind}@{group}"
        try:
            with safe_open(path, framework="numpy") as opened:
                array: Units = opened.get_tensor(key)
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(path, error) from error
        if _sha256(array) != header["sha256"].get(key):
            raise _damaged(path, f"tensor {key} was changed")
        return array


def _key(site: str) -> str:
    return hashlib.sha256(site.encode()).hexdigest()[:16]


def _sha256(array: Units) -> str:
    h = hashlib.sha256(f"{array.shape}".encode())
    h.update(np.ascontiguousarray(array, "<i8").data)
    return h.hexdigest()


def _damaged(path: Path, what: object) -> CalibrationError:
    return CalibrationError(
        f"the sums of a calibration in {path} are damaged",
        expected="the file as it was written",
        got=what,
        remedy="restart the run (--restart, CalibrationConfig(restart=True)): sums can't be told "
        "apart into inputs",
    )
