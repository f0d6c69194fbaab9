"""As many tokens, laid out otherwise: dense and counted, or an error; whoever calls the model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import calibatt_compiler
from calibatt_compiler import CalibrationConfig, Plan
from calibatt_compiler.errors import CalibrationError, PlanMismatchError

TIMESTEPS = (900.0, 500.0, 100.0)
GRID, TURNED = (3, 5, 7), (3, 7, 5)
OLD_PLAN = Path(__file__).parent / "plans" / "before_fixed_by.calibatt"
UNLIKE = "dense: tokens that are not laid out as the plan's"


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(4, 96)

    def forward(self, x):
        q, k, v = (3 * t.unflatten(-1, (2, 16)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return attended.transpose(1, 2).flatten(2)


class Latents(torch.nn.Module):
    """One attention layer over latents (batch, channels, frames, height, width), or tokens."""

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.attn = Attention()
        self.out = torch.nn.Linear(32, 4)
        if config is not None:
            self.config = config

    def forward(self, hidden_states, timestep, img_ids=None, num_frames=None, height=None):
        x = hidden_states
        if x.dim() == 5:
            x = x.flatten(2).transpose(1, 2)
        if img_ids is not None:
            x = x + torch.sin(img_ids.float().sum(-1, keepdim=True))
        if num_frames is not None:
            x = x * (num_frames + 2 * height)
        return self.out(self.attn(x)) * (1 + timestep.view(-1, 1, 1) / 1000)


def mask(tokens: int, sites=("attn",), heads: int = 2) -> dict[str, torch.Tensor]:
    blocks = -(-tokens // 32)
    eye = torch.eye(blocks, dtype=torch.bool).expand(3, heads, blocks, blocks)
    return dict.fromkeys(sites, eye)


def observe(model, *calls, **settings) -> Plan:
    """Calibrate on calls, each a mapping of arguments without the timestep."""
    settings = {"block": (32, 32), "num_steps": 3, "A": 0.5, "C": 0.5, "k": 1.0, **settings}
    with calibatt_compiler.calibration(model, CalibrationConfig(**settings)) as run:
        for arguments in calls:
            with run.input():
                for timestep in TIMESTEPS:
                    model(**arguments, timestep=torch.tensor([timestep]))
        return run.plan()


def served(function, plan, *calls, on_mismatch="dense", dynamic=None) -> list[str]:
    """Say of each call whether it was `sparse` or `dense`, by its output; or `error`."""
    torch._dynamo.reset()
    options = {"plan": plan, "lowering": "reference", "on_mismatch": on_mismatch}
    compiled = torch.compile(function, backend="calibatt", options=options, dynamic=dynamic)
    found = []
    for call in calls:
        arguments = {**call, "timestep": torch.tensor([900.0])}
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            dense = first(function(**arguments))
        try:
            with torch.no_grad():
                got = first(compiled(**arguments))
        except PlanMismatchError:
            found.append("error")
        else:
            found.append("dense" if torch.allclose(got, dense, atol=1e-5) else "sparse")
    return found


def first(output):
    return output[0] if isinstance(output, tuple) else output


def latents(*grid: int) -> dict[str, torch.Tensor]:
    return {"hidden_states": torch.randn(1, 4, *grid, generator=torch.Generator().manual_seed(1))}


def packed(*grid: int) -> dict[str, torch.Tensor]:
    """Tokens and where they stand, as Flux has them."""
    x = torch.randn(1, math.prod(grid), 4, generator=torch.Generator().manual_seed(1))
    axes = torch.meshgrid(*(torch.arange(size) for size in grid), indexing="ij")
    return {"hidden_states": x, "img_ids": torch.stack(axes, -1).flatten(0, 2)}


def wan_call(case, *grid: int) -> dict[str, Any]:
    video = torch.randn(1, 4, grid[0], 2 * grid[1], 2 * grid[2])
    text = case.inputs["encoder_hidden_states"][:1]
    return {"hidden_states": video, "encoder_hidden_states": text, "return_dict": False}


class Around(torch.nn.Module):
    """A module that hands its arguments on under other names."""

    def __init__(self, inner: torch.nn.Module, *, turns: bool = False) -> None:
        super().__init__()
        self.inner = inner
        self.turns = turns

    def forward(this, video, timestep, text):  # noqa: N805 - people do
        video = video.transpose(-1, -2) if this.turns else video
        return this.inner(
            hidden_states=video,
            timestep=timestep,
            encoder_hidden_states=text,
            return_dict=False,
        )


def renamed(call: dict[str, Any]) -> dict[str, Any]:
    return {"video": call["hidden_states"], "text": call["encoder_hidden_states"]}


@pytest.mark.slow
def test_a_subclass_is_of_the_family_of_its_base(wan):
    base = type(wan.model)
    wan.model.__class__ = type("Mine", (base,), {})
    calls = [wan_call(wan, 3, 7, 9), wan_call(wan, 3, 9, 7)]
    assert served(wan.model, wan.plan, *calls) == ["sparse", "dense"]
    assert served(wan.model, wan.plan, *calls, on_mismatch="error") == ["sparse", "error"]


@pytest.mark.slow
def test_a_calibrated_subclass_is_no_other_model(wan):
    calls = [wan_call(wan, 3, 7, 9), wan_call(wan, 3, 9, 7)]
    plan = observe(wan.model, calls[0])
    wan.model.__class__ = type("Mine", (type(wan.model),), {})
    assert served(wan.model, plan, *calls) == ["sparse", "dense"]


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
def test_functions_around_a_model_show_its_own_latents(wan, dynamic):
    model = wan.model
    calls = [wan_call(wan, 3, 7, 9), wan_call(wan, 3, 9, 7)]

    def passing(**arguments):
        return model(**arguments)

    def positional(video, timestep, text):
        return model(video, timestep, text, return_dict=False)

    observed = observe(model, calls[0])
    for plan in (wan.plan, observed) if dynamic is None else (wan.plan,):
        assert served(passing, plan, *calls, dynamic=dynamic) == ["sparse", "dense"]
        assert calibatt_compiler.summary(model).sparse_calls >= len(wan.sites)
    for plan in (wan.plan, observed) if dynamic is None else (observed,):
        named = served(positional, plan, *map(renamed, calls), dynamic=dynamic)
        assert named == ["sparse", "dense"]


@pytest.mark.slow
def test_modules_around_a_model_show_what_reaches_it(wan):
    sites = tuple(f"inner.{name}" for name in wan.sites)
    plan = Plan.from_masks(mask(189, sites), (3, 7, 9), TIMESTEPS, (32, 32))
    calls = [renamed(wan_call(wan, 3, 7, 9)), renamed(wan_call(wan, 3, 9, 7))]
    assert served(Around(wan.model), plan, *calls) == ["sparse", "dense"]
    assert served(Around(wan.model, turns=True), plan, *calls) == ["dense", "sparse"]
    own = observe(Around(wan.model), {**calls[0]})
    assert own.grid == (3, 7, 9)
    assert served(Around(wan.model), own, *calls) == ["sparse", "dense"]


def test_the_plans_own_model_under_other_names_is_served(wan):
    call = wan_call(wan, 3, 7, 9)
    plan = observe(wan.model, call)
    around = Around(wan.model)
    assert served(around, plan, renamed(call)) == ["sparse"]
    assert served(around, plan, renamed(call), on_mismatch="error") == ["sparse"]


def test_a_configuration_tells_the_grid_of_an_unknown_family():
    model = Latents({"in_channels": 4, "patch_size": 1})
    plan = observe(model, latents(*GRID))
    assert plan.grid == GRID
    assert plan.metadata.fixed_by.grid == "call"
    calls = [latents(*GRID), latents(*TURNED), latents(5, 3, 7)]
    assert served(model, plan, *calls) == ["sparse", "dense", "dense"]


@pytest.mark.parametrize("dynamic", [None, True])
def test_shapes_are_compared_where_the_grid_is_not_known(dynamic):
    model = Latents()
    plan = observe(model, latents(*GRID), latents(*GRID))
    assert plan.grid == (1, 1, 105)
    assert plan.metadata.fixed_by.shapes == {"hidden_states": (None, 4, *GRID)}
    calls = [latents(*GRID), latents(*TURNED), latents(*GRID), latents(5, 7, 3)]
    assert served(model, plan, *calls, dynamic=dynamic) == ["sparse", "dense", "sparse", "dense"]
    calls = [latents(*TURNED), latents(*GRID)]
    errors = served(model, plan, *calls, on_mismatch="error", dynamic=dynamic)
    assert errors == ["error", "sparse"]


def test_numbers_are_compared_where_the_grid_is_not_known():
    model = Latents()
    tokens = {"hidden_states": packed(*GRID)["hidden_states"]}
    plan = observe(model, {**tokens, "num_frames": 3, "height": 5})
    assert plan.metadata.fixed_by.integers == {"num_frames": 3, "height": 5}
    calls = [
        {**tokens, "num_frames": 3, "height": 5},
        {**tokens, "num_frames": 5, "height": 3},
        tokens,
    ]
    assert served(model, plan, *calls) == ["sparse", "dense", "dense"]


def test_inputs_of_two_layouts_make_no_plan():
    with pytest.raises(CalibrationError, match="another size"):
        observe(Latents(), latents(*GRID), latents(*TURNED))
    with pytest.raises(CalibrationError, match="another size"):
        observe(Latents(), packed(*GRID), packed(*TURNED))


def test_coordinates_tell_the_grid_and_are_compared_at_each_call():
    model = Latents()
    plan = observe(model, packed(*GRID))
    assert plan.grid == GRID
    right, turned = packed(*GRID), packed(*TURNED)
    shuffled = {**right, "img_ids": right["img_ids"][torch.randperm(105)]}
    scaled = {**right, "img_ids": right["img_ids"] * torch.tensor([2, 3, 1]) + 4}
    two = {**right, "img_ids": torch.stack([right["img_ids"]] * 2)}
    calls = [right, turned, scaled, shuffled, right, two]
    expected = ["sparse", "dense", "sparse", "dense", "sparse", "sparse"]
    assert served(model, plan, *calls) == expected
    errors = ["sparse", "error", "sparse", "error", "sparse", "sparse"]
    assert served(model, plan, *calls, on_mismatch="error") == errors
    without = {"hidden_states": right["hidden_states"]}
    assert served(model, plan, without) == ["dense"]


def test_coordinates_that_are_no_grid_are_compared_by_their_digest():
    model = Latents()
    order = torch.randperm(105)
    right = packed(*GRID)
    shuffled = {**right, "img_ids": right["img_ids"][order]}
    plan = observe(model, shuffled)
    assert plan.grid == (1, 1, 105)
    assert served(model, plan, shuffled, right) == ["sparse", "dense"]


def test_what_refused_a_call_is_counted():
    model = Latents()
    plan = observe(model, packed(*GRID))
    compiled = torch.compile(model, backend="calibatt", options={"plan": plan})
    with torch.no_grad():
        for call in (packed(*GRID), packed(*TURNED)):
            compiled(**call, timestep=torch.tensor([900.0]))
    summary = calibatt_compiler.summary(compiled)
    assert summary.sparse_calls == 1
    assert summary.dense_calls[UNLIKE] == 1
    assert any(UNLIKE in note for note in summary.notes())


def test_coordinates_of_another_size_do_not_recompile():
    model = Latents()
    plan = observe(model, packed(*GRID))
    compiled = torch.compile(model, backend="calibatt", options={"plan": plan})
    with torch.no_grad():
        compiled(**packed(*GRID), timestep=torch.tensor([900.0]))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for grid in (TURNED, (5, 3, 7), GRID):
                compiled(**packed(*grid), timestep=torch.tensor([900.0]))


def test_unknown_now_and_known_in_the_plan_is_a_mismatch():
    model = Latents()
    site = next(iter(observe(model, latents(*GRID)).sites))
    plan = Plan.from_masks(mask(105, (site,)), GRID, TIMESTEPS, (32, 32))
    assert served(model, plan, latents(*GRID)) == ["dense"]
    assert served(model, plan, latents(*GRID), on_mismatch="error") == ["error"]
    length = Plan.from_masks(mask(105, (site,)), (1, 1, 105), TIMESTEPS, (32, 32))
    assert served(model, length, latents(*GRID), latents(*TURNED)) == ["sparse", "sparse"]


def test_tiles_need_a_grid():
    with pytest.raises(CalibrationError, match="grid=") as caught:
        observe(Latents(), latents(*GRID), token_order="1x4x4")
    assert "how many tokens" in caught.value.got
    plan = observe(Latents(), latents(*GRID), token_order="1x4x4", grid=GRID)
    assert plan.metadata.fixed_by.grid == "settings"
    assert observe(Latents(), packed(*GRID), token_order="1x4x4").grid == GRID


def test_a_given_grid_is_compared_by_the_shapes():
    model = Latents()
    plan = observe(model, latents(*GRID), grid=GRID)
    assert served(model, plan, latents(*GRID), latents(*TURNED)) == ["sparse", "dense"]


def ltx_call(case, grid, frame_rate: float | None) -> dict[str, Any]:
    call = {name: x[:1] for name, x in case.inputs.items() if isinstance(x, torch.Tensor)}
    if frame_rate is None:
        return {**call, **dict(zip(("num_frames", "height", "width"), grid, strict=True))}
    coords = torch.stack(
        torch.meshgrid(*(torch.arange(size) for size in grid), indexing="ij")
    ).flatten(1)
    scaled = coords * torch.tensor([[8], [32], [32]])
    scaled[0] = (scaled[0] - 7).clamp(min=0)
    return {**call, "video_coords": scaled[None] / torch.tensor([[frame_rate], [1.0], [1.0]])}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["ltx"], indirect=True)
def test_ltx_by_coordinates_or_by_sizes(case):
    for rate, served_rates in ((25.0, (25.0, 30.0, None)), (None, (None, 25.0))):
        plan = observe(case.model, {**ltx_call(case, GRID, rate), "return_dict": False})
        assert plan.grid == GRID
        for served_rate in served_rates:
            calls = [
                {**ltx_call(case, grid, served_rate), "return_dict": False}
                for grid in (GRID, TURNED, (5, 3, 7))
            ]
            assert served(case.model, plan, *calls) == ["sparse", "dense", "dense"]
        errors = served(case.model, plan, *calls, on_mismatch="error")
        assert errors == ["sparse", "error", "error"]


@pytest.mark.slow
@pytest.mark.inductor
def test_coordinates_are_compared_through_inductor():
    model = Latents()
    plan = observe(model, packed(*GRID), inductor=True)
    calls = [packed(*GRID), packed(*TURNED)]
    assert served(model, plan, *calls) == ["sparse", "dense"]
    assert served(model, plan, *calls, on_mismatch="error") == ["sparse", "error"]


@pytest.mark.slow
def test_a_plan_of_a_version_before_serves_as_it_did(wan):
    plan = Plan.load(OLD_PLAN)
    assert plan.digest == "133caa859812f32cc0b16d3856e90c328a65d32981aa056283ce4bc9d3927331"
    assert plan.metadata.fixed_by is None
    calls = [wan_call(wan, 3, 7, 9), wan_call(wan, 3, 9, 7)]
    assert served(wan.model, plan, *calls) == ["sparse", "dense"]


def test_a_record_is_read_as_it_was_written(tmp_path):
    plan = observe(Latents(), packed(*GRID))
    plan.save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan")
    assert loaded.metadata.fixed_by == plan.metadata.fixed_by
    assert loaded.metadata.fixed_by.coordinates.keys() == {"img_ids"}
    assert loaded.digest == plan.digest
    assert loaded.metadata.requires == ("fixed_by",)
