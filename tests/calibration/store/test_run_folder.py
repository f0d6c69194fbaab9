"""The run folder: what survives a kill, what is refused."""

from __future__ import annotations

import json
import multiprocessing
import os
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from calibatt_compiler.calibration.store.records import InputRecord, SiteSize
from calibatt_compiler.calibration.store.run_folder import RunStore
from calibatt_compiler.errors import CalibrationError

IDENTITY = {"format": 1, "model": {"class_name": "M"}, "settings": {"block": (32, 32), "A": 0.9}}


def record(name: str, **changes: object) -> InputRecord:
    values: dict[str, object] = {
        "name": name,
        "about": {"prompt": "a bird", "seed": 1},
        "model": None,
        "grid": (1, 8, 8),
        "text": None,
        "block": (32, 32),
        "scheduler": "S",
        "timesteps": (900.0, 100.0),
        "sigmas": (0.9, 0.1),
        "positions": (0, 1),
        "schedule_steps": 2,
        "thresholds": {"A": 0.9, "C": 0.9, "k": 1.0},
        "guided": True,
        "sites": (SiteSize(name="a", heads=1, head_dim=8, query_length=64, key_length=64),),
        "votes": {"a": (1, 1)},
        "kept_mass": {"a": (0.9, 0.91)},
        "best_share": {"a": (0.5, 0.5)},
    }
    return InputRecord(**{**values, **changes})  # type: ignore[arg-type]


ARRAYS = {
    "a@0": np.asarray([[[[1], [2]]]], np.uint8),
    "a@1": np.asarray([[[[3], [3]]]], np.uint8),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    store = RunStore(tmp_path / "run").open(IDENTITY)
    store.write(record("00000"), ARRAYS)
    store.close()
    return tmp_path / "run"


def test_inputs_come_back(folder: Path) -> None:
    store = RunStore(folder).open(IDENTITY)
    assert store.names() == ["00000"]
    assert store.has("00000")
    assert not store.has("00001")
    kept = store.record("00000")
    assert kept.model_copy(update={"tensors": {}}) == record("00000")
    assert np.array_equal(store.tensor("00000", "a@1"), ARRAYS["a@1"])
    store.close()


def test_equal_inputs_make_equal_files(folder: Path) -> None:
    path = folder / "input-00000.safetensors"
    first = path.read_bytes()
    store = RunStore(folder).open(IDENTITY)
    for _ in range(10):
        store.write(record("00000"), dict(reversed(ARRAYS.items())))
        assert path.read_bytes() == first
    store.close()


def test_leftovers_of_a_kill_are_cleared_and_do_not_count(folder: Path) -> None:
    leftover = folder / ".input-00001-x1b2c3d4.tmp.safetensors"
    leftover.write_bytes(b"half")
    store = RunStore(folder).open(IDENTITY)
    assert store.names() == ["00000"]
    assert not leftover.exists()
    store.close()


def test_another_run_is_refused_with_what_differs(folder: Path) -> None:
    with pytest.raises(CalibrationError, match=r"settings.A.*0.9") as caught:
        RunStore(folder).open({**IDENTITY, "settings": {"block": (32, 32), "A": 0.8}})
    assert "'settings.A': 0.8" in str(caught.value.got)
    assert "block" not in str(caught.value.got)
    assert "restart" in str(caught.value.remedy)
    RunStore(folder).open(IDENTITY).close()  # the refusal let go of the folder


def test_restart_forgets(folder: Path) -> None:
    bystander = folder / "notes.txt"
    bystander.write_text("mine")
    store = RunStore(folder).open({"format": 1}, restart=True)
    assert store.names() == []
    assert bystander.exists()
    store.close()
    assert json.loads((folder / "run.json").read_text()) == {"format": 1}


def test_inputs_without_a_run_file_are_refused(folder: Path) -> None:
    (folder / "run.json").unlink()
    with pytest.raises(CalibrationError, match="something else"):
        RunStore(folder).open(IDENTITY)
    (folder / "run.json").write_text("{")
    with pytest.raises(CalibrationError, match="does not parse"):
        RunStore(folder).open(IDENTITY)


def read(store: RunStore) -> list[np.ndarray]:
    return [store.tensor("00000", key) for key in ARRAYS]


def test_any_flipped_bit_is_noticed(folder: Path) -> None:
    path = folder / "input-00000.safetensors"
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[at] ^= 1
        path.write_bytes(changed)
        store = RunStore(folder)
        with pytest.raises(CalibrationError, match="damaged"):
            read(store)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_a_cut_file_is_an_error(folder: Path, length: int) -> None:
    path = folder / "input-00000.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CalibrationError, match="delete that file"):
        RunStore(folder).record("00000")


def hold(folder: Path, ready: multiprocessing.synchronize.Event) -> None:
    store = RunStore(folder).open(IDENTITY)
    ready.set()
    assert store.names()
    multiprocessing.Event().wait()


def test_two_processes_do_not_share_a_folder_and_a_killed_one_lets_go(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=hold, args=(folder, ready))
    holder.start()
    try:
        assert ready.wait(30)
        with pytest.raises(CalibrationError, match=f"held by process {holder.pid} on"):
            RunStore(folder).open(IDENTITY)
    finally:
        holder.kill()
        holder.join()
    assert (folder / "lock").exists()
    store = RunStore(folder).open(IDENTITY)
    assert (folder / "lock").read_text().startswith(f"{os.getpid()} ")
    store.close()
    assert not (folder / "lock").exists()


def test_ranks_share_a_folder_and_keep_others_out_until_the_last_has_gone(folder: Path) -> None:
    first = RunStore(folder).open(IDENTITY, shared=True)
    second = RunStore(folder).join(IDENTITY)
    with pytest.raises(CalibrationError, match=f"held by process {os.getpid()} on"):
        RunStore(folder).open(IDENTITY)
    second.write(record("00001"), ARRAYS)
    assert first.names() == ["00000", "00001"]
    first.close()
    with pytest.raises(CalibrationError, match="another calibration"):
        RunStore(folder).open(IDENTITY)
    second.close()
    assert not (folder / "lock").exists()
    alone = RunStore(folder).open(IDENTITY)
    with pytest.raises(CalibrationError, match="another calibration"):
        RunStore(folder).join(IDENTITY)
    alone.close()


def test_a_rank_joins_its_own_run_only(folder: Path, tmp_path: Path) -> None:
    with closing(RunStore(folder).open(IDENTITY, shared=True)):
        with pytest.raises(CalibrationError, match="something else"):
            RunStore(folder).join({**IDENTITY, "format": 2})
        with pytest.raises(CalibrationError, match="does not see"):
            RunStore(tmp_path / "elsewhere").join(IDENTITY)
    RunStore(folder).open(IDENTITY).close()  # neither refusal held on to the folder


def test_half_done_work_of_any_rank_is_swept(folder: Path) -> None:
    (folder / "spool-1").mkdir()
    (folder / "spool-1" / "000000.npy").write_bytes(b"x")
    (folder / "rank-00001").write_text("")
    RunStore(folder).open(IDENTITY).close()
    assert sorted(path.name for path in folder.iterdir()) == [
        "input-00000.safetensors",
        "run.json",
    ]


def test_names_are_file_names(folder: Path) -> None:
    store = RunStore(folder)
    for name in ("", "../x", "a/b", ".hidden", "x" * 101):
        with pytest.raises(CalibrationError, match="file name"):
            store.has(name)
