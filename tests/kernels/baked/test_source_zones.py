"""Generated source of zones against golden files; CALIBATT_UPDATE_GOLDEN=1 accepts it."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from typing import Any

import pytest
from zone_patterns import many_runs, zone_pattern

from calibatt_compiler.kernels.baked.source_zones import (
    generate_zones,
    literal_heads,
    literal_runs,
    load_zones,
    zone_literals,
)
from calibatt_compiler.kernels.common.zone_table import zone_table

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.mark.parametrize(("case", "target"), [("diagonal", "hopper"), ("text first", "portable")])
def test_source_is_as_accepted(case: str, target: Any) -> None:
    zones = zone_pattern(case)
    source = generate_zones(zones, zone_table(zones), target)
    path = GOLDEN / f"zones_{case.replace(' ', '_')}_{target}.py"
    if os.environ.get("CALIBATT_UPDATE_GOLDEN") == "1":
        path.write_text(source, encoding="utf-8")
    assert source == path.read_text(encoding="utf-8"), (
        "generated source changed; look at the difference, then accept it with "
        "CALIBATT_UPDATE_GOLDEN=1"
    )


def test_source_and_ptx_hold_the_words_of_the_table() -> None:
    zones = zone_pattern("text last")
    table = zone_table(zones)
    source = generate_zones(zones, table, "hopper")
    call = next(
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "zone_literals"
    )
    found = re.search(
        r"runs\[(\d+)\] = \{(.*?)\}", zone_literals(*map(ast.literal_eval, call.args))
    )
    assert found is not None
    words = table.runs[:-1].tolist()
    assert int(found[1]) == len(words)
    assert [int(word) for word in found[2].split(", ")] == words


def test_whole_heads_are_left_to_the_table() -> None:
    zones = many_runs(400)
    table = zone_table(zones)
    for most, heads in ((401, 8), (400, 7), (351, 7), (350, 6), (50, 0)):
        assert literal_heads(zones, table, most) == heads
        assert literal_runs(table, most) == (401 if heads == 8 else heads * 50 + bool(heads))
    source = generate_zones(zones, table, "portable", 200)
    assert "if index < 151:" in source
    assert "tl.load(runs_ptr + index)" in source
    assert max(len(line) for line in source.splitlines()) <= 100


def test_a_damaged_file_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("CALIBATT_CACHE_DIR", str(tmp_path))
    zones = zone_pattern("plain")
    table = zone_table(zones)
    first = load_zones(zones, table, "hopper")
    assert load_zones(zones, table, "hopper") is first
    (path,) = tmp_path.glob("zones-*.py")
    path.write_text("raise SystemExit", encoding="utf-8")
    assert load_zones(zones, table, "hopper") is first
    assert path.read_text(encoding="utf-8") == generate_zones(zones, table, "hopper")
