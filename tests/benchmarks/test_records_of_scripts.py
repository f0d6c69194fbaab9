"""Scripts without tests of their own write records that make a table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


def run(name: str, options: list[str], out: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py"), *options, "--out", str(out)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("cpu_attention", ["--check"], "| 64 | 0.53 | ours | "),
        ("energy_queries", ["--grid", "3", "8", "8", "--block", "32"], "| 0.84 | 1/4 | 0."),
        ("repetition", ["--check"], "| 0.87 | 0."),
    ],
)
def test_a_quick_run_makes_a_table(
    name: str, options: list[str], line: str, tmp_path: Path, section_of: Callable[[Path], str]
) -> None:
    run(name, options, tmp_path)
    assert line in section_of(tmp_path / f"{name}.json")


@pytest.mark.slow
def test_ways_of_running_make_a_table(tmp_path: Path, section_of: Callable[[Path], str]) -> None:
    ways = ["blocks", "group offload, then blocks"]
    run("ways_of_running", ["--tiny", "--layers", "1", "--ways", *ways], tmp_path)
    path = tmp_path / "ways_of_running.json"
    rows = json.loads(path.read_text())["rows"]
    assert [row["way"] for row in rows] == ways
    for row in rows:
        assert row["sparse"] == 1
        assert row["kernels"] == ["native-cpu-zones"]
        assert row["error"]["plan"] < 1e-5
        assert row["distance"] > 0.1
    shown = section_of(path)
    assert "| blocks | tiny | 1 | " in shown
    assert "all planned sites sparse: **met**" in shown


@pytest.mark.slow
@pytest.mark.inductor
def test_serving_a_model_makes_a_table(tmp_path: Path, section_of: Callable[[Path], str]) -> None:
    run("plan_serving_model", ["--check"], tmp_path)
    shown = section_of(tmp_path / "plan_serving_model.json")
    assert "| masks | 2 | 2 | served | " in shown
