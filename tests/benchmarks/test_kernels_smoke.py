"""The benchmark of the portable kernels runs where there is no GPU too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernels_smoke.py"


def test_smoke_benchmark_runs_interpreted(
    tmp_path: Path, section_of: Callable[[Path], str]
) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all right" in done.stdout
    (result,) = json.loads((tmp_path / "kernels_smoke.json").read_text())["rows"]
    assert result["equal_bits"]
    assert "| tiny, ragged | " in section_of(tmp_path / "kernels_smoke.json")
    assert set(result["times"]) == {"sdpa math", "table", "baked", "energy"}
