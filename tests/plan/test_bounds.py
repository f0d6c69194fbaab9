"""Small files that call for much memory are refused before it is taken."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plan_files import deflate, write_plan

from calibatt_compiler.errors import PlanError, PlanFormatError
from calibatt_compiler.plan import BlockPattern, Plan, Sampler, SitePatterns, bounds, encoding, file
from calibatt_compiler.plan.copies import AnchorRows
from calibatt_compiler.plan.sizes import MAX_ORDERED
from calibatt_compiler.plan.stored import PatternSize

MB = 1 << 20
MOST = 200
"""Megabytes that opening a hostile file and decoding what it holds may take; libraries apart."""

READER = r"""
import re, sys
from calibatt_compiler.errors import CalibattError
from calibatt_compiler.plan import Plan
def megabytes(name):
    return int(re.search(name + r":\s+(\d+) kB", open("/proc/self/status").read())[1]) // 1024
Plan.load(sys.argv[1])
for path in sys.argv[2:]:
    open("/proc/self/clear_refs", "w").write("5")  # forgets the peak
    before = megabytes("VmRSS")
    try:
        for site in Plan.load(path).sites.values():
            for pattern in site.patterns:
                pass
        said = "accepted"
    except CalibattError as error:
        said = type(error).__name__
    print(said, megabytes("VmHWM") - before, path.rpartition("/")[2], flush=True)
"""


@pytest.fixture
def record(make_plan: Callable[..., Plan]) -> dict[str, Any]:
    """The record of a plan of one site `a` and one step, to be changed."""
    found: dict[str, Any] = json.loads(file.to_json(make_plan(sites=1, steps=1).metadata))
    found["sites"][0]["name"] = "a"
    return found


def site(record: dict[str, Any], **change: Any) -> dict[str, Any]:
    """The record with its site changed."""
    return {**record, "sites": [{**record["sites"][0], **change}]}


ONE_SITE = {"a": [[["bits", "raw", 0]]]}
LARGE = {"heads": 256, "query_length": 1 << 15, "key_length": 1 << 20, "density": [1.0]}


def hostile(record: dict[str, Any]) -> dict[str, Callable[[Path], None]]:
    """Files by name, each of which would take hundreds of megabytes or more."""

    def text(**change: Any) -> Callable[[Path], None]:
        return lambda path: write_plan(path, {**record, **change}, {"a": b""}, ONE_SITE)

    def large(method: str, code: bytes, **change: Any) -> Callable[[Path], None]:
        entries = [[["bits", method, len(code)]]]
        return lambda path: write_plan(path, site(record, **change), {"a": code}, {"a": entries})

    length = 256 * 256 * 1024  # 64 MB: `LARGE` in blocks of 128 x 128
    wide = {**LARGE, "block_m": 128, "block_n": 128}
    rows = 12_000
    copied = {
        "heads": 1,
        "query_length": rows,
        "key_length": 16,
        "block_m": 1024,
        "block_n": 16,
        "head_forms": "mixed",
        "anchor_rows": rows,
        "density": [1.0],
        "repetitive": [1],
    }
    flags = [["bits", "raw", 12], ["repetitive", "raw", 1]]
    tall = site({**record, "grid": [1, rows, 1], "requires": ["repetition"]}, **copied)
    huge = {**copied, "query_length": 1 << 24}
    many = {"grid": [1, 1 << 24, 1], "requires": ["token_order"], "token_order": "2x8x8"}
    sites = [{**record["sites"][0], **wide, "heads": 32, "name": f"s{i}"} for i in range(400)]
    code = deflate(b"\xff" * (length // 8))
    return {
        "header of 90 MB": lambda path: path.write_bytes(
            struct.pack("<Q", 90 * MB) + b"{" + b" " * (90 * MB - 2) + b"}"
        ),
        "header longer than the file": lambda path: path.write_bytes(
            struct.pack("<Q", 90 * MB) + b"{}"
        ),
        "lists": text(requires=[[]] * MB),
        "texts": text(requires=[f"{i:06d}" for i in range(MB // 2)]),
        "numbers": text(sampler={"timesteps": list(range(MB // 2))}),
        "wrong numbers": text(sampler={"timesteps": ["a"] * MB}),
        "small numbers": lambda path: write_plan(
            path, site(record, steps=[0] * 2 * MB), {"a": b""}, ONE_SITE
        ),
        "figures": text(quality={f"{i:x}": "x" for i in range(MB)}),
        "unknown fields": text(**{f"{i:x}": 1 for i in range(MB)}),
        "sites": text(sites=record["sites"] * 20_000),
        "depth": lambda path: write_plan(path, "[" * 8 * MB, {"a": b""}, ONE_SITE),
        "depth of objects": lambda path: write_plan(path, '{"a":' * MB, {"a": b""}, ONE_SITE),
        "index": lambda path: write_plan(
            path, record, {"a": b""}, {"a": [[["bits", "raw", 0]]] * (MB // 4)}
        ),
        "tensors": lambda path: write_plan(
            path, record, {f"{i:x}": b"" for i in range(MB // 8)}, ONE_SITE
        ),
        "escaped marks": lambda path: write_plan(
            path, '{"a":[' + "[],".replace("[", "\\u005b") * MB, {"a": b""}, ONE_SITE
        ),
        "one text": text(producer="A" * 7 * MB),
        "deflated ones": large("deflate", deflate(b"\xff" * length), **wide),
        "gaps of nothing": large("gaps", deflate(bytes(8 * length)), **wide),
        "gaps that go on": large("gaps", deflate(b"\xff" * 8 * MB), **wide),
        "columns": large("deflate", deflate(b"\1" * length), heads=4096, query_length=1 << 18),
        "rows that are copied": lambda path: write_plan(
            path, tall, {"a": b"\1" * 13}, {"a": [flags]}
        ),
        "a long sequence with copied rows": lambda path: write_plan(
            path,
            site({**record, "grid": [1, 1 << 24, 1], "requires": ["repetition"]}, **huge),
            {"a": b"\1" * 13},
            {"a": [flags]},
        ),
        "a large grid in tiles": lambda path: write_plan(
            path, site({**record, **many}, query_length=1 << 24), {"a": b""}, ONE_SITE
        ),
        "many large sites": lambda path: write_plan(
            path,
            {**record, "sites": sites},
            {f"s{i}": code for i in range(400)},
            {f"s{i}": [[["bits", "deflate", len(code)]]] for i in range(400)},
        ),
    }


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_no_file_takes_more_memory_than_it_should(
    tmp_path: Path, record: dict[str, Any], make_plan: Callable[..., Plan]
) -> None:
    cases = hostile(record)
    for name, make in cases.items():
        make(tmp_path / name)
    make_plan().save(tmp_path / "good")
    paths = [str(tmp_path / name) for name in ("good", *cases)]
    done = subprocess.run(
        [sys.executable, "-c", READER, *paths], capture_output=True, text=True, check=False
    )
    lines = [line.split(" ", 2) for line in done.stdout.splitlines()]
    assert len(lines) == len(cases), done.stdout + done.stderr
    assert [name for said, _, name in lines if said == "accepted"] == []
    assert max(int(taken) for _, taken, _ in lines) < MOST, done.stdout


def test_large_patterns_of_few_bytes_are_written_so_that_they_can_be_read(tmp_path: Path) -> None:
    """Those that keep every block compress a thousandfold, more than a reader trusts."""
    heads, rows = 160, 1024
    bits = np.full((heads, rows, rows // 8), 255, np.uint8)
    pattern = BlockPattern(heads, rows * 128, rows * 128, 128, 128, bits)
    sites = {"a": SitePatterns.share([pattern, pattern])}
    plan = Plan.create(sites, grid=(1, rows, 128), sampler=Sampler(timesteps=(2.0, 1.0)))
    plan.save(tmp_path / "p")
    assert os.path.getsize(tmp_path / "p") > bits.nbytes > bounds.FREE_SITE
    loaded = Plan.load(tmp_path / "p")
    assert loaded == plan
    assert loaded.sites["a"].at(1).digest == pattern.digest
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "p").read_bytes()


def test_a_plan_too_large_for_a_file_is_refused_when_it_is_written(
    tmp_path: Path, make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_plan(steps=9).save(tmp_path / "p")
    before = (tmp_path / "p").read_bytes()
    monkeypatch.setattr(bounds, "HEADER_BYTES", 1000)
    with pytest.raises(PlanError, match="too large for a file"):
        make_plan(steps=9, seed=1).save(tmp_path / "p")
    assert (tmp_path / "p").read_bytes() == before


@pytest.mark.parametrize(
    ("size", "weighted", "expected"),
    [
        (PatternSize(2, 48, 48, 16, 16), False, 2 * 3 * 1),
        (PatternSize(2, 48, 160, 16, 16), False, 2 * 3 * 2),
        (PatternSize(2, 48, 160, 16, 16), True, 2 * 3 * 2 + 2 * 3 * 10),
    ],
)
def test_decoded_bytes(size: PatternSize, weighted: bool, expected: int) -> None:
    assert bounds.Part("a", size, weighted, 0).decoded == expected


def test_real_sizes_have_room() -> None:
    """720p videos of 81 frames on Wan 14B: every block kept, in 2 kB a site; or zones as small."""
    size = PatternSize(40, 75_600, 75_600, 128, 128)
    names = [f"blocks.{i}.attn1" for i in range(40)]
    masks = [bounds.Part(name, size, False, 2_000) for name in names]
    assert bounds.sizes_problem(masks) is None
    assert bounds.sizes_problem(masks * 2) is not None
    zones = [bounds.Part(name, size, True, 2_000, size.blocks) for name in names]
    assert bounds.sizes_problem(zones) is None
    small = PatternSize(40, 75_600, 75_600, 64, 64)
    assert bounds.sizes_problem([bounds.Part("a", small, True, 900, small.blocks // 4)]) is None
    assert bounds.sizes_problem([bounds.Part("a", small, True, 900, small.blocks)]) is not None


def test_many_sites_and_steps_have_room(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    plan = make_plan(sites=64, steps=50, heads=1)
    renamed = {
        f"transformer_blocks.{i}.attn1.processor:1": s for i, s in enumerate(plan.sites.values())
    }
    plan = plan.with_sites(
        renamed, thresholds={f"raised:{name}": 0.5 for name in renamed}, quality={}
    )
    plan.save(tmp_path / "p")
    assert Plan.load(tmp_path / "p") == plan


def test_a_tiled_grid_of_too_many_tokens_is_refused() -> None:
    pattern = BlockPattern.dense(1, MAX_ORDERED + 1024, 1024, (1024, 1024))
    site = SitePatterns.share([pattern])
    from calibatt_compiler.plan.order import TokenOrder

    with pytest.raises(PlanError, match="no valid plan"):
        Plan.create(
            {"a": site},
            grid=(1, 1, MAX_ORDERED + 1024),
            sampler=Sampler(timesteps=(1.0,)),
            token_order=TokenOrder.parse("1x1x8"),
        )


@pytest.mark.parametrize("height", [1, 2, 5, 6, 45, 90])
def test_each_row_copies_the_nearest_anchor(height: int) -> None:
    for rows in range(1, height + 2):
        copies = AnchorRows((1, height, 1), rows)
        anchors = copies.anchors.tolist()
        computed, sources = copies.computed(height), copies.sources(height)
        for row in range(height):
            nearest = min(anchors, key=lambda anchor: (abs(anchor - row), anchor))
            assert computed[sources[row]] == nearest


def test_gaps_of_many_pieces_come_back() -> None:
    rng = np.random.default_rng(0)
    for share in (0.0005, 0.02, 0.3, 1.0):
        data = np.packbits(rng.random(8 * 500_000) < share)
        gaps = encoding._gaps(data)
        code = np.frombuffer(deflate(gaps.tobytes()), np.uint8)
        assert np.array_equal(encoding.decode("gaps", code, len(data), None), data)


@pytest.mark.parametrize(
    "code", [b"\x00", b"\xff" * 40, deflate(bytes(100))[:-1], b"", deflate(bytes(100)) + b"x"]
)
@pytest.mark.parametrize("method", ["gaps", "deflate"])
def test_codes_that_do_not_end_rightly_are_refused(method: Any, code: bytes) -> None:
    with pytest.raises(ValueError, match=r"end where|invalid|instead of|past the end"):
        encoding.decode(method, np.frombuffer(code, np.uint8), 100, None)


@pytest.mark.parametrize(
    "field", ["quality", "thresholds", "inputs", "cfg", "text_policy", "model"]
)
def test_a_record_without_a_field_is_no_surprise(
    tmp_path: Path, make_plan: Callable[..., Plan], field: str
) -> None:
    plan = make_plan(sites=1)
    stored = {name: s.packed().patterns for name, s in plan.sites.items()}
    document = json.loads(file.to_json(plan.metadata))
    del document[field]
    entries = {name: [list(map(list, e)) for e in s.entries] for name, s in stored.items()}
    codes = {name: s.code.tobytes() for name, s in stored.items()}
    write_plan(tmp_path / "p", document, codes, entries)
    loaded = Plan.load(tmp_path / "p")
    assert torch.equal(loaded.block_mask("blocks.0.attn1", 0), plan.block_mask("blocks.0.attn1", 0))


def test_any_failure_of_a_library_is_the_file_s(
    tmp_path: Path, make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_plan().save(tmp_path / "p")
    for error in (TypeError("no"), RecursionError(), OverflowError(), MemoryError()):

        def fail(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(file, "_parse", fail)
        with pytest.raises(PlanFormatError, match=type(error).__name__):
            Plan.load(tmp_path / "p")


@pytest.mark.slow
def test_the_digest_of_a_file_is_read_with_the_same_care(
    tmp_path: Path, make_plan: Callable[..., Plan], record: dict[str, Any]
) -> None:
    make_plan().save(tmp_path / "good")
    assert file.record_digest(tmp_path / "good") == make_plan().digest
    for name in ("header of 90 MB", "lists", "depth"):
        hostile(record)[name](tmp_path / "bad")
        with pytest.raises(PlanFormatError):
            file.record_digest(tmp_path / "bad")


def test_a_grid_past_any_sequence_is_refused(make_plan: Callable[..., Plan]) -> None:
    site = make_plan(sites=1, steps=1).sites["blocks.0.attn1"]
    with pytest.raises(PlanError, match="no valid plan"):
        Plan.create({"a": site}, grid=(1 << 20, 1 << 20, 1), sampler=Sampler(timesteps=(1.0,)))
