"""Machine code of the portable kernels, for five GPU generations, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SHARED_MEMORY = {
    80: 163 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}


def spilled(kernel: dict[str, Any]) -> int:
    """Bytes a thread that may lie where spilled registers go."""
    if kernel["kind"] == "padded":
        return 80  # what a mask touches is attended apart from the loop over all other tiles
    if kernel["arch"] == 90 and kernel["head_dim"] == 128 and kernel["kind"] != "weighted":
        # Two programs a multiprocessor leave 128 registers a thread. That is a few too few, and
        # still a fifth faster than one program: docs/decisions/0003.
        return 64
    if kernel["arch"] == 100 and kernel["kind"] == "zones":
        return 24  # of the table, which serves until its literals are compiled
    # mma.sync has its operands in registers, and the kernels take all that there are.
    return 16 if kernel["arch"] in (80, 89, 120) else 0


@pytest.mark.slow
def test_machine_code_and_ahead_of_time_compilation(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "CALIBATT_CACHE_DIR": str(tmp_path / "calibatt"),
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
        "CALIBATT_TEST_ARCHS": ",".join(map(str, SHARED_MEMORY)),
    }
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parents[2] / "support" / "offline_builds.py")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == 65
    for kernel in kernels:
        assert kernel["local"] == 0, kernel
        assert kernel["stack"] <= spilled(kernel), kernel
        shared = SHARED_MEMORY[kernel["arch"]]
        assert kernel["shared"] <= shared, kernel
        # The loads of keys and values run ahead of the products.
        by_tma = (kernel["arch"], kernel["kind"] != "weighted") == (90, True)
        assert kernel["tma" if by_tma else "cp_async"] > 0, kernel
        if by_tma:  # two programs a multiprocessor
            assert kernel["registers"] <= 128, kernel
            assert 2 * (kernel["shared"] + 1024) <= shared + 1024, kernel
        tensor_core = {90: "wgmma", 100: "tcgen05"}.get(kernel["arch"], "mma")
        assert kernel[tensor_core] > 0, kernel
        # A launch after `build` compiles nothing.
        assert kernel.get("new_files", 0) == 0, kernel
