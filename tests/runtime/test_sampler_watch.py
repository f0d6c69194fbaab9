"""Timesteps that are no steps of the plan are said once; those of another transformer refused."""

from __future__ import annotations

import logging

import pytest
import torch

from calibatt_compiler.errors import PlanMismatchError
from calibatt_compiler.kernels.request import KernelSettings
from calibatt_compiler.plan import Plan
from calibatt_compiler.runtime import site as sites
from calibatt_compiler.runtime.sampler_watch import SamplerWatch, listed

HIGH = (999.0, 964.0, 926.0, 887.0)
LOW = (875.0, 700.0, 400.0, 100.0)


def plan_of(timesteps) -> Plan:
    mask = torch.eye(3, dtype=torch.bool).expand(len(timesteps), 1, 3, 3)
    return Plan.from_masks({"a": mask}, (1, 5, 8), timesteps, (16, 16))


def make(timesteps, **options) -> tuple[sites.SparseSite, SamplerWatch]:
    plan = plan_of(timesteps)
    watch = SamplerWatch(plan)
    given = {"device": torch.device("cpu"), "dtype": torch.float32, "head_dim": 8}
    settings = KernelSettings(lowering="reference", **given)
    return sites.SparseSite(plan, "a", settings, watch=watch, **options), watch


def attend(site: sites.SparseSite, *timesteps: float) -> list[str]:
    q = torch.randn(1, 1, 40, 8)
    kinds = []
    for timestep in timesteps:
        before = site.calls.copy()
        site.attend(q, q, q, timestep, 0.3)
        kinds += (site.calls - before).keys()
    return kinds


def test_the_plans_own_timesteps_and_their_rounding_are_not_warned_of(caplog):
    timesteps = torch.linspace(1000, 3, 50)
    site, watch = make(timesteps.tolist())
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        kinds = attend(site, *timesteps.to(dtype).tolist())
        assert set(kinds) == {"reference"}
    assert watch.note() is None
    assert not caplog.records


def test_another_sampler_is_said_once_with_both_lists(caplog):
    site, watch = make(LOW)
    with caplog.at_level(logging.WARNING, "calibatt"):
        assert attend(site, 875.0, 600.0, 250.0, 100.2, 875.0, 600.0) == ["reference"] * 6
    assert len(caplog.records) == 1
    assert "600" in caplog.text
    assert "875, 700, 400, 100" in caplog.text
    assert watch.strange == [600.0, 250.0]
    assert "seen 875, 600, 250, 100.2;" in str(watch.note())


def test_the_plan_of_the_other_transformer_is_not_served():
    site, _ = make(HIGH)
    # Half a step beyond the last one is where the other transformer begins.
    assert attend(site, *LOW) == [sites.DENSE_FOREIGN] + [sites.DENSE_OUTSIDE] * 3
    site, _ = make(LOW)
    # All but 999 are less than half a step from 875.
    assert attend(site, *HIGH) == [sites.DENSE_OUTSIDE] + [sites.DENSE_FOREIGN] * 3
    rising, _ = make(tuple(reversed(LOW)))
    assert attend(rising, *reversed(HIGH))[0] == sites.DENSE_FOREIGN


@pytest.mark.parametrize(("planned", "given"), [(HIGH, LOW), (LOW, HIGH)])
def test_the_plan_of_the_other_transformer_is_an_error_on_request(planned, given):
    site, _ = make(planned, on_mismatch="error")
    with pytest.raises(PlanMismatchError, match="transformer of the pipeline its own plan"):
        attend(site, *given)
    site, _ = make(planned, on_mismatch="error")
    assert attend(site, *planned) == ["reference"] * 4


def test_half_a_step_beyond_the_ends_is_served_where_the_ranges_overlap():
    site, _ = make(LOW, on_mismatch="error")
    # The first is noisier than the plan's first step, and nothing farther out came before it.
    assert attend(site, 950.0, 700.0, 50.0) == ["reference"] * 3
    assert attend(site, 2000.0) == [sites.DENSE_OUTSIDE]


def test_all_sites_of_a_pass_are_served_alike():
    site, _ = make(HIGH)
    assert attend(site, 875.0, 875.0, 875.0) == [sites.DENSE_FOREIGN] * 3


def test_samples_at_different_timesteps_are_no_sampler():
    site, watch = make(LOW, on_mismatch="error")
    assert attend(site, float("nan")) == [sites.DENSE_MIXED]
    assert watch.note() is None


def test_long_lists_are_cut_in_the_middle():
    text = listed(range(100))
    assert text.startswith("0, 1, ")
    assert text.endswith(", 98, 99")
    assert "... 36 more ..." in text
