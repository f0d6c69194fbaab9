"""What the tests of benchmarks share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def section_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], str]:
    """Return what RESULTS.md would say of a record."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import results

    def shown(path: Path) -> str:
        run = results.read_record(path)
        (benchmark,) = (each for each in results.BENCHMARKS if each.name == run.benchmark)
        assert results.rows_of(benchmark, [run]), "an empty table"
        return str(results.section(benchmark, [[run]]))

    return shown
