"""Token orders chosen by measurement."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import Calibration
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import calibatt_compiler
from calibatt_compiler import Plan
from calibatt_compiler.calibration import CalibrationConfig, calibrate, estimate, survey
from calibatt_compiler.calibration.order_search.search import Surveyor, settled
from calibatt_compiler.calibration.store.order_survey import OrderSurvey, stored
from calibatt_compiler.calibration.store.ranks import Ranks
from calibatt_compiler.calibration.store.run_folder import RunStore
from calibatt_compiler.errors import CalibrationError, OptionError

TIMESTEPS = (900.0, 500.0, 100.0)
GRID = (2, 12, 16)
PROMPTS = ["a big rabbit runs", "the bird flies"]


class Near(nn.Module):
    """Attends to tokens that are near in a frame, along its height as much as along its width."""

    def forward(self, x: Tensor) -> Tensor:
        sizes = [torch.arange(float(size)) for size in GRID]
        frame, *place = torch.meshgrid(*sizes, indexing="ij")
        at = torch.stack([8 * frame, *place], -1).reshape(1, 1, -1, 3)
        # exp(-0.15 |a - b|^2 / 2) of places, as a product of vectors.
        ones, square = torch.ones_like(at[..., :1]), at.square().sum(-1, keepdim=True) / 2
        zeros = torch.zeros(*at.shape[:3], 4)
        q, k = torch.cat([at, ones, zeros], -1), torch.cat([at, -square, zeros], -1)
        v = x.view(1, at.shape[2], 1, -1).transpose(1, 2)
        out = scaled_dot_product_attention(q, k, v[..., :8], scale=0.15)
        return out.transpose(1, 2).reshape(x.shape)


class Alike(nn.Module):
    """Attends to tokens with the like content, which differs between inputs."""

    def forward(self, x: Tensor) -> Tensor:
        heads = x.view(1, x.shape[1], 1, -1).transpose(1, 2)
        out = scaled_dot_product_attention(heads, heads, heads)
        return out.transpose(1, 2).reshape(x.shape)


class Site(nn.Module):
    """A module with one site."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.attention(x + 0 * timestep)


def noise(seed: int) -> Tensor:
    return torch.randn(1, int(np.prod(GRID)), 8, generator=torch.Generator().manual_seed(seed))


def inputs(model: nn.Module, *seeds: int) -> list[Callable[[], None]]:
    """Functions that run the model over all steps, on inputs of some seeds."""

    def sample(seed: int) -> None:
        for timestep in TIMESTEPS:
            model(noise(seed), timestep=torch.tensor([timestep]))

    return [partial(sample, seed) for seed in seeds]


LOCAL = CalibrationConfig(block=(16, 16), A=0.9, C=0.9, k=1.0, grid=GRID, num_steps=3)


def test_local_attention_takes_a_compact_order() -> None:
    model = Site(Near())
    found = survey(model, inputs(model, 0, 1), LOCAL)
    assert found.steps == (0, 1, 2)
    assert found.held_out
    assert found.chosen != "raster"
    assert found.density[found.chosen] < 0.8 * found.density["raster"]
    assert found.error[found.chosen] < found.error["raster"]
    # What it says is what a calibration with that order then has: one input, its own masks.
    plans = {}
    for order in ("raster", found.chosen):
        with calibatt_compiler.calibration(model, replace(LOCAL, token_order=order)) as run:
            with run.input():
                inputs(model, 0)[0]()
            plans[order] = run.plan()
        assert plans[order].density() == pytest.approx(found.density[order], abs=1e-6)
        site = found.sites[order]["attention"]
        assert site == pytest.approx(plans[order].density("attention"), abs=1e-6)


@pytest.mark.parametrize("pooled", [0, 2])
@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_the_error_is_that_of_the_last_input_by_the_first_ones_plan(
    seeds: tuple[int, ...], pooled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calibatt_compiler.calibration.order_search.measure.SAMPLE", 1000)
    model, config = Site(Alike()), replace(LOCAL, pooled=pooled)
    found = survey(model, inputs(model, *seeds), config)
    assert found.held_out == (len(seeds) == 2)
    with calibatt_compiler.calibration(model, config) as run:
        with run.input():
            inputs(model, 0)[0]()
        plan = run.plan()
    x, timestep = noise(seeds[-1]), torch.tensor([TIMESTEPS[0]])
    dense = model(x, timestep=timestep)
    sparse = torch.compile(model, backend="calibatt", options={"plan": plan})(x, timestep=timestep)
    error = ((sparse - dense).norm() / dense.norm()).item()
    assert error > 0.01
    assert found.error["raster"] == pytest.approx(error, rel=1e-3)


def test_a_second_call_at_a_step_is_no_other_input() -> None:
    model = Site(Alike())
    one, other = (inputs(model, seed)[0] for seed in (0, 1))

    def both() -> None:
        for timestep in TIMESTEPS:
            for seed in (0, 1):
                model(noise(seed), timestep=torch.tensor([timestep]))

    found = survey(model, [both], LOCAL)
    assert not found.held_out
    errors = [survey(model, [run], LOCAL).error["raster"] for run in (one, other)]
    assert min(errors) <= found.error["raster"] <= max(errors)
    # Of another input each call is judged by the masks of the like call.
    assert survey(model, [both, both], LOCAL).error["raster"] == found.error["raster"]


def test_a_bare_module_is_told_what_to_do() -> None:
    model = Site(Near())
    auto = replace(LOCAL, token_order="auto")
    with (
        pytest.raises(OptionError, match=r"calibration\.survey"),
        calibatt_compiler.calibration(model, auto),
    ):
        pass
    for missing in ("num_steps", "grid"):
        with pytest.raises(OptionError, match=missing):
            survey(model, inputs(model, 0), replace(LOCAL, **{missing: None}))
    with pytest.raises(CalibrationError, match="no attention call"):
        survey(model, [lambda: None], LOCAL)
    with pytest.raises(OptionError, match="needs inputs"):
        survey(model, [], LOCAL)


AUTO = CalibrationConfig(block=(16, 16), form="masks", token_order="auto", progress=False)


@pytest.mark.slow
def test_a_pipeline_is_surveyed_once(
    tiny_wan_pipeline: Any,
    tiny_wan_arguments: dict[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # A random model's attention gives no reason for another order.
    monkeypatch.setattr(
        "calibatt_compiler.calibration.order_search.candidates.choose",
        lambda density, error: list(density)[1],
    )
    pipe, arguments = tiny_wan_pipeline, tiny_wan_arguments

    def run(name: str, prompts: list[str] = PROMPTS) -> Plan:
        return calibrate(pipe, prompts, 3, out=tmp_path / name, config=AUTO, **arguments)

    with caplog.at_level(logging.INFO, "calibatt"):
        plan = run("whole")
    assert "surveying token orders" in caplog.text
    found = stored(tmp_path / "whole.calibration")
    assert found is not None
    assert found.chosen != "raster"
    assert found.steps == (0, 1, 2)
    assert f"token order {found.chosen}; blocks kept" in caplog.text
    assert str(plan.token_order) == found.chosen
    figures = plan.metadata.quality
    assert figures["order_density:raster"] == found.density["raster"]
    assert figures[f"order_error:{found.chosen}"] == found.error[found.chosen]
    explicit = replace(AUTO, token_order=found.chosen)
    same = calibrate(pipe, PROMPTS, 3, config=explicit, **arguments)
    assert [same.block_mask(x, 0).equal(plan.block_mask(x, 0)) for x in plan.sites] == [True] * 2
    one = run("whole", PROMPTS[:1])
    # All steps were surveyed, of two inputs: the density is the mean of those of their plans.
    other = calibrate(pipe, PROMPTS[1:], 4, config=explicit, **arguments)
    both = (one.density() + other.density()) / 2
    assert both == pytest.approx(found.density[found.chosen], abs=1e-6)

    # Killed while it surveys, then while it records.
    kill_at = 10

    def killer(*_: object) -> None:
        nonlocal kill_at
        kill_at -= 1
        if kill_at == 0:
            raise KeyboardInterrupt

    hook = pipe.transformer.register_forward_pre_hook(killer)
    try:
        with pytest.raises(KeyboardInterrupt):
            run("killed")
        assert stored(tmp_path / "killed.calibration") is None
        kill_at = 12 + 6 + 3
        with pytest.raises(KeyboardInterrupt):
            run("killed")
        assert RunStore(tmp_path / "killed.calibration").names() == ["00000"]
        text = (tmp_path / "killed.calibration" / "order.json").read_text()
        kill_at = 1 << 30
        resumed = run("killed")
        assert (1 << 30) - kill_at == 6, "one input is left, and no survey"
    finally:
        hook.remove()
    assert (tmp_path / "killed.calibration" / "order.json").read_text() == text
    assert resumed.digest == plan.digest

    # Without its survey a run can't go on; begun again it is surveyed again.
    (tmp_path / "killed.calibration" / "order.json").unlink()
    with pytest.raises(CalibrationError, match="is gone"):
        run("killed")
    (tmp_path / "killed.calibration" / "order.json").write_text("{}")
    with pytest.raises(CalibrationError, match="damaged"):
        run("killed")
    again = calibrate(
        pipe,
        PROMPTS,
        3,
        out=tmp_path / "killed",
        config=replace(AUTO, restart=True),
        **arguments,
    )
    assert again.digest == plan.digest


@pytest.mark.slow
def test_costs_count_the_survey(
    tiny_wan_pipeline: Any, tiny_wan_arguments: dict[str, int], tmp_path: Path
) -> None:
    pipe, arguments, out = tiny_wan_pipeline, tiny_wan_arguments, tmp_path / "p.calibatt"
    told = estimate(pipe, PROMPTS, 3, out=out, config=AUTO, **arguments)
    # Two inputs, whatever a surveyed step took beside an ordinary one on a busy machine.
    own = told.measured.warm_up_seconds + 2 * told.measured.input_seconds
    assert told.survey_seconds > own
    assert told.seconds > told.survey_seconds + 6 * told.measured.step_seconds
    assert not list(tmp_path.iterdir())
    calibrate(pipe, PROMPTS, 3, out=out, config=AUTO, **arguments)
    run = sum(file.stat().st_size for file in Path(f"{out}.calibration").iterdir())
    assert told.run_bytes == pytest.approx(run, rel=0.01)
    after = estimate(pipe, PROMPTS, 3, out=out, config=AUTO, **arguments)
    assert (after.survey_seconds, after.seconds) == (0, 0)
    plain = estimate(pipe, PROMPTS, 3, config=replace(AUTO, token_order="raster"), **arguments)
    assert plain.survey_seconds == 0


def made(about: object = None, chosen: str = "raster") -> OrderSurvey:
    density = {"raster": 0.5, "2x8xall": 0.3}
    return OrderSurvey(
        inputs=about,
        steps=(0,),
        density=density,
        error=density,
        held_out=True,
        sites={},
        chosen=chosen,
    )


def forbidden() -> OrderSurvey:
    raise AssertionError("there is nothing to survey")


class Waiting(Ranks):
    """Rank 1 of 2, at whose first wait something happens."""

    def __init__(self, happens: Any) -> None:
        super().__init__(1, 2)
        self._happens = happens

    def check(self) -> None:
        self._happens()


def test_one_rank_surveys_and_the_others_wait(tmp_path: Path) -> None:
    measured = made({"seed": 1}, "2x8xall")
    first = settled(tmp_path, Surveyor({"seed": 1}, lambda: measured), Ranks(0, 2), ())
    assert first == measured == stored(tmp_path)
    second = Surveyor({"seed": 1}, forbidden)
    assert settled(tmp_path, second, Ranks(1, 2), ()) == measured
    # A survey of another input is left from a killed run: rank 1 waits for rank 0's own.
    other = made({"seed": 2})
    ranks = Waiting(lambda: other.write(tmp_path))
    assert settled(tmp_path, Surveyor({"seed": 2}, forbidden), ranks, ()) == other
    # With inputs finished there is no other survey.
    assert settled(tmp_path, Surveyor({"seed": 3}, forbidden), Ranks(), ("00000",)) == other

    def lost() -> None:
        raise CalibrationError("rank 0 of 2 failed", expected="", got="", remedy="")

    with pytest.raises(CalibrationError, match="rank 0 of 2 failed"):
        settled(tmp_path, Surveyor({"seed": 4}, forbidden), Waiting(lost), ())


@pytest.mark.slow
def test_two_processes_make_the_plan_of_one(
    tiny_wan_folder: Path,
    tiny_wan_pipeline: Any,
    tiny_wan_arguments: dict[str, int],
    tmp_path: Path,
) -> None:
    out = tmp_path / "two.calibatt"
    work = {"prompts": PROMPTS, "seeds": 3, "config": AUTO, **tiny_wan_arguments}
    both = {"out": out, "meeting": tmp_path / "meeting", **work}
    for rank in [Calibration(tiny_wan_folder, rank=rank, **both) for rank in range(2)]:
        code, _, said = rank.result()
        assert code == 0, said
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums may differ in the last bit with their number
    try:
        alone = tmp_path / "one.calibatt"
        calibrate(tiny_wan_pipeline, PROMPTS, 3, out=alone, config=AUTO, **tiny_wan_arguments)
    finally:
        torch.set_num_threads(threads)
    assert stored(Path(f"{alone}.calibration")) == stored(Path(f"{out}.calibration"))
    assert Plan.load(out).digest == Plan.load(alone).digest
