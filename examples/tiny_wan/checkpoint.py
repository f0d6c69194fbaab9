"""Checkpoints: folders of safetensors shards, written to a temporary name and then renamed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 15_000_000
Groups = dict[str, dict[str, Tensor]]


def save_checkpoint(
    folder: Path, groups: Groups, meta: dict[str, Any], dtype: torch.dtype | None = None
) -> None:
    """Write the tensors as ``group/name`` with the metadata; cast to ``dtype`` if one is given."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    shard: dict[str, Tensor] = {}
    used = count = 0

    def flush() -> None:
        save_file(shard, temporary / f"part-{count}.safetensors", {"meta": json.dumps(meta)})

    for group, tensors in groups.items():
        for name, tensor in tensors.items():
            copy = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous().clone()
            if used and used + copy.nbytes > SHARD_BYTES:
                flush()
                shard, used, count = {}, 0, count + 1
            shard[f"{group}/{name}"] = copy
            used += copy.nbytes
    flush()
    previous = folder.with_name(folder.name + ".old")
    shutil.rmtree(previous, ignore_errors=True)
    if folder.exists():
        os.replace(folder, previous)
    os.replace(temporary, folder)
    shutil.rmtree(previous, ignore_errors=True)


def load_checkpoint(folder: Path) -> tuple[Groups, dict[str, Any]]:
    """Return the tensors, in float32, by group and name, and the metadata."""
    groups: Groups = {}
    meta: dict[str, Any] = {}
    paths = sorted(folder.glob("part-*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"no part-*.safetensors in {folder}")
    for path in paths:
        with safe_open(path, framework="pt") as file:
            meta = json.loads(file.metadata()["meta"])
            for key in file.keys():  # noqa: SIM118 - not a mapping
                group, name = key.split("/", 1)
                groups.setdefault(group, {})[name] = file.get_tensor(key).float()
    return groups, meta


def read_meta(folder: Path) -> dict[str, Any] | None:
    """Return the metadata of a checkpoint, None if there is none."""
    path = folder / "part-0.safetensors"
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        meta: dict[str, Any] = json.loads(file.metadata()["meta"])
    return meta


def append_log(path: Path, record: dict[str, float | int]) -> None:
    """Add one JSON line to a training log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def read_log(path: Path) -> list[dict[str, float]]:
    """Return the lines of a training log."""
    return [json.loads(line) for line in path.read_text().splitlines()]
