"""Machine code of the portable kernels, for three GPU generations, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


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
        [sys.executable, str(Path(__file__).with_name("offline_builds.py"))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == 30
    for kernel in kernels:
        # Both are where spilled registers would go. On an sm_80 the kernels take all registers
        # already, and what finds copied rows spills up to twelve. On an sm_90 they may take half,
        # so that two programs fit a multiprocessor: faster, spills included (RESULTS.md).
        halved = kernel["arch"] == 90 and kernel["registers"] == 128
        assert kernel["local"] == 0, kernel
        assert kernel["stack"] <= (48 if kernel["arch"] == 80 else 192 if halved else 0), kernel
        assert kernel["shared"] <= SHARED_MEMORY[kernel["arch"]], kernel
        # The loads of keys and values run ahead of the products.
        assert kernel["cp_async"] > 0, kernel
        tensor_core = {80: "mma", 90: "wgmma", 100: "tcgen05"}[kernel["arch"]]
        assert kernel[tensor_core] > 0, kernel
        # A launch after `build` compiles nothing.
        assert kernel.get("new_files", 0) == 0, kernel
