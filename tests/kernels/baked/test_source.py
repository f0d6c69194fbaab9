"""Generated source against golden files; CALIBATT_UPDATE_GOLDEN=1 accepts what is generated now."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.baked.cover import cover_pattern
from calibatt_compiler.kernels.baked.cover_template import Cover
from calibatt_compiler.kernels.baked.source import generate
from calibatt_compiler.kernels.request import Target
from calibatt_compiler.plan.pattern import BlockPattern

GOLDEN = Path(__file__).parents[2] / "golden"


def bands_and_columns() -> BlockPattern:
    row, column = np.indices((20, 20))
    mask = np.zeros((2, 20, 20), bool)
    for head, stride in enumerate((5, 7)):
        for frame in range(-2, 3):
            mask[head] |= abs(column - row - frame * stride) <= head
    mask[:, :, :2] = True
    return BlockPattern.from_mask(
        torch.from_numpy(mask), query_length=1267, key_length=1267, block=(64, 64)
    )


def frames_and_shared_heads() -> BlockPattern:
    row, column = np.indices((12, 12)) // 4
    local = row == column
    mask = np.stack([local, np.ones((12, 12), bool), local])
    return BlockPattern.from_mask(torch.from_numpy(mask), block=(128, 128))


def rectangular() -> BlockPattern:
    row, column = np.indices((6, 14))
    mask = (abs(column - 2 * row) <= 2)[None].copy()
    mask[:, 3, 11:] = True
    return BlockPattern.from_mask(
        torch.from_numpy(mask), query_length=700, key_length=890, block=(128, 64)
    )


@pytest.mark.parametrize(
    ("make", "target"),
    [
        (bands_and_columns, "portable"),
        (frames_and_shared_heads, "portable"),
        (rectangular, "portable"),
        (bands_and_columns, "hopper"),
        (rectangular, "hopper"),
    ],
)
def test_source_is_as_accepted(make: Callable[[], BlockPattern], target: Target) -> None:
    pattern = make()
    source = generate(cover_pattern(pattern), pattern, target)
    path = GOLDEN / f"{make.__name__}{'_hopper' * (target == 'hopper')}.py"
    if os.environ.get("CALIBATT_UPDATE_GOLDEN") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(source, encoding="utf-8")
    assert source == path.read_text(encoding="utf-8"), (
        "generated source changed; look at the difference, then accept it with "
        "CALIBATT_UPDATE_GOLDEN=1"
    )


@pytest.mark.slow
def test_source_does_not_depend_on_hash_seeds() -> None:
    script = (
        "import runpy, sys; t = runpy.run_path(sys.argv[1]); p = t['bands_and_columns'](); "
        "print(t['generate'](t['cover_pattern'](p), p, 'portable'))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script, __file__],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_lines_stay_readable() -> None:
    mask = np.random.default_rng(0).random((3, 24, 24)) < 0.3
    mask |= np.eye(24, dtype=bool)
    pattern = BlockPattern.from_mask(torch.from_numpy(mask))
    source = generate(cover_pattern(pattern), pattern, "portable")
    compile(source, "generated", "exec")
    assert max(len(line) for line in source.splitlines()) <= 100


def test_more_key_blocks_than_a_run_can_name_are_refused() -> None:
    cover = Cover(1, 1 << 15, ((),), (0,))
    with pytest.raises(KernelError, match="too many key blocks"):
        generate(cover, bands_and_columns(), "portable")
