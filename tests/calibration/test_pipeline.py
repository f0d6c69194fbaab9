"""Calibration of a whole diffusers pipeline."""

from __future__ import annotations

import copy
import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Calibration

from calibatt_compiler import Plan
from calibatt_compiler.calibration import CalibrationConfig, calibrate
from calibatt_compiler.calibration.observe.pipelines import branch_of
from calibatt_compiler.calibration.store.run_folder import RunStore
from calibatt_compiler.errors import CalibrationError, OptionError

CONFIG = CalibrationConfig(block=(32, 32), form="masks")
PROMPTS = ["a big rabbit runs", "the bird flies"]


def generate(pipe: Any, arguments: dict[str, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    frames: torch.Tensor = pipe(
        prompt="a bird", generator=generator, output_type="latent", **arguments
    ).frames
    return frames


def test_a_pipeline_is_calibrated_and_left_as_it_was(
    tiny_wan_pipeline: Any,
    tiny_wan_arguments: dict[str, int],
    tiny_wan_grid: tuple[int, int, int],
    tmp_path: Path,
) -> None:
    pipe, out = tiny_wan_pipeline, tmp_path / "tiny.calibatt"
    before = generate(pipe, tiny_wan_arguments)
    attributes = set(pipe.transformer.__dict__)
    plan = calibrate(pipe, PROMPTS, [3, 4], out=out, config=CONFIG, **tiny_wan_arguments)
    assert torch.equal(generate(pipe, tiny_wan_arguments), before)
    assert set(pipe.transformer.__dict__) == attributes
    assert list(plan.sites) == ["blocks.0.attn1", "blocks.1.attn1"]
    assert plan.grid == tiny_wan_grid
    assert plan.sites["blocks.0.attn1"].query_length == math.prod(tiny_wan_grid)
    assert plan.sites["blocks.0.attn1"].head_dim == 64
    sampler = plan.metadata.sampler
    assert sampler.name == "FlowMatchEulerDiscreteScheduler"
    assert sampler.timesteps == tuple(pipe.scheduler.timesteps.tolist())
    assert sampler.sigmas == tuple(pipe.scheduler.sigmas.tolist()[:3])
    assert plan.metadata.cfg == "separate"
    assert plan.metadata.thresholds == {
        "A": 0.763,
        "C": 0.863,
        "k": 5.64,
        "rho": 0.5,
        "share_steps": 0.97,
    }
    assert plan.metadata.quality["best_20_percent_share"] > 0.2
    assert 0.1 < plan.density() < 0.95
    assert Plan.load(out) == plan
    assert (tmp_path / "tiny.calibatt.calibration").is_dir()

    # The same call again needs no model, and more prompts need only themselves.
    pipe_calls = tiny_wan_pipeline.transformer.register_forward_pre_hook(_forbidden)
    try:
        again = calibrate(pipe, PROMPTS, [3, 4], out=out, config=CONFIG, **tiny_wan_arguments)
    finally:
        pipe_calls.remove()
    assert again.digest == plan.digest
    with pytest.raises(CalibrationError, match="was something else"):
        calibrate(pipe, PROMPTS[::-1], [3, 4], out=out, config=CONFIG, **tiny_wan_arguments)
    with pytest.raises(CalibrationError, match="arguments"):
        calibrate(
            pipe, PROMPTS, [3, 4], out=out, config=CONFIG, guidance_scale=2, **tiny_wan_arguments
        )
    one = calibrate(pipe, PROMPTS[:1], 3, out=out, config=CONFIG, **tiny_wan_arguments)
    assert one.metadata.inputs.count == 1
    assert one != plan


def _forbidden(*_: object) -> None:
    raise AssertionError("the model must not be called")


def votes(folder: Path) -> set[int]:
    """How many masks the first input of a run has at each site and step."""
    by_site = RunStore(folder).record("00000").votes
    return {count for counts in by_site.values() for count in counts}


@pytest.mark.slow
def test_which_branches_and_samples_count(
    tiny_wan_pipeline: Any, tiny_wan_arguments: dict[str, int], tmp_path: Path
) -> None:
    def plan(name: str, config: CalibrationConfig = CONFIG, **changes: Any) -> Plan:
        arguments = {**tiny_wan_arguments, "num_inference_steps": 1, **changes}
        config = replace(config, run_folder=tmp_path / name)
        return calibrate(tiny_wan_pipeline, PROMPTS[:1], config=config, **arguments)

    # At the first step both runs see the same noise: guidance only adds the branch not counted.
    guided, unguided = plan("guided"), plan("unguided", guidance_scale=1.0)
    assert guided.metadata.cfg == "separate"
    assert unguided.metadata.cfg == "none"
    for site in guided.sites:
        assert torch.equal(guided.block_mask(site, 0), unguided.block_mask(site, 0))
    assert votes(tmp_path / "guided") == votes(tmp_path / "unguided") == {1}

    both = plan("both", replace(CONFIG, cfg="both"))
    assert both.metadata.cfg == "separate"
    assert votes(tmp_path / "both") == {2}

    assert plan("samples", num_videos_per_prompt=2).metadata.inputs.count == 1
    assert votes(tmp_path / "samples") == {2}


def test_a_pipeline_without_branch_names_counts_first_calls(
    tiny_wan_pipeline: Any,
    tiny_wan_arguments: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = {**tiny_wan_arguments, "num_inference_steps": 2}

    def plan() -> Plan:
        return calibrate(tiny_wan_pipeline, PROMPTS[:1], config=CONFIG, **arguments)

    named = plan()
    monkeypatch.setattr(
        "calibatt_compiler.calibration.observe.pipelines.branch_of", lambda name: "unknown"
    )
    unnamed = plan()
    for site in named.sites:
        for step in range(named.steps):
            assert torch.equal(named.block_mask(site, step), unnamed.block_mask(site, step))


@pytest.mark.parametrize(
    ("context", "branch"),
    [
        ("cond", "conditional"),
        ("pred_cond", "conditional"),
        ("uncond", "unconditional"),
        ("pred_uncond", "unconditional"),
        ("uncond_stg", "unconditional"),
        ("cond_uncond", "paired"),
    ],
)
def test_branches_by_the_names_diffusers_gives(context: str, branch: str) -> None:
    assert branch_of(context) == branch


def test_a_compiled_transformer_is_unwrapped_and_put_back(
    tiny_wan_pipeline: Any, tiny_wan_arguments: dict[str, int]
) -> None:
    pipe = tiny_wan_pipeline
    arguments = {**tiny_wan_arguments, "num_inference_steps": 1}
    plain = pipe.transformer
    wrapped = torch.compile(plain, backend="eager")
    pipe.transformer = wrapped
    try:
        plan = calibrate(pipe, PROMPTS[:1], config=CONFIG, **arguments)
        assert pipe.transformer is wrapped
    finally:
        pipe.transformer = plain
    assert plan == calibrate(pipe, PROMPTS[:1], config=CONFIG, **arguments)


@pytest.mark.slow
def test_each_of_two_transformers_gets_the_steps_that_it_runs(
    tiny_wan_folder: Path, tiny_wan_arguments: dict[str, int]
) -> None:
    """As in Wan 2.2: one transformer for noisy steps, one for the others."""
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(tiny_wan_folder)
    pipe.register_modules(transformer_2=copy.deepcopy(pipe.transformer))
    pipe.register_to_config(boundary_ratio=0.8)
    plans = [
        calibrate(pipe, PROMPTS[:1], config=replace(CONFIG, component=name), **tiny_wan_arguments)
        for name in ("transformer", "transformer_2")
    ]
    pipe.scheduler.set_timesteps(tiny_wan_arguments["num_inference_steps"])
    timesteps = tuple(pipe.scheduler.timesteps.tolist())
    assert tuple(t for plan in plans for t in plan.timesteps) == timesteps
    assert all(plan.steps for plan in plans)
    assert plans[0].step_of(timesteps[-1]) is None


def test_what_cannot_be_used_is_refused(
    tiny_wan_pipeline: Any, tiny_wan_arguments: dict[str, int]
) -> None:
    pipe, arguments = tiny_wan_pipeline, tiny_wan_arguments
    with pytest.raises(OptionError, match="needs prompts"):
        calibrate(pipe, [], **arguments)
    with pytest.raises(OptionError, match="needs prompts"):
        calibrate(pipe, "a bird", **arguments)
    with pytest.raises(OptionError, match="don't match"):
        calibrate(pipe, PROMPTS, [1], **arguments)
    with pytest.raises(OptionError, match="not usable"):
        calibrate(pipe, PROMPTS, 0.5, **arguments)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="generator"):
        calibrate(pipe, PROMPTS, generator=torch.Generator(), **arguments)
    with pytest.raises(CalibrationError, match="can't be calibrated"):
        calibrate(object(), PROMPTS, **arguments)
    with pytest.raises(CalibrationError, match="transformer_2"):
        calibrate(pipe, PROMPTS, config=CalibrationConfig(component="transformer_2"), **arguments)


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_plan(
    tiny_wan_folder: Path, tiny_wan_arguments: dict[str, int], tmp_path: Path
) -> None:
    work = {
        "prompts": ["a big rabbit runs", "the bird flies", "a tree"],
        "seeds": 1,
        "config": CalibrationConfig(block=(32, 32)),
        **tiny_wan_arguments,
    }

    def digest(out: Path) -> str:
        code, printed, said = Calibration(tiny_wan_folder, out=out, **work).result()
        assert code == 0, said
        return printed.split()[-1]

    killed = tmp_path / "killed.calibatt"
    folder = Path(f"{killed}.calibration")
    process = Calibration(tiny_wan_folder, out=killed, **work)
    until = time.monotonic() + 300
    while not list(folder.glob("input-*")) and time.monotonic() < until:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.result()[0] == -signal.SIGKILL
    finished = sorted(path.name for path in folder.glob("input-*"))
    assert finished
    assert len(finished) < 3, "the kill came too late to prove anything"
    assert not killed.exists()
    stamps = {name: (folder / name).stat().st_mtime_ns for name in finished}

    resumed = digest(killed)
    assert {name: (folder / name).stat().st_mtime_ns for name in finished} == stamps
    undisturbed = tmp_path / "undisturbed.calibatt"
    assert digest(undisturbed) == resumed
    assert Plan.load(killed) == Plan.load(undisturbed)
