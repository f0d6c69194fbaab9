"""`benchmarks/zone_choices.py`: factors of sensitivities, and its table."""

from __future__ import annotations

from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def test_factors_are_errors_over_expected_ones_within_bounds():
    from zone_choices import SPREAD, weights

    assert weights([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == (1.0, 1.0, 1.0)
    assert weights([2.0, 1.0, 1.0], [1.0, 1.0, 1.0]) == (2.0, 1.0, 1.0)
    assert weights([100.0, 1.0, 0.001], [1.0, 1.0, 1.0]) == (SPREAD, 1.0, 1 / SPREAD)


def test_record(tmp_path: Path, section_of):
    import torch
    from record import write_record

    row = {"choice": "as it is", "density": 0.2, "median": 30.0, "psnr": 29.0, "ssim": 0.9}
    row |= {"gain": 0.0, "better": 0.5, "bytes": 1000, "videos": 8}
    path = tmp_path / "zone_choices.json"
    write_record(path, torch.device("cpu"), [row], model="mid")
    assert "| mid | as it is |" in section_of(path)
