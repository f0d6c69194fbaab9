"""Ways of running a model: each is sparse and right, or dense with its reason: docs/ways.md.

CALIBATT_UPDATE_GOLDEN=1 writes the table anew.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from way_models import GRID, OTHER, TIMES, Table, error, inputs, masked, model, plan_of

import calibatt_compiler

CPU = torch.device("cpu")
Prepared = Callable[[torch.nn.Module, dict[str, Any]], Any]


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


TABLE = Table("| way of running", list(WAYS))


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_a_way_is_served_as_the_table_says(way):
    found = outcome(way)
    if os.environ.get("CALIBATT_UPDATE_GOLDEN"):
        TABLE.write(way, found)
    assert TABLE.rows()[way] == found


def test_the_table_has_no_other_ways():
    assert list(TABLE.rows()) == list(WAYS)


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
