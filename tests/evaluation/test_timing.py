"""Denoising steps seen from outside, and timed in turn."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from calibatt_compiler.errors import PipelineError
from calibatt_compiler.evaluation.timing import StepTimes, spread, time_steps, watching

CPU = torch.device("cpu")


class Model(nn.Module):
    """Counts its calls by timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        self.seen.append(float(timestep[0]))
        return x * timestep


def sample(model: nn.Module) -> None:
    """Three steps with two calls each, as a pipeline with guidance makes them."""
    for t in (900.0, 500.0, 100.0):
        for branch in (0.0, 1.0):
            model(torch.full((2,), branch), timestep=torch.tensor([t]))


@pytest.mark.parametrize("compiled", [False, True])
def test_calls_are_grouped_by_timestep(compiled: bool):
    model = torch.compile(Model(), backend="eager") if compiled else Model()
    indices: list[int] = []
    with watching(model, indices.append, keep=True) as watch:
        sample(model)
    assert indices == [0, 1, 2]
    assert [step.timestep for step in watch.steps] == [900.0, 500.0, 100.0]
    assert [len(step.calls) for step in watch.steps] == [2, 2, 2]
    assert watch.steps[1].calls[1][0][0].tolist() == [1.0, 1.0]
    sample(model)
    assert watch.count == 3, "not watched any more"


def test_a_model_without_timestep_is_refused():
    module = nn.Identity()
    with watching(module), pytest.raises(PipelineError, match="timestep"):
        module(torch.ones(1))


def test_every_variant_runs_every_step_in_every_round():
    models = {"dense": Model(), "a": Model(), "b": Model()}
    with watching(models["dense"], keep=True) as watch:
        sample(models["dense"])
    models["dense"].seen.clear()
    ticks = []
    times = time_steps(
        models,
        {0: watch.steps[0], 2: watch.steps[2]},
        rounds=6,
        device=CPU,
        on_step=lambda: ticks.append(1),
    )
    for model in models.values():
        assert Counter(model.seen) == {900.0: 14, 100.0: 14}
    assert times.steps == (0, 2)
    assert len(ticks) == 14
    for rows in times.seconds.values():
        assert len(rows) == 6
        assert all(len(row) == 2 and min(row) > 0 for row in rows)


def test_too_few_rounds_are_no_measurement():
    with pytest.raises(PipelineError, match="5 rounds"):
        time_steps({"dense": Model()}, {}, rounds=4, device=CPU)


def test_medians_and_ratio():
    times = StepTimes(
        steps=(0, 1),
        seconds={
            "dense": ((2.0, 4.0), (2.0, 4.0), (20.0, 40.0)),
            "sparse": ((1.0, 2.0), (2.0, 2.0), (10.0, 10.0)),
        },
    )
    assert times.median("dense") == 3.0
    assert times.median("sparse") == 2.0
    assert times.ratio("dense", "sparse") == pytest.approx(2.0)
    assert times.by_step("sparse") == [2.0, 2.0]


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [(20, 4, (2, 7, 12, 17)), (3, 5, (0, 1, 2)), (50, 1, (25,)), (20, 20, tuple(range(20)))],
)
def test_spread(total: int, count: int, expected: tuple[int, ...]):
    assert spread(total, count) == expected
