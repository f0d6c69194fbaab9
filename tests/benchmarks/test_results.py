"""RESULTS.md is made from the records, and says what they say."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def results() -> Iterator[ModuleType]:
    """The module `benchmarks/results.py`."""
    sys.path.insert(0, str(FOLDER))
    import results

    yield results
    sys.path.remove(str(FOLDER))


@pytest.fixture
def elsewhere(results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Records are kept in a folder of the test's own."""
    monkeypatch.setattr(results, "FOLDER", tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    return tmp_path


def write(results: ModuleType, folder: Path, ratio: float, date: str = "2026-01-02") -> Path:
    path = folder / "calibration_cost.json"
    row = {"size": "720p", "tokens": 75600, "layers": 2, "dense": 9.0, "observed": 10.0}
    run = results.Run(
        "calibration_cost", date, "A GPU", {"torch": "2"}, "python x", [{**row, "ratio": ratio}], {}
    )
    path.write_text(json.dumps(dataclasses.asdict(run)))
    return path


def test_the_page_is_that_of_the_records(results: ModuleType):
    assert results.PAGE.read_text("utf-8") == results.page(), "make results"


def test_each_benchmark_is_a_script_with_its_own_record(results: ModuleType):
    for benchmark in results.BENCHMARKS:
        assert (FOLDER / f"{benchmark.name}.py").is_file()
        assert f"benchmarks/{benchmark.name}.py" in benchmark.command


def test_runs_are_shown_with_their_spread_and_their_aim(results: ModuleType, elsewhere: Path):
    results.add(write(results, elsewhere, 1.2))
    assert "| 720p | 75600 | 2 | 9.0 | 10.0 | 1.20 |" in results.page()
    assert "Aim, ratio <= 1.35: **met**." in results.page()
    results.add(write(results, elsewhere, 1.4, "2026-01-05"))
    page = results.page()
    assert "1.20 to 1.40" in page
    assert "2026-01-02 to 2026-01-05, 2 runs, torch 2" in page
    assert "**met in 0 of 1**" in page


def test_the_last_runs_are_kept_newest_first(results: ModuleType, elsewhere: Path):
    for day in range(1, 8):
        kept = results.add(write(results, elsewhere, 1.0 + day / 100, f"2026-01-0{day}"))
    dates = [run.date for run in results.runs_of(kept)]
    assert dates == [f"2026-01-0{day}" for day in range(7, 2, -1)]
    results.add(write(results, elsewhere, 1.07, "2026-01-07"))
    assert [run.date for run in results.runs_of(kept)] == dates, "the same run counts once"


def test_a_record_without_an_entry_is_refused(results: ModuleType, elsewhere: Path):
    (elsewhere / "kept" / "unheard_of").mkdir()
    with pytest.raises(SystemExit, match="unheard_of"):
        results.page()


def test_a_script_writes_what_is_kept(results: ModuleType, elsewhere: Path):
    import record

    @dataclasses.dataclass
    class Row:
        ratio: float

    path: Any = elsewhere / "some.json"
    record.write_record(path, "a device", [Row(1.5)], mask="banded")
    run = record.read_record(path)
    assert (run.benchmark, run.device, run.rows) == ("some", "a device", [{"ratio": 1.5}])
    assert run.settings == {"mask": "banded"}
    assert run.versions["torch"]
