"""The benchmarks of energies run where there is no GPU too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_the_check_runs(tmp_path: Path, section_of: Callable[[Path], str]) -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "energy.py"), "--check", "--out", str(tmp_path)],
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "TRITON_CACHE_DIR": str(tmp_path / "triton"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all right" in done.stdout
    assert "fused, sm_90" in done.stdout
    (result,) = json.loads((tmp_path / "energy.json").read_text())["rows"]
    assert result["notes"] == []
    assert set(result["ms"]) == {"math", "cpu", "energies alone", "energies alone 1/4"}
    assert set(result["energy_errors"]) == set(result["ms"]) - {"math"}
    assert result["partial"] == ["energies alone", "energies alone 1/4"]
    assert "| tiny | 700 | 3 | energies alone 1/4 |" in section_of(tmp_path / "energy.json")
    times = result["ms"]
    assert result["added"]["math"]["cpu"] == pytest.approx(times["cpu"] / times["math"] - 1)


def test_wrong_energies_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from energy import ENERGY_ERROR, Result, energy_error

    from calibatt_compiler.kernels.energy import block_energy

    operands = tuple(torch.randn(1, 2, 300, 64) for _ in range(3))
    energy = block_energy(*operands[:2])
    assert energy_error(energy, operands, (128, 128), 1) < ENERGY_ERROR
    assert energy_error(energy, operands, (128, 128), 4) > ENERGY_ERROR
    energy[0, 0, 0, 1] += 1e-3
    assert energy_error(energy, operands, (128, 128), 1) > ENERGY_ERROR
    energy[0, 0, 0, 1] = float("nan")
    result = Result("tiny", 300, 2)
    result.energy_errors["ours"] = energy_error(energy, operands, (128, 128), 1)
    assert result.wrong == ["ours"]


def test_the_effect_of_a_share_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from energy_queries import effect, operands

    from calibatt_compiler.kernels.energy import block_energy

    q, k = operands((4, 8, 10), 64, 0)
    full, quarter = (block_energy(q, k, block=(32, 32), queries=x) for x in (1.0, 0.25))
    same = effect(full, full, 0.84)
    assert same["other"] == 0
    assert same["least_mass"] >= 0.84
    sampled = effect(full, quarter, 0.84)
    assert 0 < sampled["other"] < 0.5
    assert sampled["mass"] == pytest.approx(same["mass"], abs=0.05)
