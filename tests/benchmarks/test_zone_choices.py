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


def test_a_choice_is_compared_on_the_videos_that_both_have(tmp_path: Path, section_of):
    import torch
    from fidelity_study.setting import name_of
    from record import write_record
    from zone_choices import AS_IT_IS, rows

    from calibatt_compiler.evaluation.cases import Case

    cases = [Case("a", 1), Case("b", 2), Case("c", 3)]
    results = {
        f"{name}|{name_of(case)}": {"psnr": psnr, "ssim": 0.9}
        for name, values in ((AS_IT_IS, (30.0, 31.0, 32.0)), ("other", (33.0, 30.0)))
        for case, psnr in zip(cases, values, strict=False)
    }
    found = rows(results, cases, {AS_IT_IS: 0.2, "other": 0.2, "never begun": 0.2})
    assert [row["choice"] for row in found] == [AS_IT_IS, "other"]
    assert (found[1]["videos"], found[1]["gain"], found[1]["better"]) == (2, 1.0, 0.5)
    path = tmp_path / "zone_choices.json"
    write_record(path, torch.device("cpu"), found, model="mid")
    assert "| mid | other |" in section_of(path)
