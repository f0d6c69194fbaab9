"""Files that are either whole or absent: written to a temporary name, then renamed.

Every failure of the system is a `FileError` that names the file. What can be known before long work
begins is checked before: `check_output`, `check_folder`.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from calibatt_compiler.errors import CalibattError, FileError

Name = str | os.PathLike[str]

LEFT_FOR = 86400
"""Seconds after which a temporary file is taken for one that a killed process left."""

_DRAWN = 8
"""Characters that `tempfile` draws."""

_REMEDIES = {
    errno.ENOSPC: "make room, or choose a path on another disk",
    errno.EDQUOT: "make room within the quota, or choose a path on another disk",
    errno.EACCES: "choose another path, or have its owner give write access",
    errno.EPERM: "choose another path, or have its owner give write access",
    errno.EROFS: "choose a path on a disk that is not mounted read-only",
    errno.ENAMETOOLONG: "choose a shorter name",
}
_KINDS = (
    (stat.S_ISLNK, "a link: give the path that it leads to"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


@contextmanager
def naming(path: Name, what: str = "can't be written") -> Iterator[None]:
    """Turn a failure of the system within into a `FileError` that names the file or folder."""
    try:
        yield
    except CalibattError:
        raise
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and "null byte" not in str(error):
            raise
        raise _failure(path, what, error) from error


@contextmanager
def replacing(path: Name, *, size: int = 0) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes `path`'s place, else it is removed.

    The rename is atomic on one file system, so a reader, a crash or Ctrl-C meets the old file or
    the new one. Missing parent folders are made. The temporary name keeps the suffix of `path`,
    which some encoders go by. A process that is killed leaves it behind; the next one that writes
    this file removes it, a day later.

    Args:
        path: the file.
        size: bytes that will be written, if known.

    Raises:
        FileError: the folder can't be made, the file not be written, or it is none.
    """
    target = Path(path)
    _check_kind(target)
    with naming(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        check_space(target, size)
        handle, name = tempfile.mkstemp(
            dir=target.parent, prefix=_prefix(target), suffix=_suffix(target)
        )
    os.close(handle)
    temporary = Path(name)
    try:
        with naming(target):
            try:
                yield temporary
            except Exception as error:
                # safetensors has an error of its own for what the system says.
                if type(error).__name__ != "SafetensorError":
                    raise
                raise _failure(target, "can't be written", error) from error
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.chmod(0o666 & ~umask())
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _prefix(target: Path) -> str:
    return f".{target.stem[:40]}-"


def _suffix(target: Path) -> str:
    return f".tmp{target.suffix[:20]}"


def _sweep(target: Path) -> None:
    """Remove what killed processes have left of a file that they wrote."""
    before = time.time() - LEFT_FOR
    prefix, suffix = _prefix(target), _suffix(target)
    with suppress(OSError):
        for entry in os.scandir(target.parent):
            if not (entry.name.startswith(prefix) and entry.name.endswith(suffix)):
                continue
            drawn = entry.name[len(prefix) : -len(suffix)]
            with suppress(OSError):
                found = entry.stat(follow_symlinks=False)
                old = stat.S_ISREG(found.st_mode) and found.st_mtime < before
                if old and len(drawn) == _DRAWN and "-" not in drawn:
                    os.unlink(entry.path)


def write_text(path: Name, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_output(path: Name, *, inputs: Iterable[Name | None] = (), size: int = 0) -> None:
    """Raise `FileError` unless a file can be written, before the work that it is to hold.

    Args:
        path: the file; one that is there will be replaced.
        inputs: files that are read, or written too: not to be replaced.
        size: bytes that will be written, if known.

    Raises:
        FileError: it is a link, a pipe, a device, a folder or an input, its folder can't be
            written, or the disk is full.
    """
    target = Path(path)
    _check_kind(target)
    for given in inputs:
        if given is not None and _same(target, Path(given)):
            raise FileError(
                f"{target} would be written over what is read",
                expected="another path for each file",
                got=f"{target} and {given}",
                remedy="choose another path",
            )
    _check_place(target.parent, target)
    check_space(target, size)


def check_folder(
    path: Name, names: Iterable[str] = (), *, inputs: Iterable[Name | None] = ()
) -> None:
    """Raise `FileError` unless a folder is there or can be made, and files in it be written.

    Args:
        path: the folder.
        names: of the files.
        inputs: see `check_output`.
    """
    folder = Path(path)
    with naming(folder):
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "there is something else than a folder")
    _check_place(folder, folder)
    inputs = tuple(inputs)
    for name in names:
        check_output(folder / name, inputs=inputs)


def check_space(path: Name, size: int) -> None:
    """Raise `FileError` if the disk of a file has less than `size` bytes left."""
    if not size:
        return
    with naming(path):
        free = shutil.disk_usage(_existing(Path(path).absolute().parent)).free
    if free < size:
        raise FileError(
            f"there is no room for {path}",
            expected=f"{size} bytes",
            got=f"{free} bytes free",
            remedy=_REMEDIES[errno.ENOSPC],
        )


def umask() -> int:
    """Return the mask of permissions that new files don't get."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _check_kind(target: Path) -> None:
    """Raise `FileError` if something stands there that no file may take the place of."""
    with naming(target):
        try:
            mode = target.lstat().st_mode
        except FileNotFoundError:
            return
    for is_kind, kind in _KINDS:
        if is_kind(mode):
            raise FileError(
                f"{target} can't be written",
                expected="the path of a file",
                got=kind,
                remedy="choose another path",
            )


def _check_place(folder: Path, target: Path) -> None:
    with naming(target):
        place = _existing(folder.absolute())
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{place} is no folder")
        # Tried, for permissions alone don't tell; the file has no name and leaves no trace.
        with tempfile.TemporaryFile(dir=place):
            pass
        # A name that is too long, or not possible here, is found out by looking for it.
        os.path.lexists(target)
        os.stat(place)
        if len(os.fsencode(target.name)) > os.pathconf(place, "PC_NAME_MAX"):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))


def _existing(folder: Path) -> Path:
    """Return the nearest folder that is there."""
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return one.absolute() == other.absolute()


def _failure(path: Name, what: str, error: Exception) -> FileError:
    number = error.errno if isinstance(error, OSError) else None
    said = (error.strerror if isinstance(error, OSError) else None) or str(error)
    ours = FileError(
        f"{os.fspath(path)} {what}",
        got=said or type(error).__name__,
        remedy=_REMEDIES.get(number or 0, "check the path and the disk"),
    )
    ours.errno = number
    return ours
