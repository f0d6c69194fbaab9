"""RESULTS.md is made from the records, and says what they say."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

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


def test_pages_and_pictures_are_those_of_the_records(results: ModuleType):
    made = results.pages()
    assert {results.PAGE, results.PERFORMANCE} <= set(made)
    for path, text in made.items():
        assert path.read_text("utf-8") == text, f"make results: {path.name}"
        if path.suffix == ".svg":
            ElementTree.fromstring(text)
    assert set(results.FOLDER.glob("*/*.svg")) <= set(made), "a picture of nothing"


def test_figures_of_before_are_where_the_page_says(results: ModuleType):
    """A link of docs/performance.md to a section written by hand leads to one."""
    import performance

    written = (results.FOLDER / "2026-11-27.md").read_text("utf-8").splitlines()
    titles = {line.lstrip("# ") for line in written if line.startswith("#")}
    earlier = [figure.earlier for figure in performance.FIGURES if figure.earlier is not None]
    assert [each.title for each in earlier if each.title not in titles] == []
    assert earlier[0].link.endswith("#a-layer-of-wan-14b-dit_layerpy)")


def test_every_figure_names_columns_of_its_table(results: ModuleType):
    """A word that no column has would leave a figure or an aim out for ever."""
    import performance

    by_name = {benchmark.name: benchmark for benchmark in results.BENCHMARKS}
    assert set(performance.PICTURES) <= set(by_name)
    for figure in performance.FIGURES:
        titles = {column.title for column in by_name[figure.benchmark].columns}
        assert figure.column in titles | {"x dense"}, figure
    for benchmark in by_name.values():
        titles = {column.title for column in benchmark.columns}
        assert {aim.column for aim in benchmark.aims} <= titles
        if benchmark.chart is not None:
            chart = benchmark.chart
            assert {chart.value, chart.series, *chart.along} <= titles


def test_each_benchmark_is_a_script_with_its_own_record(results: ModuleType):
    for benchmark in results.BENCHMARKS:
        assert "--out" in benchmark.command
        if benchmark.script:
            assert (FOLDER.parent / benchmark.script).exists()
            continue
        assert (FOLDER / f"{benchmark.name}.py").is_file()
        assert (FOLDER.parent / benchmark.command.split()[1]).is_file()


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
    path = write(results, elsewhere, 1.0)
    path.write_text(path.read_text().replace('"calibration_cost"', '"unheard_of"'))
    with pytest.raises(SystemExit, match=r"catalogue\.py"):
        results.add(path)


def test_what_is_no_measurement_is_left_out(results: ModuleType, elsewhere: Path):
    other = elsewhere / "run.json"
    other.write_text('{"model": "a"}')
    assert results.add(other) is None
    check = write(results, elsewhere, 1.0)
    check.write_text(check.read_text().replace('"settings": {}', '"settings": {"check": true}'))
    assert results.add(check) is None
    assert not list((elsewhere / "kept").iterdir())


def test_a_script_writes_what_is_kept(
    results: ModuleType, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
):
    import record

    @dataclasses.dataclass
    class Row:
        ratio: float

    path: Any = elsewhere / "some.json"
    monkeypatch.setattr(sys, "argv", ["benchmarks/some.py", "--out", str(elsewhere / "results")])
    record.write_record(path, "a device", [Row(1.5)], mask="banded")
    run = record.read_record(path)
    assert (run.benchmark, run.device, run.rows) == ("some", "a device", [{"ratio": 1.5}])
    assert run.settings["mask"] == "banded"
    assert run.settings["load"] >= 0
    assert run.versions["torch"]
    assert run.command == "python benchmarks/some.py --out results", "no folder of a machine"
