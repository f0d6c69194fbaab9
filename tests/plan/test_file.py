"""The plan file: what is written comes back, and nothing else is ever accepted."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from calibatt_compiler.errors import PlanError, PlanFormatError
from calibatt_compiler.plan import (
    BlockPattern,
    CalibrationInputs,
    ModelIdentity,
    Plan,
    Sampler,
    SitePatterns,
    encoding,
    file,
)
from calibatt_compiler.plan.stored import StoredPatterns


def small_plan() -> Plan:
    mask = torch.eye(3, dtype=torch.bool).expand(2, 1, 3, 3).clone()
    mask[1, 0, 0, 2] = True
    return Plan.from_masks({"a": mask}, (1, 3, 16), [2.0, 1.0], (16, 16))


def test_what_is_saved_comes_back(make_plan: Callable[..., Plan], tmp_path: Path):
    plan = make_plan(sites=3, steps=4)
    path = tmp_path / "new" / "folder" / "p.safetensors"
    plan.save(path)
    loaded = Plan.load(path)
    assert loaded == plan
    assert loaded.digest == plan.digest
    assert loaded.metadata == plan.metadata
    for site in plan.sites:
        for step in range(plan.steps):
            assert torch.equal(loaded.block_mask(site, step), plan.block_mask(site, step))
    loaded.save(tmp_path / "again")
    assert Plan.load(tmp_path / "again") == plan


def test_equal_plans_make_equal_files(make_plan: Callable[..., Plan], tmp_path: Path):
    """Also after a way through a file: a plan can be known from another by its bytes alone."""
    path = tmp_path / "p"
    make_plan(sites=5).save(path)
    first = path.read_bytes()
    for _ in range(10):
        Plan.load(path).save(path)
        assert path.read_bytes() == first
    make_plan(sites=5).save(path)
    assert path.read_bytes() == first


def test_everything_a_plan_records_comes_back(tmp_path: Path):
    site = SitePatterns.share([BlockPattern.dense(1, 100, 200, (32, 64))] * 2, head_dim=64)
    plan = Plan.create(
        {"up.8x8.attn é": site},
        grid=(2, 5, 10),
        sampler=Sampler(name="Euler", timesteps=(1000.0, 0.1), sigmas=(1.0, 1e-4)),
        model=ModelIdentity(class_name="Net", config_digest="ab"),
        text_policy="in_mask",
        cfg="batched",
        thresholds={"A": 0.84, "k": 16},
        inputs=CalibrationInputs(count=64, digest="cd"),
        quality={"psnr": 31.25},
    )
    plan.save(tmp_path / "p")
    loaded = Plan.load(tmp_path / "p")
    assert loaded.metadata == plan.metadata
    assert loaded.digest == plan.digest
    assert loaded.sites["up.8x8.attn é"].head_dim == 64
    assert loaded.metadata.thresholds == {"A": 0.84, "k": 16.0}


def test_digest_of_a_known_plan_stays():
    """Plans that people hold must keep their digest, for caches are keyed by it."""
    assert small_plan().metadata.schema_version == 2
    metadata = small_plan().metadata.model_copy(update={"producer": "calibatt test"})
    assert (
        Plan(metadata, small_plan().sites).digest
        == "d8f46c618722efa306c52c3069a011e9417285de2398bfe6e9eb9596be9e907f"
    )
    assert (
        file.digest(file.to_json(metadata))
        == "d8f46c618722efa306c52c3069a011e9417285de2398bfe6e9eb9596be9e907f"
    )


@pytest.mark.parametrize(
    "change", [{"LEVEL": 1}, {"SMALL": 0, "GAPS_BELOW": 0.0, "DEFLATE_ABOVE": 1.0}]
)
def test_the_digest_does_not_depend_on_the_encoding(
    make_plan: Callable[..., Plan],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
):
    make_plan(steps=9, grid=(9, 10, 40)).save(tmp_path / "one")
    for name, value in change.items():
        monkeypatch.setattr(encoding, name, value)
    make_plan(steps=9, grid=(9, 10, 40)).save(tmp_path / "other")
    one, other = Plan.load(tmp_path / "one"), Plan.load(tmp_path / "other")
    assert (tmp_path / "one").read_bytes() != (tmp_path / "other").read_bytes()
    assert one.digest == other.digest
    assert decode_all(one) == decode_all(other) > 0


def decode_all(plan: Plan) -> int:
    """Decode every pattern of a plan; return how many."""
    return sum(len(tuple(site.patterns)) for site in plan.sites.values())


def test_every_flipped_bit_is_noticed(tmp_path: Path):
    path = tmp_path / "p.safetensors"
    small_plan().save(path)
    whole = path.read_bytes()
    assert len(whole) < 2000
    accepted = []
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            decode_all(Plan.load(path))
        except PlanFormatError:
            continue
        accepted.append(bit)
    assert accepted == []


def test_every_truncation_is_noticed(tmp_path: Path):
    path = tmp_path / "p.safetensors"
    small_plan().save(path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(PlanFormatError):
            Plan.load(path)


@pytest.mark.parametrize("extra", [b"\0", b" ", b"\n", b"more" * 100])
def test_trailing_bytes_are_noticed(tmp_path: Path, extra: bytes):
    path = tmp_path / "p.safetensors"
    small_plan().save(path)
    path.write_bytes(path.read_bytes() + extra)
    with pytest.raises(PlanFormatError, match="damaged or not a plan"):
        Plan.load(path)


def test_what_is_no_file_is_refused(tmp_path: Path):
    for path in (tmp_path, tmp_path / "missing", tmp_path / "missing" / "p"):
        with pytest.raises(PlanFormatError, match="there is no plan file"):
            Plan.load(path)


PICKLE = b"cos\nsystem\n(S'touch %s'\ntR."  # protocol 0: calls os.system when loaded


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"\x80\x04\x95",
        b"PK\x03\x04" + bytes(100),
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 99_000_000) + b"{}",
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "p"
    path.write_bytes(content)
    with pytest.raises(PlanFormatError, match="damaged or not a plan"):
        Plan.load(path)


def test_code_in_a_file_is_never_run(tmp_path: Path):
    path, trace = tmp_path / "p", tmp_path / "trace"
    path.write_bytes(PICKLE % os.fsencode(trace))
    with pytest.raises(PlanFormatError, match="damaged or not a plan"):
        Plan.load(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"format": "pt"},
        {"format": "calibatt-plan"},
        {"calibatt-plan": "", "more": ""},
        {"calibatt-calibration-input": ""},
    ],
)
def test_weights_of_a_model_are_not_a_plan(tmp_path: Path, metadata: dict[str, str] | None):
    path = tmp_path / "p"
    save_file({"weight": np.zeros((4, 4), np.float32)}, path, metadata=metadata)
    with pytest.raises(PlanFormatError, match="is not a plan"):
        Plan.load(path)


def test_forging_is_faithful(forge: Callable[..., Path], make_plan: Callable[..., Plan]):
    """Without an edit the forged file is a good one: the refusals below are for the edit."""
    assert Plan.load(forge(lambda document, tensors: None)) == make_plan()


def put(*steps: Any) -> Callable[[Any, Any], None]:
    """Return an edit: `put("sites", 0, "heads", 3)` sets document["sites"][0]["heads"] = 3."""
    *way, key, value = steps

    def edit(document: Any, tensors: Any) -> None:
        for part in way:
            document = document[part]
        document[key] = value

    return edit


def drop(key: str) -> Callable[[Any, Any], None]:
    """Return an edit that removes a field."""

    def edit(document: Any, tensors: Any) -> None:
        del document[key]

    return edit


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (put("schema_version", 3), "schema_version 3"),
        (put("schema_version", 1), "schema_version 1"),
        (put("schema_version", "2"), "schema_version '2'"),
        (put("schema_version", None), "schema_version None"),
        (put("requires", ["holograms"]), r"features \['holograms'\]"),
        (put("requires", ["holograms", 7]), r"features \['7', 'holograms'\]"),
        (put("requires", 7), "does not parse"),
        (put("requires", [{}]), "does not parse"),
        (drop("schema_version"), "does not parse"),
        (drop("requires"), "does not parse"),
        (lambda document, tensors: "[1, 2]", "does not parse"),
        (lambda document, tensors: "{", "does not parse"),
        (lambda document, tensors: "[" * 100_000, "does not parse"),
        (lambda document, tensors: '{"schema_version": ' + "9" * 5000 + "}", "does not parse"),
    ],
)
def test_another_schema_is_refused(
    forge: Callable[..., Path], edit: Callable[[Any, Any], str | None], problem: str
):
    with pytest.raises(PlanFormatError, match=problem):
        Plan.load(forge(edit))


@pytest.mark.parametrize(
    "edit",
    [
        put("sampler", "timesteps", 1, float("nan")),
        put("sampler", "timesteps", 0, float("inf")),
        put("sampler", "timesteps", 1, "700"),
        put("sampler", "timesteps", 1, 1000.0),
        put("sampler", "timesteps", []),
        put("sampler", "sigmas", [1.0]),
        put("sampler", "sigmas", [1.0, float("nan"), 0.0]),
        put("sites", 0, "density", 0, float("nan")),
        put("sites", 0, "density", 0, -0.25),
        put("sites", 0, "density", 0, 1.5),
        put("sites", 0, "density", []),
        put("thresholds", {"A": float("nan")}),
        put("thresholds", {"A": "0.8"}),
        put("quality", {"psnr": float("-inf")}),
        put("inputs", "count", -1),
        put("grid", [3, 5]),
        put("grid", [3, 5, 0]),
        put("grid", [3, 5, 10.5]),
        put("grid", [3, 5, 1 << 60]),
        put("grid", [3, 5, 10**30]),
        put("token_order", "spiral"),
        put("cfg", "unheard-of"),
        put("model", {}),
        put("sites", []),
        put("sites", {}),
        put("sites", 1, "name", "blocks.0.attn1"),
        put("sites", 0, "name", ""),
        put("sites", 0, "name", 3),
        put("sites", 0, "steps", [0, 1]),
        put("sites", 0, "steps", [0, 1, 3]),
        put("sites", 0, "steps", [0, 1, -1]),
        put("sites", 0, "steps", [0, 1, 1]),
        put("sites", 0, "patterns", 1 << 62),
        put("sites", 0, "digests", []),
        put("sites", 0, "digests", ["0" * 64, "1" * 64]),
        put("sites", 0, "digests", 1, "0" * 63),
        put("sites", 0, "digests", 1, "G" * 64),
        put("sites", 0, "head_forms", "rows"),
        put("sites", 0, "holograms", []),
        put("unheard_of", 1),
        drop("sampler"),
        *(
            put("sites", 0, field, value)
            for field in (
                "heads",
                "head_dim",
                "query_length",
                "key_length",
                "block_m",
                "block_n",
                "patterns",
            )
            for value in (0, -1, -(2**31), float("nan"), "2")
        ),
        *(
            put("sites", 0, field, 1 << 62)
            for field in ("heads", "head_dim", "query_length", "key_length", "block_m", "block_n")
        ),
        put("sites", 0, "block_m", 24),
    ],
)
def test_values_out_of_range_are_refused(
    forge: Callable[..., Path], edit: Callable[[Any, Any], str | None]
):
    with pytest.raises(PlanFormatError, match="holds values out of range") as caught:
        Plan.load(forge(edit))
    assert caught.value.remedy


def tensor(name: str, change: Callable[[Any], Any]) -> Callable[[Any, dict[str, Any]], None]:
    """Return an edit of one tensor."""

    def edit(document: Any, tensors: dict[str, Any]) -> None:
        tensors[name] = np.ascontiguousarray(change(tensors[name]))

    return edit


SITE = "blocks.0.attn1"


@pytest.mark.parametrize(
    "edit",
    [
        put("sites", 0, "name", "elsewhere"),
        lambda document, tensors: document["sites"][0].update(
            query_length=1 << 24, key_length=1 << 24
        ),
        tensor(SITE, lambda code: code.astype(np.int8)),
        tensor(SITE, lambda code: code.astype(np.float32)),
        tensor(SITE, lambda code: code.astype(np.int64)),
        tensor(SITE, lambda code: code[:-1]),
        tensor(SITE, lambda code: code[:0]),
        tensor(SITE, lambda code: np.append(code, code[:1])),
        tensor(SITE, lambda code: code.reshape(1, -1)),
        lambda document, tensors: tensors.update(extra=np.zeros(3, np.uint8)),
        lambda document, tensors: tensors.clear(),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    forge: Callable[..., Path], edit: Callable[[Any, Any], str | None]
):
    with pytest.raises(PlanFormatError, match="tensors that don't fit its sites"):
        Plan.load(forge(edit))


@pytest.mark.parametrize(
    "edit",
    [
        put("sites", 0, "heads", 3),
        put("sites", 0, "query_length", 151),
        put("sites", 0, "query_length", 161),
        put("sites", 0, "key_length", 1000),
        put("sites", 0, "key_length", 1 << 24),
        put("sites", 0, "block_m", 16),
        put("sites", 0, "digests", 1, "0" * 64),
        put("sites", 0, "density", 1, 0.125),
        tensor(SITE, lambda code: code ^ np.uint8(1)),
        tensor(SITE, lambda code: code[::-1]),
        tensor(SITE, lambda code: code * 0),
    ],
)
def test_patterns_that_are_not_those_of_the_record_are_refused_when_decoded(
    forge: Callable[..., Path], edit: Callable[[Any, Any], str | None]
):
    """No damage, for which there are checksums, but a file that contradicts itself."""
    plan = Plan.load(forge(edit))
    with pytest.raises(PlanError, match=r"is not what was stored|wrong shape|past the end|no kept"):
        decode_all(plan)
    tuple(plan.sites["blocks.1.attn1"].patterns)


def entry(pattern: int, *value: Any) -> Callable[[Any], None]:
    """Return an edit of the index: the arrays of one pattern."""

    def relist(index: Any) -> None:
        index[SITE]["patterns"][pattern] = list(value)

    return relist


@pytest.mark.parametrize(
    ("relist", "problem"),
    [
        (lambda index: "{", "index does not parse"),
        (lambda index: "[]", "index does not parse"),
        (lambda index: index[SITE].pop("sha256") and None, "index does not parse"),
        (lambda index: index[SITE].update(more=1), "index does not parse"),
        (entry(0, ["bits", "magic", 3]), "index does not parse"),
        (entry(0, ["bits", "raw", -1]), "index does not parse"),
        (entry(0, ["bits", "raw", 1 << 60]), "index does not parse"),
        (entry(0, ["bits", "raw"]), "index does not parse"),
        (entry(0), "don't fit its sites"),
        (entry(0, ["bits", "raw", 1 << 40]), "don't fit its sites"),
        (entry(0, ["kept_weights", "raw", 3]), "don't fit its sites"),
        (entry(0, ["bits", "raw", 3], ["bits", "raw", 3]), "don't fit its sites"),
        (entry(0, ["repetitive", "raw", 3], ["bits", "raw", 3]), "don't fit its sites"),
        (lambda index: index[SITE]["patterns"].pop() and None, "don't fit its sites"),
        (lambda index: index.pop(SITE) and None, "don't fit its sites"),
        (lambda index: index[SITE].update(sha256="0" * 64), "checksum of 'blocks.0.attn1'"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(
    forge: Callable[..., Path], relist: Callable[[Any], str | None], problem: str
):
    with pytest.raises(PlanFormatError, match=problem):
        Plan.load(forge(lambda document, tensors: None, relist))


def test_codes_of_another_kind_are_refused_when_decoded(forge: Callable[..., Path]):
    def swap(index: Any) -> None:
        for item in index[SITE]["patterns"]:
            item[0][1] = {"raw": "gaps", "gaps": "deflate", "deflate": "gaps"}[
                item[0][1].removesuffix("/previous")
            ]

    plan = Plan.load(forge(lambda document, tensors: None, swap))
    for index in range(3):
        with pytest.raises(PlanFormatError, match=f"pattern {index} of site 'blocks.0.attn1' in"):
            plan.sites[SITE].patterns[index]


def test_a_file_of_the_first_schema_is_told_from_a_damaged_one(tmp_path: Path):
    text = '{"requires":[],"schema_version":1}'
    header = {file.FORMAT: f"{'0' * 64}\n{text}"}
    save_file({"a": np.zeros((2, 1, 3, 1), np.uint8)}, tmp_path / "p", metadata=header)
    with pytest.raises(PlanFormatError, match=r"(?s)schema that this version.*schema_version 1"):
        Plan.load(tmp_path / "p")


def test_a_file_changed_in_place_is_noticed_when_decoded(tmp_path: Path):
    path = tmp_path / "p"
    small_plan().save(path)
    plan = Plan.load(path)
    with path.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        opened.write(b"\x5a")
    with pytest.raises(PlanError):
        decode_all(plan)


def test_a_file_replaced_while_in_use_changes_nothing(tmp_path: Path):
    path = tmp_path / "p"
    small_plan().save(path)
    plan = Plan.load(path)
    plan_of_another_size().save(path)
    assert decode_all(plan) == 2
    assert plan == small_plan()


def test_dtypes_that_numpy_lacks_are_refused(tmp_path: Path):
    plan = small_plan()
    stored = {"a": StoredPatterns.pack(plan.sites["a"].patterns)}
    header = {file.FORMAT: file.header(file.to_json(plan.metadata), stored)}
    code = torch.ones(len(stored["a"].code), dtype=torch.bfloat16)
    save_torch({"a": code}, tmp_path / "p", metadata=header)
    with pytest.raises(PlanFormatError, match="tensors that don't fit its sites"):
        Plan.load(tmp_path / "p")


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_save_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
):
    path = tmp_path / "p"
    small_plan().save(path)
    before = path.read_bytes()

    def half_written(tensors: Any, target: Path, metadata: Any) -> None:
        target.write_bytes(b"half")
        raise error

    monkeypatch.setattr(file, "save_file", half_written)
    with pytest.raises(type(error)):
        plan_of_another_size().save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def plan_of_another_size() -> Plan:
    return Plan.from_masks(
        {"b": torch.ones(1, 4, 8, 8, dtype=torch.bool)}, (2, 8, 8), [5], (16, 16)
    )


SAVER = """
import sys
from calibatt_compiler.plan import Plan
plans = [Plan.load(name) for name in sys.argv[2:]]
print("ready", flush=True)
while True:
    for plan in plans:
        plan.save(sys.argv[1])
"""


def test_readers_and_a_kill_meet_whole_files_only(tmp_path: Path):
    plans = [small_plan(), plan_of_another_size()]
    names = [tmp_path / "one", tmp_path / "two"]
    for plan, name in zip(plans, names, strict=True):
        plan.save(name)
    path = tmp_path / "p"
    plans[0].save(path)
    saver = subprocess.Popen(
        [sys.executable, "-c", SAVER, path, *names], stdout=subprocess.PIPE, text=True
    )
    try:
        assert saver.stdout is not None
        assert saver.stdout.readline() == "ready\n"
        seen = {Plan.load(path).digest for _ in range(200)}
    finally:
        saver.send_signal(signal.SIGKILL)
        saver.wait()
    assert seen == {plan.digest for plan in plans}
    assert Plan.load(path) in plans


def test_a_saved_plan_has_ordinary_permissions(tmp_path: Path):
    path, other = tmp_path / "p", tmp_path / "other"
    small_plan().save(path)
    other.write_bytes(b"")
    assert path.stat().st_mode == other.stat().st_mode
