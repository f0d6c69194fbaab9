"""The benchmark of calibration memory runs, with and without attention."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "calibration_memory.py"


@pytest.mark.parametrize("drawn", [[], ["--drawn"]])
def test_it_tells_what_a_calibration_takes(drawn: list[str], tmp_path: Path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--small", "--json", "--folder", str(tmp_path), *drawn],
        check=True,
        capture_output=True,
        text=True,
    )
    told = json.loads(done.stdout)
    assert told["tokens"] == 288
    assert 0 < told["density of the plan"] < 1
    # Packed masks: 2 heads of 9 x 9 blocks, two bytes a row, at 3 steps.
    assert told["masks of an input MB"] == pytest.approx(2 * 9 * 2 * 3 / 1e6)
    assert told["host memory beyond that MB"] > 0
    assert not list(tmp_path.iterdir())


def test_the_cost_of_observing_is_told():
    script = SCRIPT.with_name("calibration_cost.py")
    done = subprocess.run(
        [sys.executable, str(script), "--check"], check=True, capture_output=True, text=True
    )
    assert "tiny: 180 tokens, 1 layers: dense" in done.stdout
