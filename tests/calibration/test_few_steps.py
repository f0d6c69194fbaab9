"""Distilled samplers of 4 and 8 steps: every step is calibrated, and served sparse."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

import calibatt_compiler
from calibatt_compiler.calibration import CalibrationConfig, Thresholds, calibrate
from calibatt_compiler.plan.thresholds import default_thresholds


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        # The paper's 4-step curve, read at 0, 1/4, 1/2 and 3/4 of the schedule.
        (4, [0.8630, 0.7874, 0.7690, 0.7645]),
        (8, [0.8630, 0.8124, 0.7874, 0.7751, 0.7690, 0.7659, 0.7645, 0.7637]),
    ],
)
def test_no_step_is_near_dense_by_default(steps: int, expected: list[float]) -> None:
    thresholds = default_thresholds(steps)
    got = [thresholds.at(step, steps) for step in range(steps)]
    assert got == pytest.approx(expected, abs=5e-5)
    assert CalibrationConfig().thresholds(steps) == thresholds == Thresholds(0.763, 0.863, 5.64)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 4, 8])
def test_every_step_of_a_distilled_sampler_is_sparse(
    steps: int, tiny_wan_pipeline: Any, tiny_wan_arguments: dict[str, int]
) -> None:
    pipe = tiny_wan_pipeline
    # Distilled models run without guidance: one call a step.
    arguments = {**tiny_wan_arguments, "num_inference_steps": steps, "guidance_scale": 1.0}
    config = CalibrationConfig(block=(32, 32), form="masks")
    plan = calibrate(pipe, ["a big rabbit runs"], 3, config=config, **arguments)
    assert plan.steps == steps
    assert plan.metadata.thresholds == {
        "A": 0.763,
        "C": 0.863,
        "k": 5.64,
        "rho": 0.5,
        "share_steps": 0.97,
    }
    for site in plan.sites:
        assert all(plan.density(site, step) < 1 for step in range(steps))
    plain = pipe.transformer
    try:
        with mock.patch("calibatt_compiler.backend._inductor", lambda gm, *_: gm.forward):
            pipe.transformer = torch.compile(plain, backend="calibatt", options={"plan": plan})
            generator = torch.Generator().manual_seed(4)
            pipe(prompt="the bird", generator=generator, output_type="latent", **arguments)
        summary = calibatt_compiler.summary(pipe.transformer)
    finally:
        pipe.transformer = plain
    assert set(summary.dense_calls) <= {"dense: cross-attention"}
    assert summary.sparse_calls == steps * len(plan.sites)
