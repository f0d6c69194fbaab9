"""The benchmark of calibration memory runs, with and without attention."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "calibration_memory.py"


@pytest.mark.slow
@pytest.mark.parametrize("drawn", [[], ["--drawn"]])
def test_it_tells_what_a_calibration_takes(
    drawn: list[str], tmp_path: Path, section_of: Callable[[Path], str]
):
    folder = tmp_path / "run"
    folder.mkdir()
    command = [sys.executable, str(SCRIPT), "--small", "--folder", str(folder), *drawn]
    subprocess.run([*command, "--out", str(tmp_path)], check=True, capture_output=True)
    (told,) = json.loads((tmp_path / "calibration_memory.json").read_text())["rows"]
    assert told["tokens"] == 288
    shown = section_of(tmp_path / "calibration_memory.json")
    assert "masks of 40 layers: at most 8 GiB: **met**" in shown
    assert 0 < told["density of the plan"] < 1
    # Packed masks: 2 heads of 9 x 9 blocks, two bytes a row, at 3 steps.
    assert told["masks of an input MB"] == pytest.approx(2 * 9 * 2 * 3 / 1e6)
    assert told["host memory beyond that MB"] > 0
    assert not list(folder.iterdir())


@pytest.mark.slow
def test_the_cost_of_observing_is_told(tmp_path: Path, section_of: Callable[[Path], str]):
    script = SCRIPT.with_name("calibration_cost.py")
    command = [sys.executable, str(script), "--check", "--out", str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "| tiny | 180 | 1 |" in section_of(tmp_path / "calibration_cost.json")
    assert "tiny: 180 tokens, 1 layers: dense" in done.stdout
