"""A plan made again: whoever compiles again is served by it, and nobody else."""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import calibatt_compiler
from calibatt_compiler import Plan
from calibatt_compiler.binding.pinned import PinnedOptions
from calibatt_compiler.errors import PlanFormatError
from calibatt_compiler.options import CompileOptions


def another(plan: Plan) -> Plan:
    """A plan of the same sites and sizes with other blocks."""
    masks = {}
    for name in plan.sites:
        found = torch.stack([plan.block_mask(name, step) for step in range(plan.steps)])
        masks[name] = found.flip(-1)
    block = next(iter(plan.sites.values())).size
    timesteps = plan.metadata.sampler.timesteps
    return Plan.from_masks(masks, plan.grid, timesteps, (block.block_m, block.block_n))


def replace(path: Path, plan: Plan) -> None:
    """Write a plan with the very times of the file before it."""
    before = path.stat() if path.exists() else None
    plan.save(path)
    if before is not None:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def compiled(wan: Any, how: str, options: dict[str, Any]) -> Any:
    if how == "in place":
        wan.model.compile(backend="calibatt", options=options)
        return wan.model
    return torch.compile(wan.model, backend="calibatt", options=options)


@pytest.fixture
def plans(wan):
    """What each plan computes, taken before anything is compiled."""
    first, second = wan.plan, another(wan.plan)
    assert first != second
    wanted = [dataclasses.replace(wan, plan=plan).expanded(500.0) for plan in (first, second)]
    assert not torch.allclose(*wanted, atol=1e-3)
    return first, second, wanted


@pytest.mark.slow
@pytest.mark.parametrize("how", ["torch.compile", "in place"])
@pytest.mark.parametrize("given", ["str", "path", "plan"])
@pytest.mark.parametrize("same_dict", [False, True])
def test_whoever_compiles_again_gets_it(wan, plans, tmp_path, how, given, same_dict):
    *both, wanted = plans
    path = tmp_path / "wan.calibatt"
    kept: dict[str, Any] = {"lowering": "reference"}
    for plan, output in zip(both, wanted, strict=True):
        replace(path, plan)
        options = kept if same_dict else dict(kept)
        options["plan"] = {"str": str(path), "path": path, "plan": plan}[given]
        model = compiled(wan, how, options)
        assert torch.allclose(model(**wan.arguments(500.0))[0], output, atol=1e-4)
        found = calibatt_compiler.summary(model)
        assert found.plan_digest == plan.digest
        assert found.changed is None
        assert (found.graphs, found.sparse_calls) == (1, len(plan.sites))
        assert type(options) is dict, "the user's own stay as they are"


@pytest.mark.slow
def test_who_does_not_keeps_the_plan_and_is_told(wan, plans, tmp_path):
    first, second, wanted = plans
    path = tmp_path / "wan.calibatt"
    first.save(path)
    options = {"plan": str(path), "lowering": "reference"}
    model = torch.compile(wan.model, backend="calibatt", options=options, dynamic=False)
    arguments = wan.arguments(500.0)
    assert torch.allclose(model(**arguments)[0], wanted[0], atol=1e-4)
    replace(path, second)
    again = torch.compile(wan.model, backend="calibatt", options=options, dynamic=False)
    twice = {
        name: torch.cat([x, x]) if isinstance(x, torch.Tensor) else x
        for name, x in arguments.items()
    }
    for _ in range(2):
        assert torch.allclose(model(**arguments)[0], wanted[0], atol=1e-4)
        assert torch.allclose(again(**arguments)[0], wanted[1], atol=1e-4)
        # A graph that is compiled later, of another batch, has the same plan.
        assert torch.allclose(model(**twice)[0][:2], wanted[0], atol=1e-4)
        assert torch.allclose(again(**twice)[0][:2], wanted[1], atol=1e-4)
        found = calibatt_compiler.summary(model)
        assert (found.plan_digest, found.graphs) == (first.digest, 2)
        assert f"{path} holds another plan since, {second.digest[:12]}" in found.notes()[0]
        assert "another plan since" in " ".join(str(found).split())
        assert calibatt_compiler.summary(again).changed is None
    path.unlink()
    assert "holds no plan any more" in str(calibatt_compiler.summary(again).changed)


def test_a_call_served_by_another_ones_graph_keeps_its_plan(wan, plans, tmp_path):
    first, second, wanted = plans
    path = tmp_path / "wan.calibatt"
    first.save(path)
    options = {"plan": str(path), "lowering": "reference"}
    models = [torch.compile(wan.model, backend="calibatt", options=dict(options)) for _ in range(2)]
    torch._dynamo.utils.counters.clear()
    for model in models:
        assert torch.allclose(model(**wan.arguments(500.0))[0], wanted[0], atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    replace(path, second)
    for model in models:
        assert torch.allclose(model(**wan.arguments(500.0))[0], wanted[0], atol=1e-4)
        assert "another plan" in str(calibatt_compiler.summary(model).changed)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_an_error_is_not_served_again(wan, plans, tmp_path):
    first, _, wanted = plans
    path = tmp_path / "wan.calibatt"
    options = {"plan": str(path), "lowering": "reference"}
    with pytest.raises(PlanFormatError, match="no plan file"):
        torch.compile(wan.model, backend="calibatt", options=options)(**wan.arguments(500.0))
    first.save(path)
    model = torch.compile(wan.model, backend="calibatt", options=options)
    assert torch.allclose(model(**wan.arguments(500.0))[0], wanted[0], atol=1e-4)


def test_options_out_of_sight_equal_no_others(wan, tmp_path):
    path = tmp_path / "wan.calibatt"
    wan.plan.save(path)
    given = {"plan": str(path)}
    pinned = PinnedOptions(given, CompileOptions.parse(given))
    assert pinned != given
    assert pinned == PinnedOptions(given, CompileOptions.parse({"plan": wan.plan}))
    table = {**given, "lowering": "table"}
    assert pinned != PinnedOptions(table, CompileOptions.parse(table))
    assert copy.deepcopy(pinned) is pinned
    assert pickle.loads(pickle.dumps(pinned)) == given
