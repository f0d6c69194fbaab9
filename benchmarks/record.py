"""What benchmarks write down: one form for all of them.

A script writes OUT/<benchmark>.json, a `Run`. `python benchmarks/results.py --add OUT/*.json` keeps
it with the last runs on the same device in `benchmarks/results`.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from calibatt_compiler.evaluation.comparison import device_name
from calibatt_compiler.files import write_text

PACKAGES = ("torch", "triton", "diffusers", "numpy", "fa3-fwd", "flash-attn-4")
"""Packages whose versions a figure depends on."""


@dataclass(frozen=True)
class Run:
    """One run of a benchmark.

    Attributes:
        benchmark: name of the script.
        date: ISO date.
        device: name of the GPU or processor.
        versions: of packages.
        command: as it was called.
        rows: what was found, one dict a case.
        settings: what all rows have in common. `check=True`: a tiny run that shows that the script
            works; its figures mean nothing and are not kept. `load`: processes that wanted a
            processor in the last 15 minutes, which tells how far to trust times of a CPU.
    """

    benchmark: str
    date: str
    device: str
    versions: dict[str, str]
    command: str
    rows: list[dict[str, Any]]
    settings: dict[str, Any]


def write_record(
    path: Path,
    device: torch.device | str,
    rows: Sequence[Any],
    *,
    benchmark: str | None = None,
    **settings: Any,
) -> None:
    """Write a run: rows are dataclasses or dicts.

    Args:
        path: of the file.
        benchmark: its name, if it is not the file's.
        device: that was measured, or its name.
        rows: what was found, one a case.
        settings: what all rows have in common.
    """
    run = Run(
        benchmark or path.stem,
        datetime.date.today().isoformat(),
        device if isinstance(device, str) else device_name(device),
        _versions(),
        " ".join(["python", os.path.relpath(sys.argv[0]), *map(_without_folder, sys.argv[1:])]),
        [asdict(row) if is_dataclass(row) else dict(row) for row in rows],  # type: ignore[arg-type]
        {"load": round(os.getloadavg()[2], 1), **settings},
    )
    write_text(path, json.dumps(asdict(run), indent=1) + "\n")


def read_record(path: Path) -> Run:
    """Read what `write_record` wrote.

    Raises:
        ValueError: the file is something else.
    """
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or set(found) != {each.name for each in fields(Run)}:
        raise ValueError(f"{path} is no record of a benchmark")
    return Run(**found)


def _without_folder(argument: str) -> str:
    """Leave out where a folder lies on this machine."""
    return Path(argument).name if os.path.isabs(argument) else argument


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
