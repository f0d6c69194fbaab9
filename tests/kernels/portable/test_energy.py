"""The energy kernels without a GPU: interpreted on small operands, compiled for several GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parents[2] / "support"
SQUARE = (128, 128)
VARIANTS = [
    # kernel, architecture, dtype, head dim, block
    *((kernel, arch, "bfloat16", head_dim, SQUARE)
      for kernel in ("one pass", "fused") for arch in (80, 90, 100) for head_dim in (64, 128)),
    *(("two passes", arch, "bfloat16", 128, SQUARE) for arch in (80, 90, 100)),
    ("one pass", 90, "bfloat16", 256, SQUARE),
    ("one pass", 89, "bfloat16", 128, SQUARE),
    ("fused", 89, "bfloat16", 128, SQUARE),
    ("one pass", 90, "float16", 128, (16, 48)),
    ("fused", 90, "float16", 128, (16, 48)),
    ("fused", 90, "bfloat16", 40, (48, 1024)),
    ("one pass", 80, "float32", 128, SQUARE),
    ("two passes", 90, "float32", 64, SQUARE),
]  # fmt: skip
TENSOR_CORES = {80: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
SHARED_MEMORY = {80: 163, 89: 99, 90: 227, 100: 227}
PROGRAMS = 2
"""Programs of the one-pass kernel that a multiprocessor of sm_90 must hold."""


def run(script: str, *arguments: str, **environment: str) -> list[dict[str, Any]]:
    """Run a script in a process of its own and read the JSON lines that it prints."""
    done = subprocess.run(
        [sys.executable, str(FOLDER / script), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_interpreted_kernels_equal_the_definition() -> None:
    found = run("energy_interpreted.py", TRITON_INTERPRET="1")
    assert len(found) == 15
    for case in found:
        assert case["energy"] < 1e-6, case
        assert case["output"] < 5e-6, case


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """What was found in each variant's machine code."""
    return run("energy_builds.py", json.dumps(VARIANTS), TRITON_INTERPRET="0")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(VARIANTS)), ids=[str(v) for v in VARIANTS])
def test_compiled_kernels_use_tensor_cores_and_spill_nothing(
    compiled: list[dict[str, Any]], number: int
) -> None:
    kernel, arch, dtype, *_ = VARIANTS[number]
    facts = compiled[number]
    assert facts["STACK"] == facts["LOCAL"] == 0, facts
    assert facts["shared"] <= SHARED_MEMORY[arch] * 1024
    if dtype != "float32":  # exact float32 products have no tensor core
        assert facts[TENSOR_CORES[arch]] > 0
        assert facts["cp.async"] > 0
    if kernel == "fused":
        # What other threads kept is read behind a barrier.
        assert facts["barriers"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128])
def test_two_programs_of_the_one_pass_kernel_fit_a_multiprocessor(
    compiled: list[dict[str, Any]], head_dim: int
) -> None:
    number = VARIANTS.index(("one pass", 90, "bfloat16", head_dim, SQUARE))
    facts = compiled[number]
    assert PROGRAMS * facts["shared"] <= SHARED_MEMORY[90] * 1024
    assert PROGRAMS * 256 * facts["REG"] <= 65536
