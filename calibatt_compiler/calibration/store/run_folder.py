"""The run folder: one file for each finished input, so that a killed run goes on from there.

    run.json                      what the run is: model, weights, settings, arguments
    order.json                    what was measured of token orders, if one was to be chosen
    input-00000.safetensors       masks of one input, packed, with its record in the header
    sums/                         of a run for zones: sums over all inputs, site by site
    lock                          held while a process works in the folder, or several ranks do
    rank-00000                    status of a rank, where several work

A file is written under a temporary name and renamed, so a kill at any moment loses the input in
progress and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pydantic
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from calibatt_compiler.arguments import require_path
from calibatt_compiler.calibration.store import own_files
from calibatt_compiler.calibration.store.lock import FolderLock
from calibatt_compiler.calibration.store.order_survey import FILE as ORDER_FILE
from calibatt_compiler.calibration.store.records import InputRecord
from calibatt_compiler.calibration.store.uint8_energies import decode
from calibatt_compiler.calibration.store.zone_sums import FOLDER as SUMS
from calibatt_compiler.errors import CalibrationError
from calibatt_compiler.files import naming, replacing, write_text
from calibatt_compiler.logs import logger

log = logger("calibration")

FORMAT = "calibatt-calibration-input"
_MARKS = {"format", "model", "settings"}
"""Keys that tell our run.json from one of something else."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class RunStore:
    """Finished inputs of one calibration run, on disk.

    Args:
        folder: made if it does not exist.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        require_path("folder", folder)
        self.folder = Path(folder)
        self._lock = FolderLock(self.folder)
        self._records: dict[str, InputRecord] = {}

    def open(
        self, identity: Mapping[str, Any], *, restart: bool = False, shared: bool = False
    ) -> Self:
        """Take the folder for this process and check that it belongs to this run.

        Args:
            identity: JSON values that must equal those the run was begun with.
            restart: throw away what is there first.
            shared: let other ranks of this run `join`.

        Raises:
            CalibrationError: another process works in it, or it belongs to another run.
        """
        with naming(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._lock.take()
        try:
            self._check_identity(identity, restart=restart)
            own_files.sweep(self.folder)
            own_files.sweep(self.folder / SUMS)
            if shared:
                self._lock.share()
        except BaseException:
            self.close()
            raise
        return self

    def join(self, identity: Mapping[str, Any]) -> Self:
        """Work in the folder that another rank of this run has opened.

        Args:
            identity: see `open`.

        Raises:
            CalibrationError: this process does not see the folder, or the ranks run different
                things.
        """
        if not (self.folder / "run.json").is_file():
            raise CalibrationError(
                "a rank does not see the run folder",
                expected=f"{self.folder} on a file system that all ranks share",
                got=f"no run there, seen from {os.uname().nodename}",
                remedy="choose an output path (--out, out=...) that every machine sees",
            )
        self._lock.join()
        try:
            self._check_identity(identity, joining=True)
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Let other processes have the folder."""
        self._lock.release()

    def remove(self) -> None:
        """Delete what the run wrote, and the folder if it holds nothing else."""
        own_files.sweep(self.folder)
        self._clear()
        self.close()
        own_files.remove_empty(self.folder)

    def identity(self) -> dict[str, Any]:
        """Return the JSON values that the run was begun with.

        Raises:
            CalibrationError: there is no run in the folder.
        """
        path = self.folder / "run.json"
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CalibrationError(
                f"{self.folder} holds no calibration run",
                expected="a folder `<plan>.calibration` that a calibration left",
                got=str(error),
                remedy="calibrate first, with CalibrationConfig(keep_run=True)",
            ) from error
        return found

    def names(self) -> list[str]:
        """Names of the finished inputs, sorted."""
        found = self.folder.glob("input-*.safetensors")
        names = (path.name[len("input-") : -len(".safetensors")] for path in found)
        return sorted(name for name in names if _NAME.fullmatch(name))

    def has(self, name: str) -> bool:
        """Whether an input is finished."""
        return self._path(name).is_file()

    def record(self, name: str) -> InputRecord:
        """Return what is known of a finished input beside its masks.

        Raises:
            CalibrationError: its file is damaged.
        """
        if name not in self._records:
            with self._opened(name) as opened:
                header: dict[str, str] = opened.metadata() or {}
            digest, _, text = header.get(FORMAT, "").partition("\n")
            if set(header) != {FORMAT} or digest != hashlib.sha256(text.encode()).hexdigest():
                raise self._damaged(name, "its header was changed or is of another format")
            try:
                self._records[name] = InputRecord.model_validate_json(text)
            except pydantic.ValidationError as error:
                raise self._damaged(name, f"{error.error_count()} values out of range") from error
        return self._records[name]

    def write(self, record: InputRecord, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
        """Add a finished input; `record.tensors` is filled in here.

        Args:
            record: what is known of it.
            tensors: its arrays by name.

        Raises:
            CalibrationError: the folder is not the one that was opened.
        """
        self._lock.check()
        hashes = {name: _sha256(array) for name, array in tensors.items()}
        record = record.model_copy(update={"tensors": hashes})
        text = record_text(record)
        # One entry: safetensors writes several in random order, and equal inputs make equal files.
        header = {FORMAT: f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}"}
        size = sum(array.nbytes for array in tensors.values())
        with replacing(self._path(record.name), size=size) as temporary:
            save_file(dict(tensors), temporary, metadata=header)
        self._records[record.name] = record

    def tensor(self, name: str, key: str) -> npt.NDArray[Any]:
        """Read one array of a finished input and check it.

        Raises:
            CalibrationError: the file is damaged.
        """
        record = self.record(name)
        with self._opened(name) as opened:
            array: npt.NDArray[Any] = opened.get_tensor(key)
        if _sha256(array) != record.tensors.get(key):
            raise self._damaged(name, f"tensor {key} was changed")
        return array

    def energy(self, record: InputRecord, site: str, step: int) -> npt.NDArray[np.float32]:
        """Read the energies of a finished input, (votes, heads, query_blocks, key_blocks).

        Raises:
            CalibrationError: they were not kept, or the file is damaged.
        """
        key = f"{site}@{step}/energy"
        if key not in record.tensors:
            raise CalibrationError(
                f"the energies of {self.folder} are needed, and were not kept",
                expected="a run with CalibrationConfig(keep_energies=True) or --keep-energies",
                got=f"masks only, for A, C, k = {record.thresholds}",
                remedy="calibrate again with keep_energies=True; without, only rho can be changed",
            )
        stored = self.tensor(record.name, key)
        energy: npt.NDArray[np.float32] = decode(stored) if stored.dtype == np.uint8 else stored
        return energy

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        try:
            with safe_open(self._path(name), framework="numpy") as opened:
                yield opened
        except (SafetensorError, OSError, ValueError) as error:
            raise self._damaged(name, str(error)) from error

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise CalibrationError(
                "the name of an input can't be a file name",
                expected="up to 100 letters, digits, dots, dashes or underscores",
                got=repr(name),
                remedy="name it otherwise, or leave the name out",
            )
        return self.folder / f"input-{name}.safetensors"

    def _damaged(self, name: str, what: str) -> CalibrationError:
        return CalibrationError(
            f"the record of calibration input {name} is damaged",
            expected=f"{self._path(name)} as it was written",
            got=what,
            remedy="delete that file and run the same command again: only this input is repeated",
        )

    def _clear(self) -> None:
        """Delete the finished inputs, and what the run is."""
        for name in self.names():
            path = self._path(name)
            try:
                with safe_open(path, framework="numpy") as opened:
                    foreign = FORMAT not in (opened.metadata() or {})
            except (SafetensorError, OSError, ValueError):
                foreign = False  # a damaged one
            if not foreign:
                path.unlink(missing_ok=True)
        for other in (ORDER_FILE, "run.json"):
            (self.folder / other).unlink(missing_ok=True)
        own_files.remove_sums(self.folder / SUMS)
        self._records.clear()

    def _check_identity(
        self, identity: Mapping[str, Any], *, restart: bool = False, joining: bool = False
    ) -> None:
        """Check that the folder is of this run; make it so if no input of another is finished."""
        path = self.folder / "run.json"
        wanted = json.loads(json.dumps(identity))
        found = self._found(wanted, damaged_too=restart)
        differing = {} if found is None else _differences(found, wanted)
        done = self.names()
        if found is None and done and not restart:
            raise self._foreign("no run.json beside finished inputs", "a whole run folder")
        if differing and (done or joining) and not restart:
            was = {key: values[0] for key, values in differing.items()}
            now = {key: values[1] for key, values in differing.items()}
            raise self._foreign(f"now {now}", f"as the run was begun: {was}")
        if restart or differing:
            if differing and not restart:
                log.info("%s holds a run without a finished input: it begins anew", self.folder)
            self._clear()
        elif found is not None:
            if done:
                log.info(
                    "going on with the run in %s: %d inputs are finished", self.folder, len(done)
                )
            return
        write_text(path, identity_text(wanted))

    def _found(self, wanted: Mapping[str, Any], *, damaged_too: bool) -> dict[str, Any] | None:
        """Return what run.json says, if it is there.

        Raises:
            CalibrationError: it is not that of a calibration.
        """
        path = self.folder / "run.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            if damaged_too and self.names():
                return {}
            raise self._foreign(
                f"run.json does not parse: {error}", "a whole run folder"
            ) from error
        if not isinstance(found, dict) or not _MARKS & set(wanted) <= set(found):
            raise self._foreign("a run.json of something else", "a run folder, or none")
        return found

    def _foreign(self, got: str, expected: str) -> CalibrationError:
        return CalibrationError(
            f"{self.folder} holds the calibration of something else",
            expected=expected,
            got=got,
            remedy="restart the run (--restart, CalibrationConfig(restart=True)), delete the "
            "folder, or choose another output path",
        )


def record_text(record: InputRecord) -> str:
    """Return a record as it stands in the header of its file."""
    return json.dumps(record.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))


def identity_text(identity: Mapping[str, Any]) -> str:
    """Return the content of run.json."""
    return json.dumps(identity, indent=2, sort_keys=True) + "\n"


def _differences(found: Any, wanted: Any, at: str = "") -> dict[str, tuple[Any, Any]]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        result: dict[str, tuple[Any, Any]] = {}
        for key in sorted({*found, *wanted}):
            path = f"{at}.{key}" if at else key
            result |= _differences(found.get(key), wanted.get(key), path)
        return result
    return {} if found == wanted else {at or "run": (found, wanted)}


def _sha256(array: npt.NDArray[Any]) -> str:
    h = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    h.update(np.ascontiguousarray(array).data)
    return h.hexdigest()
