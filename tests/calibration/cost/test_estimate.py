"""Costs estimated beforehand against those of real, small calibrations."""

from __future__ import annotations

import tracemalloc
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from calibatt_compiler import Plan
from calibatt_compiler.calibration import (
    CalibrationConfig,
    SelectionConfig,
    calibrate,
    estimate,
)
from calibatt_compiler.calibration.cost.estimate import Estimate, Measurement
from calibatt_compiler.calibration.cost.sizes import SELECTION, SMALL, Sizes
from calibatt_compiler.calibration.observe.observer import ObservedModel
from calibatt_compiler.calibration.observe.recorder import AttentionRecorder
from calibatt_compiler.calibration.select.derive import derive_plan
from calibatt_compiler.calibration.store.energies import EnergyBuffer
from calibatt_compiler.calibration.store.records import InputRecord, SiteSize
from calibatt_compiler.calibration.store.run_folder import RunStore
from calibatt_compiler.cli.tables import costs as report
from calibatt_compiler.errors import CalibrationError

PROMPTS = ["a big rabbit runs", "the bird flies é"]


def record(*, votes: int, steps: int, length: int = 2048, heads: int = 4) -> InputRecord:
    """The record of an input of one site in blocks of 16."""
    shares = tuple(0.5 for _ in range(steps))
    return InputRecord(
        name="00000",
        about={},
        model=None,
        grid=(1, 1, length),
        text=None,
        block=(16, 16),
        scheduler=None,
        timesteps=tuple(float(steps - step) for step in range(steps)),
        sigmas=None,
        positions=tuple(range(steps)),
        schedule_steps=steps,
        thresholds={"A": 0.8, "C": 0.9, "k": 1.0},
        guided=False,
        sites=(
            SiteSize(name="a", heads=heads, head_dim=16, query_length=length, key_length=length),
        ),
        votes={"a": (votes,) * steps},
        kept_mass={"a": shares},
        best_share={"a": shares},
    )


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        ({}, {}),
        ({"keep_energies": True}, {"num_inference_steps": 1}),
        ({"cfg": "both"}, {"num_videos_per_prompt": 2, "num_inference_steps": 2}),
        ({"gamma": 0.5, "anchor_rows": 1}, {"num_inference_steps": 2}),
    ],
    ids=["masks", "energies, one step", "both branches of two videos", "repetition"],
)
def test_disk_is_told_within_a_tenth(
    settings: dict[str, Any],
    arguments: dict[str, Any],
    tiny_wan_pipeline: Any,
    tiny_wan_arguments: dict[str, int],
    tmp_path: Path,
) -> None:
    pipe, out = tiny_wan_pipeline, tmp_path / "p.calibatt"
    config = CalibrationConfig(block=(16, 16), **{"form": "masks"} | settings)
    arguments = {**tiny_wan_arguments, **arguments}
    attributes = set(pipe.transformer.__dict__)
    told = estimate(pipe, PROMPTS, 3, out=out, config=config, **arguments)
    assert not list(tmp_path.iterdir())
    # diffusers keeps a registry of hooks from the first call on.
    assert set(pipe.transformer.__dict__) - attributes <= {"_diffusers_hook"}
    calibrate(pipe, PROMPTS, 3, out=out, config=config, **arguments)
    run = sum(file.stat().st_size for file in Path(f"{out}.calibration").iterdir())
    assert told.run_bytes == pytest.approx(run, rel=0.01)
    # Of the plan the estimate is a bound: its codes are shorter than its bits.
    patterns = [p for s in Plan.load(out).sites.values() for p in s.patterns]
    bits = sum(pattern.bits.nbytes for pattern in patterns)
    written = out.stat().st_size
    assert written <= told.plan_bytes <= 1.1 * (written + bits)
    assert told.disk_bytes == told.run_bytes + told.plan_bytes
    assert (told.inputs, told.finished, told.sites) == (2, 0, 2)
    assert told.steps == arguments["num_inference_steps"]
    assert 0 < told.measured.step_seconds < told.seconds
    assert told.measured.device_bytes is None


@pytest.mark.slow
def test_what_is_done_already_takes_no_time(
    tiny_wan_pipeline: Any, tiny_wan_arguments: dict[str, int], tmp_path: Path
) -> None:
    pipe, out = tiny_wan_pipeline, tmp_path / "p.calibatt"
    arguments = {**tiny_wan_arguments, "num_inference_steps": 1}
    config = CalibrationConfig(block=(32, 32))
    calibrate(pipe, PROMPTS[:1], 3, out=out, config=config, **arguments)
    told = estimate(pipe, PROMPTS, 3, out=out, config=config, **arguments)
    assert (told.inputs, told.finished) == (2, 1)
    again = replace(config, restart=True)
    assert estimate(pipe, PROMPTS, 3, out=out, config=again, **arguments).finished == 0
    nowhere = estimate(pipe, PROMPTS, 3, config=config, **arguments)
    assert (nowhere.finished, nowhere.disk_bytes) == (0, 0)


def test_time_is_a_sum() -> None:
    measured = Measurement(2.0, 3.0, 10.0, None, record(votes=1, steps=50))
    told = Estimate(16, 6, 50, 1, measured, 1 << 20, 3 << 30, 1000, 24)
    assert told.seconds == 10 * (3 + 50 * 2) + 10
    assert replace(told, finished=16).seconds == 0
    scoring = replace(measured, scoring_seconds=1.0)
    scored = replace(told, measured=scoring, scored=2)
    assert scored.seconds == told.seconds + 2 * 50
    assert replace(scored, processes=4).seconds == 3 * (3 + 50 * 2) + 10 + 50
    assert told.disk_bytes == 1024
    assert [report.duration(s) for s in (0.0123, 2.345, 600, 40_000)] == [
        "12 ms",
        "2.35 s",
        "10 min",
        "11 h 7 min",
    ]
    assert [report.size(s) for s in (1, 1000, 3 << 30)] == ["1 B", "0.977 KiB", "3 GiB"]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made within it that are still referred to."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._users: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage.data_ptr(), storage.nbytes()
                self._now += 0 if self._users[key] else size
                self._users[key] += 1
                weakref.finalize(tensor, self._released, key, size)
        self.peak = max(self.peak, self._now)
        return out

    def _released(self, key: int, size: int) -> None:
        self._users[key] -= 1
        self._now -= 0 if self._users[key] else size


@pytest.mark.parametrize("text", [None, "last"])
def test_memory_of_a_call_stays_within_the_bound(text: Any, tmp_path: Path) -> None:
    sizes = Sizes(record(votes=2, steps=1), keep_energies=False)
    grid = (1, 1, 2048 - 40 * bool(text))
    config = CalibrationConfig(block=(16, 16), num_steps=1, grid=grid, text=text)
    model = ObservedModel(module=torch.nn.Identity(), config=config)
    recorder = AttentionRecorder(model, EnergyBuffer(tmp_path / "energies"))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 2048, 16, generator=generator) for _ in range(3))
    recorder.begin("00000", {}, None)
    with LiveBytes() as live:
        recorder.attend("a", q, k, v, 1.0, 0.25)
    bound = sizes.working_bytes(4, torch.device("cpu"))
    assert live.peak <= bound
    # It is no idle bound: the selection alone takes a good part of what is allowed for it.
    assert live.peak > 0.4 * SELECTION * 2 * 4 * 128 * 128


@pytest.mark.parametrize("order", ["raster", "2x8x8"])
def test_memory_of_a_scored_call_stays_within_the_bound(order: str, tmp_path: Path) -> None:
    """With wide heads and few blocks, so that what scoring takes is most of it."""
    grid = (8, 16, 16)
    site = SiteSize(name="a", heads=2, head_dim=128, query_length=2048, key_length=2048)
    known = record(votes=2, steps=1).model_copy(
        update={"grid": grid, "block": (128, 128), "sites": (site,)}
    )
    config = CalibrationConfig(num_steps=1, grid=grid, gamma=0.5, token_order=order)
    model = ObservedModel(module=torch.nn.Identity(), config=config)
    recorder = AttentionRecorder(model, EnergyBuffer(tmp_path / "energies"))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 2048, 128, generator=generator) for _ in range(3))
    q = q[:, :, :1].expand_as(k).contiguous()  # all heads are compared with their sparse form
    recorder.begin("00000", {}, None, scored=True)
    with LiveBytes() as live:
        recorder.attend("a", q, k, v, 1.0, 0.1)
    without, bound = (
        Sizes(known, keep_energies=False, anchor_rows=rows).working_bytes(4, torch.device("cpu"))
        for rows in (0, 5)
    )
    assert live.peak <= bound
    assert live.peak > 0.4 * (bound - without)


@pytest.mark.parametrize("energies", [False, True])
@pytest.mark.parametrize("refined", [False, True])
def test_memory_of_masks_and_plan_stays_within_the_bound(
    energies: bool, refined: bool, tmp_path: Path
) -> None:
    known = record(votes=2, steps=24)
    sizes = Sizes(known, keep_energies=energies)
    generator = np.random.default_rng(0)
    dtypes = {"U8": np.uint8, "F32": np.float32}
    store = RunStore(tmp_path / "run").open({"cfg": "none", "arguments": None})
    buffer = EnergyBuffer(tmp_path / "energies")

    def write() -> None:
        arrays: dict[str, Any] = {}
        for name, (dtype, shape) in sizes.arrays().items():
            raw = generator.integers(1, 255, shape, np.uint8).astype(dtypes[dtype], copy=False)
            arrays[name] = buffer.keep(raw) if name.endswith("/energy") else raw
        store.write(known, arrays)

    def derive() -> None:
        selection = SelectionConfig(
            share_steps=0.97 if refined else None, merge_budget=0.02 if refined else None
        )
        plan = derive_plan(store, ["00000"], selection)
        plan.save(tmp_path / "plan")
        assert plan.digest

    growing = sizes.host_bytes() - SMALL
    peaks = []
    for work in (write, derive):
        tracemalloc.start()
        try:
            work()
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    store.close()
    assert max(peaks) <= growing
    assert max(peaks) > 0.25 * growing
    assert Plan.load(tmp_path / "plan").steps == 24


def test_why_nothing_can_be_told_is_said(
    tiny_wan_pipeline: Any, tiny_wan_arguments: dict[str, int]
) -> None:
    config = CalibrationConfig(grid=(9, 9, 9))  # more tokens than any call has
    with pytest.raises(CalibrationError, match="no attention call"):
        estimate(tiny_wan_pipeline, PROMPTS, config=config, **tiny_wan_arguments)
