"""A plan of weighted samples that an earlier version wrote: read, shown, served, not made again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import calibatt_compiler
from calibatt_compiler.cli import validation
from calibatt_compiler.cli.app import run
from calibatt_compiler.errors import OptionError
from calibatt_compiler.plan import Plan

OLD = Path(__file__).parent / "plans" / "weighted_sample.calibatt"
"""Calibrated on the model of `wan` with `sample_power=1.0`, by commit 6f19b2a."""


def test_it_is_read_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan.load(OLD)
    assert plan.digest == "787b7d9ccf3537d8e364a089d13b1694dd071ca3ea9b07ac9da7bba9ebba1a8c"
    assert all(site.weighted for site in plan.sites.values())
    assert Plan.from_bytes(plan.to_bytes()) == plan
    assert run(["inspect", str(OLD)]) == 0
    assert "sample_power = 1" in capsys.readouterr().out


@pytest.mark.parametrize("lowering", ["reference", "baked"])
def test_it_is_served_with_its_weights(wan, lowering: str) -> None:
    wan = dataclasses.replace(wan, plan=Plan.load(OLD))
    options = {"plan": str(OLD), "lowering": lowering, "on_mismatch": "error"}
    model = torch.compile(wan.model, backend="calibatt", options=options)
    for timestep in wan.plan.metadata.sampler.timesteps:
        found = model(**wan.arguments(timestep))[0]
        assert torch.allclose(found, wan.expanded(timestep), atol=1e-4)
        assert not torch.allclose(found, wan.dense(timestep), atol=1e-2)
    assert calibatt_compiler.summary(model).sparse_calls == 6


def test_it_is_not_made_again() -> None:
    folder = Path(__file__).parents[1] / "calibration" / "store" / "old_run"
    with pytest.raises(OptionError, match=r"removed(.|\n)*0016(.|\n)*sample_power=1.0"):
        validation._mask_plan(str(folder), Plan.load(OLD), {"attention": 0.1})
