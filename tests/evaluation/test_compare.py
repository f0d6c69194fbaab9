"""A whole comparison on the tiny pipeline, and the folder it leaves."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from calibatt_compiler.cli.pipelines import arguments_for_plan, arguments_of_plan, load_pipeline
from calibatt_compiler.errors import OptionError, PipelineError, PlanMismatchError
from calibatt_compiler.evaluation.cases import Case
from calibatt_compiler.evaluation.compare import compare, to_bytes
from calibatt_compiler.evaluation.comparison import Comparison, ComparisonConfig
from calibatt_compiler.evaluation.results import Results, terminal
from calibatt_compiler.plan import Plan

CASES = [Case("a big rabbit runs", 1), Case("the small bird flies", 2)]
BLOCK = 32


def plan_of(pipe: Any, grid: tuple[int, int, int], steps: int, *, keep: float) -> Plan:
    """A random plan for both layers of the tiny pipeline."""
    tokens = math.prod(grid)
    blocks = -(-tokens // BLOCK)
    generator = torch.Generator().manual_seed(0)
    masks = {}
    for layer in range(2):
        mask = torch.rand(steps, 2, blocks, blocks, generator=generator) < keep
        masks[f"blocks.{layer}.attn1"] = mask | torch.eye(blocks, dtype=torch.bool)
    pipe.scheduler.set_timesteps(steps)
    return Plan.from_masks(masks, grid, pipe.scheduler.timesteps.tolist(), (BLOCK, BLOCK))


@pytest.fixture(scope="module", autouse=True)
def without_inductor() -> Iterator[None]:
    """Run the graphs as they are: compiling them is what other tests are for."""
    with mock.patch("calibatt_compiler.backend._inductor", lambda gm, *_: gm.forward):
        yield


@pytest.fixture(scope="module")
def pipe(tiny_wan_folder: Path) -> Any:
    """A pipeline of this module's own."""
    return load_pipeline(str(tiny_wan_folder), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def outcome(
    pipe: Any,
    tiny_wan_arguments: dict[str, int],
    tiny_wan_grid: tuple[int, int, int],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Comparison, Path]:
    """One comparison of a sparse and a dense plan, and its folder."""
    plans = {
        "sparse": plan_of(pipe, tiny_wan_grid, 3, keep=0.2),
        "everything": plan_of(pipe, tiny_wan_grid, 3, keep=1.0),
    }
    config = ComparisonConfig(
        arguments=tiny_wan_arguments, dense="eager", timed_steps=2, further_cases=1
    )
    folder = tmp_path_factory.mktemp("results") / "new"
    results = Results(folder)
    original = pipe.transformer
    comparison = compare(pipe, CASES, plans, config, on_video=results.add_video)
    assert pipe.transformer is original, "the pipeline is left as it was"
    results.write(comparison, title="A <test>", links=[("plan.calibatt", "the plan")])
    return comparison, folder


def test_quality_is_of_the_plan(outcome: tuple[Comparison, Path]):
    comparison, _ = outcome
    sparse, everything = comparison.plans
    assert comparison.main is sparse
    assert [video.seed for video in sparse.videos] == [1, 2]
    assert [video.seed for video in everything.videos] == [1], "further plans see fewer cases"
    assert everything.psnr > 60, "a plan that keeps all blocks changes nothing but rounding"
    assert sparse.psnr < everything.psnr
    assert sparse.ssim < 1
    assert sparse.sparsity == pytest.approx(1 - sparse.plan.density())


def test_what_was_compared_was_sparse(outcome: tuple[Comparison, Path]):
    sparse = outcome[0].main
    rows = {row.name: row for row in sparse.summary.rows}
    assert rows["blocks.0.attn1"].status == "sparse"
    # Two calls a step: 1 step of warm-up, 2 videos of 3 steps, 6 rounds of 2 steps.
    assert rows["blocks.0.attn1"].sparse_calls == 2 * (1 + 2 * 3 + 6 * 2)
    assert set(sparse.summary.dense_calls) == {"dense: cross-attention"}
    assert sparse.computed_density == pytest.approx(sparse.plan.density())


def test_json_holds_all_figures(outcome: tuple[Comparison, Path]):
    comparison, folder = outcome
    data = json.loads((folder / "compare.json").read_text("utf-8"))
    first = data["plans"][0]
    assert first["psnr"] == pytest.approx(comparison.main.psnr)
    assert first["step_ratio"] == pytest.approx(comparison.main.step_ratio)
    assert [video["prompt"] for video in first["videos"]] == [case.prompt for case in CASES]
    step = data["denoising_step"]
    assert {len(rounds) for rounds in step["seconds"].values()} == {5}
    assert set(step["seconds"]) == {"dense", "sparse", "everything"}
    assert data["versions"]["torch"] == torch.__version__


def test_folder_is_complete(outcome: tuple[Comparison, Path]):
    comparison, folder = outcome
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "compare.json",
        "curve.png",
        "index.html",
        "summary.txt",
        "video-00.mp4",
        "video-00.png",
        "video-01.mp4",
        "video-01.png",
    }
    page = (folder / "index.html").read_text("utf-8")
    assert "A &lt;test&gt;" in page
    assert f"{comparison.main.psnr:.2f} dB" in page
    assert "video-01.mp4" in page
    assert "http" not in page
    assert "blocks.0.attn1" in (folder / "summary.txt").read_text("utf-8")
    assert terminal(comparison).row_count == 2


@pytest.mark.slow
def test_another_size_is_a_mismatch(
    pipe: Any, tiny_wan_arguments: dict[str, int], tiny_wan_grid: tuple[int, int, int]
):
    plan = plan_of(pipe, tiny_wan_grid, 3, keep=0.5)
    config = ComparisonConfig(arguments={**tiny_wan_arguments, "width": 160}, dense="eager")
    with pytest.raises(PlanMismatchError):
        compare(pipe, CASES[:1], {"plan": plan}, config)


def test_refusals(pipe: Any, tiny_wan_grid: tuple[int, int, int]):
    plan = plan_of(pipe, tiny_wan_grid, 3, keep=0.5)
    config = ComparisonConfig(arguments={"height": 100, "width": 144}, dense="eager")
    with pytest.raises(PipelineError, match="nothing to compare"):
        compare(pipe, [], {"plan": plan}, config)
    with pytest.raises(PipelineError, match="nothing to compare"):
        compare(pipe, CASES, {"dense": plan}, config)
    with pytest.raises(PipelineError, match="divisible"):
        compare(pipe, CASES, {"plan": plan}, config)


def test_size_of_a_plan_in_pixels(
    pipe: Any, tiny_wan_arguments: dict[str, int], tiny_wan_grid: tuple[int, int, int]
):
    found = arguments_of_plan(pipe, plan_of(pipe, tiny_wan_grid, 3, keep=0.5))
    expected = {key: tiny_wan_arguments[key] for key in found}
    assert found == expected
    assert set(found) == {"height", "width", "num_frames", "num_inference_steps"}


def test_frames_are_rounded_to_8_bits():
    frames = np.array([-0.1, 0.0, 0.4999 / 255, 0.5001 / 255, 1.0, 2.0])
    assert to_bytes(frames).tolist() == [0, 0, 0, 1, 255, 255]
    same = np.array([3, 4], np.uint8)
    assert to_bytes(same) is same


@pytest.mark.slow
def test_one_of_two_transformers_is_compared(
    pipe: Any, tiny_wan_arguments: dict[str, int], tiny_wan_grid: tuple[int, int, int]
):
    """As in Wan 2.2; the transformer that has no plan runs as it is."""
    plan = plan_of(pipe, tiny_wan_grid, 3, keep=0.2)
    pipe.register_modules(transformer_2=copy.deepcopy(pipe.transformer))
    pipe.register_to_config(boundary_ratio=0.8)
    before = pipe.transformer, pipe.transformer_2
    config = ComparisonConfig(
        arguments=tiny_wan_arguments, dense="eager", timed_steps=1, component="transformer_2"
    )
    try:
        with pytest.raises(OptionError, match="number of steps"):
            arguments_for_plan(pipe, plan, {}, None)
        assert arguments_for_plan(pipe, plan, {"num_inference_steps": 3}, None)
        comparison = compare(pipe, CASES[:1], {"late": plan}, config)
        assert (pipe.transformer, pipe.transformer_2) == before
    finally:
        pipe.register_modules(transformer_2=None)
        pipe.register_to_config(boundary_ratio=None)
    assert comparison.main.summary.sparse_calls > 0
    assert 0 < comparison.main.psnr < 100
    assert comparison.to_dict()["component"] == "transformer_2"


def test_a_component_that_is_not_there(pipe: Any, tiny_wan_grid: tuple[int, int, int]):
    plan = plan_of(pipe, tiny_wan_grid, 3, keep=0.2)
    with pytest.raises(PipelineError, match="no transformer_2"):
        compare(pipe, CASES, {"a": plan}, ComparisonConfig(component="transformer_2"))
