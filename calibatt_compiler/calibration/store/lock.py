"""Who may work in a run folder: one process alone, or all ranks of one run together."""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path
from typing import IO

from calibatt_compiler.errors import CalibrationError
from calibatt_compiler.files import naming

_LONGEST = 400
"""Characters that the content of a lock may have."""


class FolderLock:
    """The file `lock` of a run folder.

    The kernel drops the lock with its process, however it ends: a lock is never stale. One process
    alone holds it exclusively. Of several ranks the first one does while it prepares the folder;
    then all hold it in common, and whoever else wants the folder finds it taken until the last of
    them has gone.

    Args:
        folder: of the run; must exist when the lock is taken.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "lock"
        self._file: IO[str] | None = None

    def take(self) -> None:
        """Take the folder for this process alone.

        Raises:
            CalibrationError: somebody works in it.
        """
        file = self._acquire(fcntl.LOCK_EX)
        file.seek(0)
        if not re.fullmatch(r"(\d+ on .*\n?)?", file.read(_LONGEST)):
            file.close()
            raise CalibrationError(
                f"{self._path} is no lock of a calibration",
                expected="a folder in which that name is free",
                got="a file of something else",
                remedy="choose another folder, or move that file",
            )
        file.truncate(0)
        file.write(f"{os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        self._file = file

    def share(self) -> None:
        """From now on hold the folder in common with those who `join`.

        Raises:
            CalibrationError: another process took it in the moment between.
        """
        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            raise self._taken(self._file) from error

    def join(self) -> None:
        """Hold the folder in common with the process that shares it.

        Raises:
            CalibrationError: a process has it for itself.
        """
        self._file = self._acquire(fcntl.LOCK_SH)

    def release(self) -> None:
        """Let go; the last one removes the file."""
        if self._file is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            pass  # others work on
        else:
            if self._is(self._file):
                self._path.unlink(missing_ok=True)
        self._file.close()
        self._file = None

    def check(self) -> None:
        """Return if the folder, where it is held at all, still is the one that was taken.

        Raises:
            CalibrationError: it was deleted or replaced.
        """
        if self._file is not None and not self._is(self._file):
            raise CalibrationError(
                "the run folder was deleted or replaced while the run was under way",
                expected=f"{self._folder} as it was opened",
                got=f"another {self._path.name} there, or none",
                remedy="run the same command again; leave the folder alone until it is done",
            )

    def _is(self, file: IO[str]) -> bool:
        try:
            return os.fstat(file.fileno()).st_ino == self._path.stat().st_ino
        except FileNotFoundError:
            return False

    def _acquire(self, kind: int) -> IO[str]:
        while True:
            with naming(self._path):
                file = self._path.open("a+", encoding="utf-8")
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except OSError as error:
                raise self._taken(file) from error
            # Whoever held it may have removed the file between our open and our lock.
            if self._is(file):
                return file
            file.close()

    def _taken(self, file: IO[str]) -> CalibrationError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        return CalibrationError(
            "another calibration works in the same folder",
            expected=f"{self._folder} for this run alone",
            got=f"it is held by process {holder}",
            remedy="wait for it, end it, or choose another output path",
        )
