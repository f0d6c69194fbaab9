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
from plan_files import decode_all
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


@pytest.mark.slow
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
