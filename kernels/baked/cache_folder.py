"""Where generated kernels lie, and whose files are taken for them: what lies there is run.

Entries of the user and of root are taken if nobody else can write them, so that a container image
or an administrator may fill a cache for all. Anything else is refused, said once, and a private
folder is used beside.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from calibatt_compiler.errors import FileError
from calibatt_compiler.files import naming
from calibatt_compiler.logs import logger
from calibatt_compiler.options import cache_dir, fallback_dir

log = logger("kernels")

STALE = 3600.0
"""Seconds after which a temporary folder or file is that of a killed process."""

FOREIGN_WRITE = stat.S_IWGRP | stat.S_IWOTH


def distrust(path: Path) -> str | None:
    """Return why a file or folder is not taken for the user's own; None if it is.

    Raises:
        FileNotFoundError: it is not there.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        raise
    except OSError as error:
        return error.strerror or str(error)
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        return "it is neither a file nor a folder"
    if found.st_uid not in (os.geteuid(), 0):
        return f"it belongs to user {found.st_uid}"
    if found.st_mode & stat.S_IWOTH:
        return "every user may write it"
    if found.st_mode & stat.S_IWGRP and not _own_group(found.st_gid):
        return f"group {found.st_gid} may write it"
    return None


def places() -> list[Path]:
    """Folders that entries are looked for in: the user's choice, then a private one if there.

    A folder that is not trusted is left out, and that is said once.
    """
    found = []
    for folder in (cache_dir(), private_dir()):
        with contextlib.suppress(FileNotFoundError):
            reason = distrust(folder)
            if reason is None:
                found.append(folder)
            elif folder == cache_dir():
                _say(folder, reason, private_dir())
    return list(dict.fromkeys(found))


def writable() -> Iterator[Path]:
    """Yield folders that entries can be written to, the user's choice first; they are made.

    Raises:
        FileError: none can be made.
    """
    failure: FileError | None = None
    for folder in dict.fromkeys((cache_dir(), private_dir())):
        try:
            with naming(folder):
                _make(folder)
            reason = distrust(folder)
            if reason is None and not os.access(folder, os.W_OK | os.X_OK):
                reason = "it can't be written"
        except FileError as error:
            failure, reason = error, str(error.got)
        if reason is None:
            _sweep_once(folder)
            yield folder
        elif folder == cache_dir():
            _say(folder, reason, private_dir())
    if failure is not None:
        raise failure


@cache
def private_dir() -> Path:
    """Return a folder of this user alone, for what the chosen one lacks; it need not be there."""
    folder = fallback_dir()
    try:
        # In a folder for all, such as /tmp, another may have come first.
        if distrust(folder) is not None:
            folder = Path(tempfile.mkdtemp(prefix="calibatt-"))
    except FileNotFoundError:
        pass
    return folder


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from replacing entries of a folder; where it can't be locked, hope."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Delete whatever stands at a path, if anything."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def sweep(folder: Path) -> None:
    """Delete temporary files and folders that killed processes left in a folder long ago."""
    with contextlib.suppress(OSError):
        for found in os.scandir(folder):
            with contextlib.suppress(OSError):
                old = time.time() - found.stat(follow_symlinks=False).st_mtime > STALE
                if not found.name.startswith(".") or not old:
                    continue
                if found.is_dir(follow_symlinks=False):
                    shutil.rmtree(found.path, ignore_errors=True)
                elif ".tmp" in found.name:
                    os.unlink(found.path)


@cache
def _sweep_once(folder: Path) -> None:
    sweep(folder)


@cache
def _say(folder: Path, reason: str, instead: Path) -> None:
    log.warning("kernel cache: %s is not used (%s); %s is", folder, reason, instead)


def _make(folder: Path) -> None:
    if folder.is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    # Whatever the mask: nobody else writes what is run.
    folder.chmod(folder.stat().st_mode & 0o777 & ~FOREIGN_WRITE)


def _own_group(group: int) -> bool:
    """Whether a group is the user's own alone, as many systems give each user one."""
    import grp
    import pwd

    try:
        user, found = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except KeyError:
        return False
    return found.gr_name == user.pw_name and set(found.gr_mem) <= {user.pw_name}
