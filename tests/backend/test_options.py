"""Options and plans that can't be right are errors of ours, in the caller's frame."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

import calibatt_compiler
from calibatt_compiler import backend
from calibatt_compiler.errors import (
    CalibattError,
    CaptureError,
    OptionError,
    PlanFormatError,
    PlanMismatchError,
)
from calibatt_compiler.model.families import identify
from calibatt_compiler.plan import ModelIdentity, Plan
from calibatt_compiler.report.summary import SiteRow, Summary


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, OptionError, "needs a plan"),
        ({"plan": 3}, OptionError, "needs a plan"),
        ({"plan": "no/such/file"}, PlanFormatError, "no plan file"),
        ({"plann": "x"}, OptionError, "did you mean 'plan'"),
        ({"plan": "x", "lowering": "fast"}, OptionError, "baked, table, reference"),
        ({"plan": "x", "on_mismatch": "ignore"}, OptionError, "dense, error"),
        ({"plan": "x", "inductor": ["max_autotune"]}, OptionError, "mapping"),
        ({"plan": "x", "hopper": "yes"}, OptionError, "boolean"),
        ({"plan": "x", "monitor": True}, OptionError, "number of calls"),
        ({"plan": "x", "monitor": -1}, OptionError, "number of calls"),
        ({"plan": "x", "table_memory": 0}, OptionError, "number of megabytes"),
        ({"plan": "x", "table_memory": 1.5}, OptionError, "number of megabytes"),
    ],
)
def test_bad_options(wan, options, error, words):
    compiled = torch.compile(wan.model, backend="calibatt", options=options)
    with pytest.raises(error, match=words) as caught:
        compiled(**wan.arguments(900.0))
    assert isinstance(caught.value, CalibattError)
    for part in ("expected:", "got:", "remedy:"):
        assert part in str(caught.value)


def test_mode_is_refused(wan):
    compiled = torch.compile(wan.model, backend="calibatt", mode="max-autotune")
    with pytest.raises(OptionError, match="no mode") as caught:
        compiled(**wan.arguments(900.0))
    assert "coordinate_descent_tuning" in str(caught.value)  # what the mode stands for


def test_unreadable_plan(wan, tmp_path):
    path = tmp_path / "cut.calibatt"
    wan.plan.save(path)
    path.write_bytes(path.read_bytes()[:-3])
    compiled = torch.compile(wan.model, backend="calibatt", options={"plan": str(path)})
    with pytest.raises(PlanFormatError, match="damaged"):
        compiled(**wan.arguments(900.0))


def test_plan_from_a_path(wan, tmp_path):
    wan.plan.save(tmp_path / "a.calibatt")
    for path in (tmp_path / "a.calibatt", str(tmp_path / "a.calibatt")):
        options = {"plan": path, "lowering": "reference"}
        compiled = torch.compile(wan.model, backend="calibatt", options=options)
        got = compiled(**wan.arguments(900.0))[0]
        assert torch.allclose(got, wan.expanded(900.0), atol=1e-4)


def with_identity(plan: Plan, identity: ModelIdentity) -> Plan:
    return Plan(plan.metadata.model_copy(update={"model": identity}), plan.sites)


def test_plan_of_another_class(wan):
    other = ModelIdentity(class_name="MochiTransformer3DModel", config_digest="0" * 64)
    options = {"plan": with_identity(wan.plan, other)}
    compiled = torch.compile(wan.model, backend="calibatt", options=options)
    with pytest.raises(PlanMismatchError, match="MochiTransformer3DModel"):
        compiled(**wan.arguments(900.0))


def test_plan_of_another_configuration(wan):
    other = identify(wan.model).model_copy(update={"config_digest": "0" * 64})
    options = {"plan": with_identity(wan.plan, other)}
    compiled = torch.compile(wan.model, backend="calibatt", options=options)
    with pytest.raises(PlanMismatchError, match="another configuration"):
        compiled(**wan.arguments(900.0))


def test_plan_of_this_model(wan):
    options = {"plan": with_identity(wan.plan, identify(wan.model)), "lowering": "reference"}
    compiled = torch.compile(wan.model, backend="calibatt", options=options)
    assert torch.allclose(compiled(**wan.arguments(900.0))[0], wan.expanded(900.0), atol=1e-4)


def test_plan_whose_sites_are_not_in_the_model(wan):
    renamed = {f"layers.{i}": site for i, site in enumerate(wan.plan.sites.values())}
    plan = Plan.create(renamed, grid=wan.plan.grid, sampler=wan.plan.metadata.sampler)
    compiled = torch.compile(wan.model, backend="calibatt", options={"plan": plan})
    with pytest.raises(PlanMismatchError, match="none of the plan's sites"):
        compiled(**wan.arguments(900.0))


@pytest.mark.slow
def test_other_number_of_heads_is_skipped_with_its_reason(wan):
    masks = {
        name: torch.ones(3, 4, 6, 6, dtype=torch.bool)
        if name.startswith("blocks.0")
        else torch.eye(6, dtype=torch.bool).expand(3, 2, 6, 6)
        for name in wan.sites
    }
    plan = Plan.from_masks(masks, wan.plan.grid, wan.plan.timesteps, (32, 32))
    options = {"plan": plan, "lowering": "reference"}
    compiled = torch.compile(wan.model, backend="calibatt", options=options)
    compiled(**wan.arguments(900.0))
    rows = {row.name: row.status for row in calibatt_compiler.summary(compiled).rows}
    assert rows["blocks.0.attn1"] == "2 heads instead of 4"
    assert rows["blocks.1.attn1"] == "sparse"
    strict = torch.compile(
        wan.model, backend="calibatt", options={**options, "on_mismatch": "error"}
    )
    with pytest.raises(PlanMismatchError, match="2 heads instead of 4"):
        strict(**wan.arguments(900.0))


@pytest.mark.inductor
def test_inductor_settings_are_handed_on(wan):
    options = {"plan": wan.plan, "lowering": "reference", "inductor": {"no_such_setting": 1}}
    compiled = torch.compile(wan.model, backend="calibatt", options=options)
    with pytest.raises(Exception, match="no_such_setting"):
        compiled(**wan.arguments(900.0))


def test_two_plans_over_one_model_do_not_mix(wan):
    masks = {name: torch.eye(6, dtype=torch.bool).expand(3, 2, 6, 6) for name in wan.sites}
    other = Plan.from_masks(masks, wan.plan.grid, wan.plan.timesteps, (32, 32))
    first, second = (
        torch.compile(
            wan.model, backend="calibatt", options={"plan": plan, "lowering": "reference"}
        )
        for plan in (wan.plan, other)
    )
    for _ in range(2):
        one = first(**wan.arguments(900.0))[0]
        two = second(**wan.arguments(900.0))[0]
    assert torch.allclose(one, wan.expanded(900.0), atol=1e-4)
    assert not torch.allclose(one, two, atol=1e-3)
    assert calibatt_compiler.summary(first).plan_digest == wan.plan.digest
    assert calibatt_compiler.summary(second).plan_digest == other.digest


def test_module_compiled_in_place(wan):
    expected = wan.expanded(900.0)
    wan.model.compile(backend="calibatt", options={"plan": wan.plan, "lowering": "reference"})
    assert torch.allclose(wan.model(**wan.arguments(900.0))[0], expected, atol=1e-4)
    assert calibatt_compiler.summary(wan.model).sparse_calls == 2


def test_two_instances_with_equal_options_are_both_summarised(wan):
    twin = type(wan.model).from_config(wan.model.config).eval().requires_grad_(False)
    options = {"plan": wan.plan, "lowering": "reference"}
    for model in (wan.model, twin):
        compiled = torch.compile(model, backend="calibatt", options=dict(options))
        compiled(**wan.arguments(900.0))
        assert calibatt_compiler.summary(compiled).sparse_calls >= 2


def test_summary_before_the_first_call(wan):
    compiled = torch.compile(wan.model, backend="calibatt", options={"plan": wan.plan})
    found = calibatt_compiler.summary(compiled)
    assert not found.rows
    assert "there was none yet" in found.eager  # or it ran without us: that can't be seen
    with pytest.raises(CaptureError, match="nothing to summarise"):
        calibatt_compiler.summary(torch.compile(wan.model, backend="eager"))


@pytest.mark.inductor
def test_inductor_compiles_once_for_all_plans(wan, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    counters = torch._dynamo.utils.counters
    hits = []
    for side in (6, 3):
        masks = {name: torch.eye(6, dtype=torch.bool).repeat(3, 2, 1, 1) for name in wan.sites}
        for mask in masks.values():
            mask[..., :side] = True
        plan = Plan.from_masks(masks, wan.plan.grid, wan.plan.timesteps, (32, 32))
        options = {"plan": plan, "lowering": "table"}
        before = counters["inductor"]["fxgraph_cache_hit"]
        compiled = torch.compile(
            wan.model, backend="calibatt", options=options, isolate_recompiles=True
        )
        compiled(**wan.arguments(900.0))
        hits.append(counters["inductor"]["fxgraph_cache_hit"] - before)
        assert calibatt_compiler.summary(compiled).rows[0].density == plan.density(wan.sites[0])
    assert hits == [0, 1]


@pytest.mark.inductor
def test_code_compiled_for_other_operators_is_not_taken(wan, tmp_path, monkeypatch):
    """As an older calibatt left it in Inductor's cache: forward or backward."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    wan.model.requires_grad_(True)
    counters = torch._dynamo.utils.counters
    hits = []
    for digest in ("older", "newer", "newer"):
        torch._dynamo.reset()
        monkeypatch.setattr(backend, "operators_digest", lambda digest=digest: digest)
        before = counters["inductor"]["fxgraph_cache_hit"]
        compiled = torch.compile(wan.model, backend="calibatt", options={"plan": wan.plan})
        compiled(**wan.arguments(900.0))[0].sum().backward()
        hits.append(counters["inductor"]["fxgraph_cache_hit"] - before)
    assert hits[:2] == [0, 0]
    assert hits[2] >= 1


def test_summary_fits_a_terminal_and_names_what_ran_dense(wan):
    options = {"plan": wan.plan, "lowering": "reference"}
    compiled = torch.compile(wan.model, backend="calibatt", options=options)
    for timestep in (900.0, 2000.0):
        compiled(**wan.arguments(timestep))
    summary = calibatt_compiler.summary(compiled)
    out = io.StringIO()
    Console(file=out, width=80).print(summary)
    lines = [line.strip() for line in out.getvalue().splitlines()]
    for row in summary.rows:
        (line,) = [line for line in lines if line.startswith(row.name + " ")]
        assert line.split()[-1] == str(sum(row.dense_calls.values()))
    assert any("timestep outside the plan's range" in line for line in lines)


def test_summary_counts_repaired_calls():
    row = SiteRow("blocks.0.attn1", "sparse", 0.5, 0.5, "hopper-table", 4, {}, repairs=3)
    summary = Summary((row,), 1, "0" * 64)
    assert summary.notes() == ["3 calls computed again: scores overflowed their softmax shift"]
    assert summary.to_dict()["sites"][0]["repairs"] == 3
