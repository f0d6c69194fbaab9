"""Which files of a run folder a calibration wrote: no others are ever deleted.

A folder may hold files of the user's own, and a plan.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# What `files.replacing` leaves of run.json, order.json and inputs when it is killed, and ranks'.
_LEFTOVER = re.compile(
    r"\.(?:(?:run|order)-\w{8}\.tmp\.json|(?:input|\d+)-.+-\w{8}\.tmp\.safetensors)|rank-\d{5}"
)
_SPOOL = re.compile(r"spool(?:-\d+)?")
_SUMS = re.compile(r"\d+-.+\.safetensors")
_SPOOLED = re.compile(r"(?:kept-|sums-)?\d{6}\.npy")


def sweep(folder: Path) -> None:
    """Delete what killed processes left half-done in a folder that a run was begun in."""
    for path in _entries(folder):
        if _LEFTOVER.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)
        elif _SPOOL.fullmatch(path.name):
            remove_spool(path)


def remove_spool(folder: Path) -> None:
    """Delete arrays that waited in a folder, and the folder if it holds nothing else."""
    for path in _entries(folder):
        if _SPOOLED.fullmatch(path.name):
            path.unlink(missing_ok=True)
    remove_empty(folder)


def remove_sums(folder: Path) -> None:
    """Delete sums of sites, and their folder if it holds nothing else."""
    for path in _entries(folder):
        if _SUMS.fullmatch(path.name):
            path.unlink(missing_ok=True)
    remove_empty(folder)


def remove_empty(folder: Path) -> None:
    """Delete a folder if there is nothing in it."""
    with suppress(OSError):
        folder.rmdir()


def _entries(folder: Path) -> Iterator[Path]:
    with suppress(FileNotFoundError, NotADirectoryError):
        yield from list(folder.iterdir())
