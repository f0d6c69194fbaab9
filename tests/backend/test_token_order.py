"""Tokens permuted once a forward pass: the same output, few permutations, and a reason if not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import tiny_models
import torch

import calibatt_compiler
from calibatt_compiler import backend
from calibatt_compiler.passes import pipeline
from calibatt_compiler.passes.token_order.permute import permute_tokens
from calibatt_compiler.plan import Plan
from calibatt_compiler.plan.order import TokenOrder

TIMESTEPS = (900.0, 480.0, 100.0)

# Tables beside the video: cosines and sines, or sines and cosines added to video and text.
ENTRIES = {
    "WanTransformer3DModel": 3,
    "LTXVideoTransformer3DModel": 3,
    "CogVideoXTransformer3DModel": 2,
}


def in_order(case: Any, order: str) -> Any:
    """The case with its masks read in a token order."""
    plan = case.plan
    joint = "CogVideoX" in type(case.model).__name__
    ordered = Plan.create(
        plan.sites,
        grid=plan.grid,
        sampler=plan.metadata.sampler,
        token_order=TokenOrder.parse(order),
        text_policy="dense_first" if joint else "none",
    )
    return replace(case, plan=ordered)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Graphs as they are after all passes; Inductor is left out."""
    seen: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, inputs: Any, settings: Any) -> Any:
        seen.append(gm)
        return gm.forward

    monkeypatch.setattr(backend, "_inductor", keep)
    return seen


@pytest.fixture
def around() -> Callable[[], Any]:
    """Leave the pass out, so that sites permute around themselves."""
    others = tuple(each for each in pipeline.PASSES if each is not permute_tokens)
    return lambda: mock.patch.object(pipeline, "PASSES", others)


def compiled_with(case: Any, **options: Any) -> Any:
    options = {"plan": case.plan, "lowering": "reference", **options}
    return torch.compile(case.model, backend="calibatt", fullgraph=True, options=options)


def permutations(gm: torch.fx.GraphModule) -> tuple[int, int]:
    """Permutations into the plan's order, and back."""
    inverse = [
        node.args[2].args[-1]
        for node in gm.graph.find_nodes(op="call_function", target=torch.index_select)
    ]
    return inverse.count(False), inverse.count(True)


def ordered_sites(gm: torch.fx.GraphModule) -> list[bool]:
    target = torch.ops.calibatt.attention.default
    return [node.args[-1] for node in gm.graph.find_nodes(op="call_function", target=target)]


def check(case: Any, compiled: Any) -> None:
    for timestep in (*TIMESTEPS, 2000.0):
        outside = case.plan.step_of(timestep) is None
        expected = case.dense(timestep) if outside else case.expanded(timestep)
        got = compiled(**case.arguments(timestep))[0]
        scale = expected.abs().max()
        assert (got - expected).abs().max() < 2e-5 * scale
        # The mask must matter, or the comparison shows nothing.
        assert outside or (case.dense(timestep) - expected).abs().max() > 1e-2 * scale


@pytest.mark.slow
@pytest.mark.parametrize("lowering", ["reference", "table"])
@pytest.mark.parametrize("order", ["3x1x1", "2x4x4", "2x4xall"])
def test_permuted_once_is_permuted_around_each_site(case, order, lowering, graphs, around):
    case = in_order(case, order)
    once = compiled_with(case, lowering=lowering)
    check(case, once)
    (gm,) = graphs
    assert permutations(gm) == (ENTRIES[type(case.model).__name__], 1)
    assert ordered_sites(gm) == [True, True]
    summary = calibatt_compiler.summary(once)
    said = f"token order {order}: permuted once a forward pass"
    assert summary.notes()[0] == said
    assert summary.to_dict()["token_order"] == [said]
    torch._dynamo.reset()
    with around():
        other = compiled_with(case, lowering=lowering)
        for timestep in TIMESTEPS:
            arguments = case.arguments(timestep)
            expected = other(**arguments)[0]
            assert (once(**arguments)[0] - expected).abs().max() < 2e-5 * expected.abs().max()
    assert permutations(graphs[1]) == (0, 0)
    assert ordered_sites(graphs[1]) == [False, False]


@pytest.mark.parametrize("order", ["raster", "1x7x9", "1x1x4"])
def test_the_models_own_order_is_not_permuted(wan, order, graphs):
    case = in_order(wan, order)
    compiled = compiled_with(case)
    check(case, compiled)
    assert permutations(graphs[0]) == (0, 0)
    assert not calibatt_compiler.summary(compiled).orders


def test_no_recompile_over_steps_and_one_sample_or_two(wan, graphs):
    case = in_order(wan, "2x4xall")
    compiled = compiled_with(case)
    compiled(**case.arguments(900.0))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for timestep in (900.0, 700.0, 500.0, 100.0, 2000.0):
            compiled(**case.arguments(timestep))
    single = {name: value[:1] for name, value in case.inputs.items()}
    arguments = case.arguments(900.0) | single | {"timestep": torch.tensor([900.0])}
    got = compiled(**arguments)[0]
    assert torch.allclose(got, case.expanded(900.0)[:1], atol=1e-4)
    assert [permutations(gm) for gm in graphs] == [(3, 1), (3, 1)]


@pytest.mark.slow
def test_another_size_is_not_permuted(wan, graphs):
    case = in_order(wan, "2x4x4")
    compiled = compiled_with(case)
    right = case.arguments(900.0)
    other = right | {"hidden_states": right["hidden_states"].transpose(-1, -2).contiguous()}
    longer = right | {"hidden_states": torch.randn(2, 4, 5, 14, 18)}
    for arguments in (other, longer, other):
        expected = case.model(**arguments)[0]
        assert torch.allclose(compiled(**arguments)[0], expected, atol=1e-4)
    assert all(permutations(gm) == (0, 0) for gm in graphs)
    assert not calibatt_compiler.summary(compiled).orders
    got = compiled(**right)[0]  # its sizes are symbolic by now
    assert torch.allclose(got, case.expanded(900.0), atol=1e-4)
    assert permutations(graphs[-1]) == (3, 1)


def test_samples_at_different_timesteps_run_dense(wan):
    case = in_order(wan, "2x4x4")
    compiled = compiled_with(case)
    arguments = case.arguments(900.0) | {"timestep": torch.tensor([900.0, 100.0])}
    assert torch.allclose(compiled(**arguments)[0], case.model(**arguments)[0], atol=1e-5)
    assert calibatt_compiler.summary(compiled).dense_calls.total() > 2


def test_sites_that_are_not_lowered_attend_permuted_tokens_densely(wan, graphs):
    """A plan of one site: self-attention of the other stays stock, amid permuted tokens."""
    case = in_order(wan, "2x4x4")
    plan = case.plan
    some = Plan.create(
        {case.sites[1]: plan.sites[case.sites[1]]},
        grid=plan.grid,
        sampler=plan.metadata.sampler,
        token_order=plan.token_order,
    )
    compiled = compiled_with(replace(case, plan=some))
    got = compiled(**case.arguments(900.0))[0]
    assert permutations(graphs[0]) == (3, 1)
    assert ordered_sites(graphs[0]) == [True]
    full = {name: torch.ones(3, 2, 6, 6, dtype=torch.bool) for name in case.sites[:1]}
    dense = Plan.from_masks(full, plan.grid, (900.0, 500.0, 100.0), (32, 32))
    both = {**dense.sites, **some.sites}
    whole = Plan.create(
        both, grid=plan.grid, sampler=plan.metadata.sampler, token_order=plan.token_order
    )
    expected = replace(case, plan=whole).expanded(900.0)
    assert (got - expected).abs().max() < 2e-5 * expected.abs().max()


def test_the_monitor_sees_tokens_in_the_plans_order(wan, around):
    case = in_order(wan, "2x4xall")
    drifts = []
    for patch in (None, around()):
        torch._dynamo.reset()
        compiled = compiled_with(case, monitor=1)
        if patch is None:
            compiled(**case.arguments(900.0))
        else:
            with patch:
                compiled(**case.arguments(900.0))
        rows = calibatt_compiler.summary(compiled).rows
        drifts.append([row.drift.kept for row in rows if row.status == "sparse"])
    assert drifts[0] == pytest.approx(drifts[1], rel=1e-5)
    assert all(0 < kept < 1 for kept in drifts[0])


def test_training_with_checkpoints_permutes_around_sites(wan):
    case = in_order(wan, "2x4x4")
    case.model.train()
    case.model.requires_grad_(True)
    case.model.enable_gradient_checkpointing()
    expected = case.expanded(900.0).detach()
    compiled = compiled_with(case)
    got = compiled(**case.arguments(900.0))[0].detach()
    assert torch.allclose(got, expected, atol=1e-4)
    (note,) = calibatt_compiler.summary(compiled).orders
    assert note.startswith("token order 2x4x4: permuted around each site, as ")
    assert note.endswith("hides sites in a subgraph")
    assert note in str(calibatt_compiler.summary(compiled)).replace("\n", " ")


def test_bfloat16_and_autocast(wan, graphs):
    case = in_order(wan, "2x4xall")
    expected = case.expanded(900.0)
    compiled = compiled_with(case)
    with torch.autocast("cpu", torch.bfloat16):
        got = compiled(**case.arguments(900.0))[0]
    assert (got - expected).norm() < 0.05 * expected.norm()
    case.model.to(torch.bfloat16)
    inputs = {name: value.to(torch.bfloat16) for name, value in case.inputs.items()}
    got = compiled(**case.arguments(900.0) | inputs)[0]
    assert got.dtype == torch.bfloat16
    assert (got - expected).norm() < 0.05 * expected.norm()
    assert [permutations(gm) for gm in graphs] == [(3, 1), (3, 1)]


@pytest.mark.slow
@pytest.mark.inductor
def test_through_inductor(case):
    case = in_order(case, "2x4xall")
    check(case, compiled_with(case, lowering="baked"))


def families() -> dict[str, tuple[Any, dict[str, Any], tuple[str, ...], int]]:
    """Builders and inputs of Wan's relatives: name, arguments, sites, values permuted at entry."""
    import diffusers

    sizes = tiny_models.WAN
    video = torch.randn(2, 4, 3, 14, 18)
    common = {"hidden_states": video, "encoder_hidden_states": torch.randn(2, 6, 16)}
    scalar = {"timestep": torch.full((2,), 900.0)}
    per_token = {"timestep": torch.full((2, 189), 900.0)}
    image = {"encoder_hidden_states_image": torch.randn(2, 5, 16)}
    blocks = ("blocks.0.attn1", "blocks.1.attn1")
    vace = (*blocks, "vace_blocks.0.attn1", "vace_blocks.1.attn1")

    return {
        "image to video": (
            lambda: tiny_models.wan(image_dim=16, added_kv_proj_dim=32),
            common | scalar | image,
            blocks,
            3,
        ),
        "a timestep a token": (tiny_models.wan, common | per_token, blocks, 4),
        "SkyReels": (
            lambda: diffusers.SkyReelsV2Transformer3DModel(**sizes),
            common | {"timestep": torch.full((2,), 900)},
            blocks,
            3,
        ),
        "VACE": (
            lambda: diffusers.WanVACETransformer3DModel(
                **sizes, vace_layers=[0, 1], vace_in_channels=4
            ),
            common | scalar | {"control_hidden_states": torch.randn_like(video)},
            vace,
            4,
        ),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["image to video", "a timestep a token", "SkyReels", "VACE"])
def test_relatives_of_wan(name, graphs, around, wan):
    make, arguments, sites, entries = families()[name]
    torch.manual_seed(0)
    model = make().eval().requires_grad_(False)
    for key, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1.5 / parameter[0].numel() ** 0.5)
        elif "norm" not in key:
            parameter.normal_(std=0.1)
    some = next(iter(wan.plan.sites.values()))
    plan = Plan.create(
        dict.fromkeys(sites, some),
        grid=wan.plan.grid,
        sampler=wan.plan.metadata.sampler,
        token_order=TokenOrder.parse("2x4xall"),
    )
    outputs = []
    for patch in (None, around()):
        torch._dynamo.reset()
        options = {"plan": plan, "lowering": "reference"}
        compiled = torch.compile(model, backend="calibatt", fullgraph=True, options=options)
        if patch is None:
            outputs.append(compiled(**arguments, return_dict=False)[0])
        else:
            with patch:
                outputs.append(compiled(**arguments, return_dict=False)[0])
    assert permutations(graphs[0]) == (entries, 1)
    assert permutations(graphs[1]) == (0, 0)
    once, each = outputs
    assert (once - each).abs().max() < 2e-5 * each.abs().max()
    dense = model(**arguments, return_dict=False)[0]
    assert (dense - each).abs().max() > 1e-2 * each.abs().max()
