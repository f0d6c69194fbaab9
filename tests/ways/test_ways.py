"""Ways of running a model: each is sparse and right, or dense with its reason: docs/ways.md.

CALIBATT_UPDATE_GOLDEN=1 writes the table anew.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiny_models
import torch
from torch.nn.functional import scaled_dot_product_attention as STOCK

import calibatt_compiler
from calibatt_compiler import Plan

PAGE = Path(__file__).parents[2] / "docs" / "ways.md"
GRID, OTHER, TIMES = (3, 7, 9), (3, 9, 7), (900.0, 500.0, 100.0)
CPU = torch.device("cpu")
Prepared = Callable[[torch.nn.Module, dict[str, Any]], Any]


def model(layers: int = 2) -> Any:
    made = tiny_models.wan(num_layers=layers).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, p in made.named_parameters():
        if p.dim() > 1:
            p.copy_(torch.randn(p.shape, generator=generator) * (1.5 / p[0].numel() ** 0.5))
        elif "norm" not in name:
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return made


def plan_of(layers: int = 2, seed: int = 7) -> Plan:
    tokens = math.prod(GRID)
    blocks = -(-tokens // 32)
    generator = torch.Generator().manual_seed(seed)
    masks = {
        f"blocks.{i}.attn1": (torch.rand(3, 2, blocks, blocks, generator=generator) < 0.3)
        | torch.eye(blocks, dtype=torch.bool)
        for i in range(layers)
    }
    return Plan.from_masks(masks, GRID, TIMES, (32, 32))


def inputs(grid: tuple[int, int, int], timestep: float) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(int(timestep))
    frames, height, width = grid
    return {
        "hidden_states": torch.randn(1, 4, frames, 2 * height, 2 * width, generator=generator),
        "encoder_hidden_states": torch.randn(1, 6, 16, generator=generator),
        "timestep": torch.tensor([timestep]),
        "return_dict": False,
    }


def masked(eager: torch.nn.Module, plan: Plan, given: dict[str, Any]) -> torch.Tensor:
    """The eager model under the plan's masks expanded to tokens."""
    step = plan.step_of(float(given["timestep"][0]))
    assert step is not None
    names = iter(plan.sites)

    def attend(query: Any, key: Any, value: Any, **options: Any) -> torch.Tensor:
        if query.shape[2] != key.shape[2]:
            return STOCK(query, key, value, **options)
        options["attn_mask"] = plan.sites[next(names)].at(step).token_mask()[None]
        return STOCK(query, key, value, **options)

    with mock.patch("torch.nn.functional.scaled_dot_product_attention", attend):
        out = eager(**given)[0]
    assert next(names, None) is None, "the oracle missed a site"
    return out


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def whole(m: Any, options: dict[str, Any], **how: Any) -> Any:
    return torch.compile(m, backend="calibatt", options=options, **how)


def blockwise(m: Any) -> None:
    m.enable_group_offload(CPU, CPU, offload_type="block_level", num_blocks_per_group=1)


def leafwise(m: Any) -> None:
    m.enable_group_offload(CPU, CPU, offload_type="leaf_level")


def model_offload(m: Any) -> None:
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(m, "cpu")


def sequential_offload(m: Any) -> None:
    from accelerate import cpu_offload

    cpu_offload(m, "cpu")


def casting(m: Any) -> None:
    m.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)


def first(prepare: Callable[[Any], None]) -> Prepared:
    def way(m: Any, options: dict[str, Any]) -> Any:
        prepare(m)
        return whole(m, options)

    return way


def after(prepare: Callable[[Any], None]) -> Prepared:
    def way(m: Any, options: dict[str, Any]) -> Any:
        compiled = whole(m, options)
        prepare(m)
        return compiled

    return way


def in_place(m: Any, options: dict[str, Any]) -> Any:
    m.compile(backend="calibatt", options=options)
    return m


def leafwise_in_place(m: Any, options: dict[str, Any]) -> Any:
    leafwise(m)
    return in_place(m, options)


def repeated_blocks(m: Any, options: dict[str, Any], **how: Any) -> Any:
    m.compile_repeated_blocks(backend="calibatt", options=options, **how)
    return m


def offloaded_blocks(m: Any, options: dict[str, Any]) -> Any:
    blockwise(m)
    return repeated_blocks(m, options)


def regions(m: Any, options: dict[str, Any]) -> Any:
    from accelerate.utils import compile_regions

    return compile_regions(m, backend="calibatt", options=options)


def each_block(m: Any, options: dict[str, Any]) -> Any:
    for index, block in enumerate(m.blocks):
        m.blocks[index] = torch.compile(block, backend="calibatt", options=options)
    return m


def breaks(m: Any) -> None:
    @torch._dynamo.disable
    def look(module: Any, *_: Any) -> None:
        return None

    for block in m.blocks:
        block.ffn.register_forward_hook(look)


def cached(m: Any) -> None:
    from diffusers import FirstBlockCacheConfig

    m.enable_cache(FirstBlockCacheConfig(threshold=0.0))


def own_wrapper(m: Any, options: dict[str, Any]) -> Any:
    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = m

        def forward(self, **given: Any) -> Any:
            return self.model(**given)

    return whole(Wrapper(), options)


def function(m: Any, options: dict[str, Any]) -> Any:
    def call(**given: Any) -> Any:
        return m(**given)

    return whole(call, options)


def flex(m: Any, options: dict[str, Any]) -> Any:
    m.set_attention_backend("flex")
    return whole(m, options)


WAYS: dict[str, Prepared] = {
    "`torch.compile(transformer)`": whole,
    "`transformer.compile()`": in_place,
    "`fullgraph=True`": lambda m, o: whole(m, o, fullgraph=True),
    "`dynamic=True`": lambda m, o: whole(m, o, dynamic=True),
    "a function around the model": function,
    "a bound method, `transformer.forward`": lambda m, o: whole(m.forward, o),
    "a module of one's own around the model": own_wrapper,
    "`enable_model_cpu_offload`, then compile": first(model_offload),
    "compile, then `enable_model_cpu_offload`": after(model_offload),
    "`enable_sequential_cpu_offload`": first(sequential_offload),
    "`enable_group_offload`, blocks, then compile": first(blockwise),
    "compile, then `enable_group_offload`, blocks": after(blockwise),
    "`enable_group_offload`, leaves, then compile": first(leafwise),
    "compile, then `enable_group_offload`, leaves": after(leafwise),
    "`enable_group_offload`, leaves, then `transformer.compile()`": leafwise_in_place,
    "`enable_layerwise_casting`": first(casting),
    "`compile_repeated_blocks`": repeated_blocks,
    "`compile_repeated_blocks(fullgraph=True)`": lambda m, o: repeated_blocks(m, o, fullgraph=True),
    "`enable_group_offload`, then `compile_repeated_blocks`": offloaded_blocks,
    "`accelerate.utils.compile_regions`": regions,
    "each block by `torch.compile`": each_block,
    "graph breaks in each block": first(breaks),
    "`enable_cache(FirstBlockCacheConfig())`": first(cached),
    '`set_attention_backend("flex")`': flex,
}


@contextlib.contextmanager
def context(m: Any) -> Iterator[None]:
    with m.cache_context("cond") if m.is_cache_enabled else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True)
def _native_again(request: pytest.FixtureRequest, monkeypatch: Any) -> Iterator[None]:
    """Leave Inductor out unless marked; reset the attention backend, which is of the process."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    torch._dynamo.reset()
    if "inductor" not in request.keywords:
        monkeypatch.setattr(
            "calibatt_compiler.backend._inductor", lambda gm, example, settings: gm.forward
        )
    active = registry._active_backend
    yield
    registry._active_backend = active


def outcome(way: str, **options: Any) -> str:
    """Run a way over the plan's size and another of as many tokens; say what served the first."""
    plan, eager = plan_of(), model()
    expected = {
        (grid, t): (
            eager(**inputs(grid, t))[0],
            masked(eager, plan, inputs(grid, t)) if grid == GRID else None,
        )
        for grid in (GRID, OTHER)
        for t in TIMES[:2]
    }
    m = model()
    compiled = WAYS[way](m, {"plan": plan, **options})
    kinds = []
    # float16 storage rounds weights.
    close = 2e-3 if "casting" in way else 1e-5
    for (grid, t), (dense, sparse) in expected.items():
        with context(m):
            got = compiled(**inputs(grid, t))[0]
        if sparse is not None and error(got, sparse) < close:
            kinds.append("sparse")
        else:
            assert error(got, dense) < close, f"{grid} at {t} is neither dense nor masked"
            kinds.append("dense")
    assert kinds[2:] == ["dense", "dense"], "a video of another shape was served by the plan"
    assert kinds[0] == kinds[1]
    found = calibatt_compiler.summary(compiled)
    if kinds[0] == "sparse":
        assert found.sparse_calls == 4
        assert {row.name for row in found.rows if row.sparse_calls} == set(plan.sites)
        return "sparse"
    assert not found.sparse_calls
    planned = {row.status for row in found.rows if row.name in plan.sites}
    assert planned, "nothing is said of the plan's sites"
    return "dense: " + ", ".join(sorted(planned))


def page(rows: dict[str, str]) -> str:
    lines = [f"| {way} | {found} |" for way, found in rows.items()]
    head = PAGE.read_text("utf-8").partition("| way")[0]
    return head + "\n".join(["| way of running | the plan's attention |", "|---|---|", *lines, ""])


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_a_way_is_served_as_the_table_says(way):
    found = outcome(way)
    if os.environ.get("CALIBATT_UPDATE_GOLDEN"):
        rows = dict(
            line.strip("| \n").split(" | ")
            for line in PAGE.read_text("utf-8").splitlines()
            if line.startswith(("| `", "| a ", "| c", "| g", "| e"))
        )
        known = {**rows, way: found}
        PAGE.write_text(page({w: known[w] for w in WAYS if w in known}), "utf-8")
    assert f"| {way} | {found} |\n" in PAGE.read_text("utf-8")


def test_the_table_has_no_other_ways():
    lines = PAGE.read_text("utf-8").splitlines()
    ways = {line[2:].partition(" | ")[0] for line in lines if line.startswith("| ")}
    assert ways == {*WAYS, "way of running"}


@pytest.mark.inductor
@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    "way",
    [
        "`enable_model_cpu_offload`, then compile",
        "`enable_group_offload`, leaves, then compile",
        "`compile_repeated_blocks`",
    ],
)
def test_parts_of_a_model_are_served_through_inductor(way):
    assert outcome(way) == "sparse"


@torch.no_grad()
@pytest.mark.parametrize("way", ["`compile_repeated_blocks`", "`torch.compile(transformer)`"])
def test_mismatch_as_an_error_never_refuses_the_plans_own_size(way):
    plan, m = plan_of(), model()
    compiled = WAYS[way](m, {"plan": plan, "on_mismatch": "error"})
    compiled(**inputs(GRID, 900.0))
    assert calibatt_compiler.summary(compiled).sparse_calls == 2
    with pytest.raises(calibatt_compiler.errors.PlanMismatchError):
        compiled(**inputs(OTHER, 900.0))


@torch.no_grad()
def test_blocks_share_one_graph():
    m = repeated_blocks(model(4), {"plan": plan_of(4)})
    m(**inputs(GRID, 900.0))
    found = calibatt_compiler.summary(m)
    assert found.graphs == 1
    assert found.sparse_calls == 4


@torch.no_grad()
def test_one_timestep_tensor_written_anew_is_read_anew():
    """Also where nothing counts writes, as in inference mode."""
    plan, eager = plan_of(), model()
    m = repeated_blocks(model(), {"plan": plan})
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            given = inputs(GRID, 900.0)
            given["timestep"] = given["timestep"].clone()
            for t in TIMES:
                given["timestep"].fill_(t)
                expected = masked(eager, plan, given)
                assert error(m(**given)[0], expected) < 1e-5


@torch.no_grad()
def test_more_plans_than_dynamos_default_limit_are_all_served():
    eager = model(1)
    for seed in range(10):
        plan = plan_of(1, seed)
        compiled = whole(model(1), {"plan": plan})
        given = inputs(GRID, 500.0)
        assert error(compiled(**given)[0], masked(eager, plan, given)) < 1e-5
        assert calibatt_compiler.summary(compiled).sparse_calls == 1


def test_checkpointed_blocks_that_were_compiled_one_by_one_run_dense():
    m = model().requires_grad_(True).train()
    m.enable_gradient_checkpointing()
    repeated_blocks(m, {"plan": plan_of()})
    m(**inputs(GRID, 900.0))[0].sum().backward()
    found = calibatt_compiler.summary(m)
    assert not found.sparse_calls
    assert any("checkpointing" in reason for reason in found.dense_calls)


@torch.no_grad()
def test_a_model_without_a_planned_call_is_warned_of_once(caplog):
    flex(m := model(), {"plan": plan_of()})(**inputs(GRID, 900.0))
    assert m is not None
    said = [record.message for record in caplog.records if "none of the plan's" in record.message]
    assert len(said) == 1
    assert "flex_attention" in said[0]


def test_calibration_refuses_a_cache_by_name():
    m = model()
    cached(m)
    with (
        pytest.raises(calibatt_compiler.errors.CalibrationError, match="FirstBlockCacheConfig"),
        calibatt_compiler.calibration(m) as run,
        run.input(),
    ):
        m(**inputs(GRID, 900.0))


@torch.no_grad()
@pytest.mark.parametrize("prepare", [model_offload, blockwise, leafwise])
def test_a_plan_calibrated_under_offloading_names_the_same_sites(prepare):
    m = model()
    prepare(m)
    config = calibatt_compiler.CalibrationConfig(block=(32, 32), progress=False, form="masks")
    with calibatt_compiler.calibration(m, config=config) as run:
        with run.input():
            for t in TIMES:
                m(**inputs(GRID, t))
        plan = run.plan()
    assert set(plan.sites) == {"blocks.0.attn1", "blocks.1.attn1"}
    assert plan.grid == GRID
    assert plan.timesteps == TIMES
