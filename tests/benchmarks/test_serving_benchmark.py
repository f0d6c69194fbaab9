"""The benchmark of serving large plans runs where there is no GPU too."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "plan_serving.py"


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--passes", "1"]])
def test_the_check_runs(
    options: list[str], tmp_path: Path, section_of: Callable[[Path], str]
) -> None:
    command = [sys.executable, str(SCRIPT), "--check", "--out", str(tmp_path), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads((tmp_path / "plan_serving.json").read_text())["rows"]
    assert "| masks | " in section_of(tmp_path / "plan_serving.json")
    assert row["kinds"] == ["native-cpu"]
    assert row["passes"] == (1 if options else 2)
    assert len(row["served_ms"]) == len(row["resident_ms"]) == row["steps"]
    assert 0 < row["tables_mb"] <= row["tables_of_all_steps_mb"]
