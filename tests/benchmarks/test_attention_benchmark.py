"""The benchmarks of attention run where there is no GPU too; their masks are what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_the_check_runs(tmp_path: Path, section_of: Callable[[Path], str]) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "attention.py"), "--check", "--out", str(tmp_path)],
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "CALIBATT_CACHE_DIR": str(tmp_path / "calibatt"),
            "TRITON_CACHE_DIR": str(tmp_path / "triton"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all right" in done.stdout
    assert "sm_90-bfloat16-d128-n128-fixed" in done.stdout
    record = json.loads((tmp_path / "attention.json").read_text())
    assert [result["case"] for result in record["rows"]] == [
        "tiny banded 0.40",
        "tiny random 0.40",
        "tiny mixed 0.30",
    ]
    for result in record["rows"]:
        assert set(result["sustained"]) == set(result["burst"]) == {"math", "reference"}
        assert result["notes"] == []
    assert "| tiny banded 0.40 | 0." in section_of(tmp_path / "attention.json")
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_check_of_zones_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "attention.py"), "--check", "--masks", "zones"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads((tmp_path / "attention.json").read_text())["rows"]
    assert result["case"] == "tiny zones 0.40"
    assert set(result["efficiency"]) == {"math", "cpu zones"}
    assert result["notes"] == []


@pytest.mark.parametrize("density", [0.12, 0.4])
def test_zones_have_the_density_asked_for(density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from attention_cases import Case, Size
    from zone_cases import NUMBERS, make_zones

    zones = make_zones(Case(Size("half", 16380, 780, heads=6), "zones", density))
    assert zones.density == pytest.approx(density, rel=0.05)
    assert zones.numbers.max() <= 4 * NUMBERS
    assert len(set(zones.octaves.tolist())) > 3


@pytest.mark.slow
@pytest.mark.inductor
def test_the_check_of_layers_runs(tmp_path: Path, section_of: Callable[[Path], str]) -> None:
    command = [sys.executable, str(BENCHMARKS / "dit_layer.py"), "--check", "--out", str(tmp_path)]
    command += ["--token-order", "2x4xall", "--profile"]
    done = subprocess.run(
        command,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads((tmp_path / "dit_layer.json").read_text())["rows"]
    orders = {"table 2x4xall once", "table 2x4xall around"}
    assert set(row["ms"]) == {"stock", "table", "zones table", "none"} | orders
    assert done.stdout.count("profiled:\n") == len(row["ms"])
    assert "x calibatt::attention" in done.stdout
    assert row["left_out"] == {}
    shown = section_of(tmp_path / "dit_layer.json")
    assert all(f"| ragged | 1 | {name} | " in shown for name in row["ms"])
    shown = section_of(tmp_path / "layer_profile.json")
    assert all(f"| {name} | matrix products | " in shown for name in row["ms"])


@pytest.mark.parametrize("mask", ["banded", "ragged", "random", "mixed", "dense"])
def test_masks_have_the_density_asked_for(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from attention_cases import Case, Size, make_pattern

    size = Size("half", 16380, 780, heads=6)
    pattern = make_pattern(Case(size, mask, 0.2))
    expected = {"mixed": (1 + 2 * 0.2) / 3, "dense": 1.0}.get(mask, 0.2)
    assert pattern.density == pytest.approx(expected, abs=0.01)
    assert pattern.key_length % 128 != 0
    # Few long runs of key blocks, or many short ones.
    runs = len(pattern.intervals().starts) / (size.heads * pattern.query_blocks)
    low, high = {"banded": (2, 10), "ragged": (4, 16), "random": (15, 25)}.get(mask, (1, 8))
    assert low <= runs <= high
