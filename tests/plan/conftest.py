"""Small plans and raw plan files that all plan tests share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import save_file
from torch import Tensor

from calibatt_compiler.plan import Plan, file
from calibatt_compiler.plan.stored import StoredPatterns


def random_mask(*shape: int, seed: int = 0) -> Tensor:
    """Seeded bool mask with no empty row."""
    draw = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return (draw < 0.4).scatter(-1, draw.argmin(-1, keepdim=True), True)


@pytest.fixture
def make_plan() -> Callable[..., Plan]:
    """Make a plan of one frame group: `make_plan(sites=2, steps=3, seed=0, ...)`."""

    def make(
        *,
        sites: int = 2,
        steps: int = 3,
        heads: int = 2,
        grid: tuple[int, int, int] = (3, 5, 10),
        block: tuple[int, int] = (32, 16),
        seed: int = 0,
    ) -> Plan:
        tokens = grid[0] * grid[1] * grid[2]
        shape = (steps, heads, -(-tokens // block[0]), -(-tokens // block[1]))
        masks = {
            f"blocks.{index}.attn1": random_mask(*shape, seed=seed + index)
            for index in range(sites)
        }
        timesteps = [1000.0 - 300.0 * step for step in range(steps)]
        return Plan.from_masks(masks, grid=grid, timesteps=timesteps, block=block)

    return make


@pytest.fixture
def forge(tmp_path: Path, make_plan: Callable[..., Plan]) -> Callable[..., Path]:
    """Write a plan file with changed content and checksums that fit it.

    `forge(edit)`: `edit(document, tensors)` changes the parsed record and the codes by site name in
    place, or returns another text of the record. `forge(edit, relist)`: `relist(index)` changes the
    parsed index in place, or returns another text of it.
    """

    def write(
        edit: Callable[[Any, dict[str, Any]], str | None],
        relist: Callable[[Any], str | None] = lambda index: None,
    ) -> Path:
        plan = make_plan()
        stored = {name: StoredPatterns.pack(site.patterns) for name, site in plan.sites.items()}
        document = json.loads(file.to_json(plan.metadata))
        tensors = {name: site.code for name, site in stored.items()}
        record = edit(document, tensors) or json.dumps(document)
        parts = {
            name: (hashlib.sha256(tensors[name].tobytes()).hexdigest(), site.entries)
            for name, site in stored.items()
            if name in tensors
        }
        index = json.loads(file.index(parts))
        rest = f"{relist(index) or json.dumps(index)}\n{record}"
        path = tmp_path / "forged.safetensors"
        save_file(tensors, path, metadata={file.FORMAT: f"{file.digest(rest)}\n{rest}"})
        return path

    return write
