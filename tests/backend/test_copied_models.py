"""Plans and compiled models are copied, pickled and exported: by content, or it is known how."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import calibatt_compiler
from calibatt_compiler.errors import PlanFormatError
from calibatt_compiler.plan import Plan


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def saved(value: Any) -> Any:
    """Through `torch.save`; the model's own class is code, so weights alone are not enough."""
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


WAYS = [copy.copy, copy.deepcopy, pickled, saved]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("from_file", [True, False])
def test_plans(wan: Any, tmp_path: Any, way: Callable[[Any], Any], from_file: bool) -> None:
    plan = wan.plan
    if from_file:
        plan.save(tmp_path / "a.calibatt")
        plan = Plan.load(tmp_path / "a.calibatt")
    found = way(plan)
    assert found == plan
    assert hash(found) == hash(plan)
    for name in plan.sites:
        assert torch.equal(found.block_mask(name, 1), plan.block_mask(name, 1))


def test_a_pickled_plan_is_its_file(wan: Any, tmp_path: Any) -> None:
    wan.plan.save(tmp_path / "a.calibatt")
    content = (tmp_path / "a.calibatt").read_bytes()
    assert wan.plan.to_bytes() == content
    assert content in pickle.dumps(wan.plan)
    damaged = pickle.dumps(wan.plan).replace(content[-8:], bytes(8))
    with pytest.raises(PlanFormatError):
        pickle.loads(damaged)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("way", WAYS[1:])
def test_compiled_models(wan: Any, way: Callable[[Any], Any], before: bool) -> None:
    options = {"plan": wan.plan, "lowering": "reference"}
    compiled = torch.compile(wan.model, backend="calibatt", fullgraph=True, options=options)
    expected = wan.expanded(500.0)
    if before:
        assert torch.allclose(compiled(**wan.arguments(500.0))[0], expected, atol=1e-4)
    found = way(compiled)
    with torch.no_grad():
        for parameter in wan.model.parameters():
            parameter.zero_()
    assert torch.allclose(found(**wan.arguments(500.0))[0], expected, atol=1e-4)
    assert calibatt_compiler.summary(found).sparse_calls >= (4 if before else 2)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_is_the_model_without_its_plan(wan: Any, strict: bool) -> None:
    options = {"plan": wan.plan, "lowering": "reference"}
    compiled = torch.compile(wan.model, backend="calibatt", options=options)
    arguments = wan.arguments(500.0)
    compiled(**arguments)
    for model in (compiled, wan.model):
        program = torch.export.export(model, (), arguments, strict=strict)
        assert "calibatt" not in str(program.graph)
        got = program.module()(**arguments)[0]
        assert torch.allclose(got, wan.dense(500.0), atol=1e-5)
