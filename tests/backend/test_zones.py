"""Compiled models under plans of octave zones: one kernel a step group, drawn anew at each step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import calibatt_compiler
from calibatt_compiler.plan import Plan

BLOCK = (32, 32)
TIMESTEPS = (900.0, 700.0, 500.0, 300.0, 100.0)


def with_zones(case):
    """The same model under a plan of zones of two step groups."""
    grid = case.plan.grid
    blocks = -(-(grid[0] * grid[1] * grid[2]) // BLOCK[0])
    far = (torch.arange(blocks)[:, None] - torch.arange(blocks)).abs()
    maps = torch.stack([far // (1 + i % 2) for i in range(4)]).clamp_max(7)
    maps = maps.view(2, 2, blocks, blocks)
    plan = Plan.from_zones(dict.fromkeys(case.sites, maps), grid, TIMESTEPS, BLOCK)
    return replace(case, plan=plan)


def run(case, **options):
    torch._dynamo.reset()
    options = {"plan": case.plan, **options}
    compiled = torch.compile(case.model, backend="calibatt", fullgraph=True, options=options)
    return compiled, [compiled(**case.arguments(timestep))[0] for timestep in TIMESTEPS]


def check(case, **options):
    reference, wanted = run(case, lowering="reference")
    compiled, got = run(case, **options)
    for timestep, one, other in zip(TIMESTEPS, got, wanted, strict=True):
        scale = other.abs().max()
        assert (one - other).abs().max() < 2e-5 * scale
        # The zones must matter, or the comparison shows nothing.
        assert (case.dense(timestep) - other).abs().max() > 1e-2 * scale
    for model, kernel in ((reference, "reference"), (compiled, "native-cpu-zones")):
        summary = calibatt_compiler.summary(model)
        rows = [row for row in summary.rows if row.status == "sparse"]
        assert [row.name for row in rows] == list(case.sites)
        for row in rows:
            assert row.kernel == kernel
            assert row.sparse_calls == len(TIMESTEPS)
            assert not row.dense_calls
            assert not row.reasons
            assert row.computed_density == pytest.approx(row.density)


@pytest.mark.parametrize("lowering", ["table", "baked"])
def test_zones_are_served_as_the_reference_serves_what_they_draw(wan, lowering):
    check(with_zones(wan), lowering=lowering)


@pytest.mark.slow
@pytest.mark.inductor
def test_zones_through_inductor(wan):
    check(with_zones(wan))
