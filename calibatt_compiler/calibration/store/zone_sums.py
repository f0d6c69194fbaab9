"""Sums of squared energies over the inputs of a run: what zones are fitted to.

    sums/<rank>-<site>.safetensors      sums of one site over the inputs that a rank observed

An input is added to its sites one after the other, then its own record is written. Each file names
the inputs that it holds, so what was killed between two sites goes on with the next one. Squares
are summed in whole units: the order of inputs and the number of ranks change nothing. A file holds
the lower 32 bits of each sum, and the others in as few bytes as the largest sum takes.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
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

FORMAT = "calibatt-zone-sums-2"
FOLDER = "sums"

SQUARE_UNITS = 1 << 36
"""Whole units of a squared energy of 1: the square of 1e-5 counts 7, and a sum of up to 1/16 needs
no more than 32 bits. At the prices of plans smaller energies cost nothing."""

Units = npt.NDArray[np.int64]

LOW_BITS = 32
HIGH = (np.uint8, np.uint16, np.uint32)


def units(energy: Tensor) -> Tensor:
    """Sum squared energies of one call over its votes, in whole units, on their device.

    Args:
        energy: float (votes, heads, rows, columns), finite, at most 1.

    Returns:
        int64 (heads, rows, columns).
    """
    return (energy.double().square() * SQUARE_UNITS).round().long().sum(0)


def bytes_of_sums(votes: int) -> int:
    """Return the most bytes that a file needs for the sum of so many votes."""
    bits = (SQUARE_UNITS * votes).bit_length() - LOW_BITS
    return LOW_BITS // 8 + next(np.dtype(t).itemsize for t in HIGH if np.iinfo(t).bits >= bits)


@dataclass
class GroupSums:
    """Sums of one site over one step group.

    Attributes:
        squares: int64 (heads, rows, columns), of squared energies of blocks without text.
        votes: how many calls' samples were added.
    """

    squares: Units
    votes: int = 0

    def add(self, squares: Units, votes: int) -> None:
        """Add what `units` returned, on the host."""
        self.squares += squares
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
        names, votes = [name], Counter({group: sums.votes for group, sums in groups.items()})
        header = self._header(path) if path.exists() else {"names": [], "votes": {}}
        names += header["names"]
        votes.update({int(group): count for group, count in header["votes"].items()})
        tensors: dict[str, npt.NDArray[Any]] = {}
        for group in votes:
            parts = [groups[group].squares] if group in groups else []
            if str(group) in header["votes"]:
                parts.append(self._units(path, header, group))
            tensors |= _packed(group, parts[0] if len(parts) == 1 else parts[0] + parts[1])
        text = json.dumps(
            {
                "site": site,
                "names": sorted(names),
                "votes": votes,
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
            squares = self._units(path, header, group)
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

    def _units(self, path: Path, header: Mapping[str, Any], group: int) -> Units:
        names = {part: f"{part}@{group}" for part in ("low", "high")}
        try:
            with safe_open(path, framework="numpy") as opened:
                parts = {
                    part: opened.get_tensor(key)
                    for part, key in names.items()
                    if key in header["sha256"]
                }
            for part, array in parts.items():
                if _sha256(array) != header["sha256"][names[part]]:
                    raise ValueError(f"tensor {names[part]} was changed")
            found: Units = parts["low"].astype(np.int64)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise _damaged(path, error) from error
        if "high" in parts:
            found |= parts["high"].astype(np.int64) << LOW_BITS
        return found


def _packed(group: int, sums: Units) -> dict[str, npt.NDArray[Any]]:
    """The tensors of a file: see the module."""
    high = sums >> LOW_BITS
    largest = int(high.max(initial=0))
    found = {f"low@{group}": sums.astype(np.uint32)}
    if largest:
        kind = next(kind for kind in HIGH if largest <= np.iinfo(kind).max)
        found[f"high@{group}"] = high.astype(kind)
    return found


def _key(site: str) -> str:
    return hashlib.sha256(site.encode()).hexdigest()[:16]


def _sha256(array: npt.NDArray[Any]) -> str:
    h = hashlib.sha256(f"{array.dtype.name} {array.shape}".encode())
    h.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data)
    return h.hexdigest()


def _damaged(path: Path, what: object) -> CalibrationError:
    return CalibrationError(
        f"the sums of a calibration in {path} are damaged",
        expected="the file as it was written",
        got=what,
        remedy="restart the run (--restart, CalibrationConfig(restart=True)): sums can't be told "
        "apart into inputs",
    )
