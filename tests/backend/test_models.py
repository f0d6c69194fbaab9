"""Compiled models equal stock SDPA under the expanded mask, family by family."""

from __future__ import annotations

import pytest
import torch

import calibatt_compiler

TIMESTEPS = (900.0, 480.0, 100.0)


def compiled_with(case, **options):
    options = {"plan": case.plan, **options}
    return torch.compile(case.model, backend="calibatt", fullgraph=True, options=options)


def check(case, lowering):
    compiled = compiled_with(case, lowering=lowering)
    for timestep in TIMESTEPS:
        expected = case.expanded(timestep)
        got = compiled(**case.arguments(timestep))[0]
        scale = expected.abs().max()
        assert (got - expected).abs().max() < 2e-5 * scale
        # The mask must matter, or the comparison shows nothing.
        assert (case.dense(timestep) - expected).abs().max() > 1e-2 * scale
    summary = calibatt_compiler.summary(compiled)
    sparse = [row for row in summary.rows if row.status == "sparse"]
    assert [row.name for row in sparse] == list(case.sites)
    assert all(row.sparse_calls == len(TIMESTEPS) and not row.dense_calls for row in sparse)
    return {row.kernel for row in sparse}


@pytest.mark.parametrize("lowering", ["reference", "table", "baked"])
def test_output_is_that_of_the_expanded_mask(case, lowering):
    kinds = check(case, lowering)
    assert ("reference" in kinds) == (lowering == "reference")


@pytest.mark.slow
@pytest.mark.inductor
def test_output_through_inductor_is_that_of_the_expanded_mask(case):
    check(case, "baked")


def test_no_recompile_over_steps_and_runs(wan):
    compiled = compiled_with(wan, lowering="reference")
    compiled(**wan.arguments(900.0))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            for timestep in (900.0, 700.0, 500.0, 100.0, 2000.0):
                compiled(**wan.arguments(timestep))


def test_timestep_out_of_range_runs_dense_and_is_counted(wan):
    compiled = compiled_with(wan, lowering="reference")
    got = compiled(**wan.arguments(2000.0))[0]
    assert torch.allclose(got, wan.dense(2000.0), atol=1e-5)
    dense = calibatt_compiler.summary(compiled).dense_calls
    assert dense["dense: timestep outside the plan's range"] == 2


@pytest.mark.slow
def test_samples_at_different_timesteps_run_dense_and_are_counted(wan):
    compiled = compiled_with(wan, lowering="reference")
    arguments = wan.arguments(900.0) | {"timestep": torch.tensor([900.0, 100.0])}
    got = compiled(**arguments)[0]
    assert torch.allclose(got, wan.model(**arguments)[0], atol=1e-5)
    dense = calibatt_compiler.summary(compiled).dense_calls
    assert dense["dense: samples of one batch at different timesteps"] == 2


def test_bfloat16_models_are_served_in_bfloat16(wan):
    expected = wan.expanded(900.0)
    wan.model.to(torch.bfloat16)
    inputs = {name: value.to(torch.bfloat16) for name, value in wan.inputs.items()}
    compiled = compiled_with(wan, lowering="reference")
    got = compiled(**wan.arguments(900.0) | inputs)[0]
    assert got.dtype == torch.bfloat16
    assert (got - expected).norm() < 0.05 * expected.norm()
    assert calibatt_compiler.summary(compiled).sparse_calls == 2


def test_the_monitor_is_in_the_summary(wan):
    compiled = compiled_with(wan, lowering="reference", monitor=1)
    assert torch.equal(
        compiled(**wan.arguments(900.0))[0],
        compiled_with(wan, lowering="reference")(**wan.arguments(900.0))[0],
    )
    summary = calibatt_compiler.summary(compiled)
    assert all(row.drift.samples == 1 for row in summary.rows if row.status == "sparse")
    assert any(note.startswith("monitor: ") for note in summary.notes())
    assert summary.to_dict()["sites"][0]["drift"]["calibrated"] is None


def test_another_sampler_is_in_the_summary(wan):
    compiled = compiled_with(wan, lowering="reference")
    for timestep in (900.0, 700.0, 200.0):
        compiled(**wan.arguments(timestep))
    summary = calibatt_compiler.summary(compiled)
    (note,) = summary.samplers
    assert "seen 900, 700, 200; the plan's 900, 500, 100" in note
    assert note in summary.notes()
    assert "sampler" in str(summary)
    assert summary.to_dict()["samplers"] == [note]
