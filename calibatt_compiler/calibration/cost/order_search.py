"""What a survey of token orders will cost, before it runs: time and disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from calibatt_compiler.calibration.config import CalibrationConfig
from calibatt_compiler.calibration.cost.first_step import FirstStepClock
from calibatt_compiler.calibration.observe.pipelines import observing, samples_of, schedule_of
from calibatt_compiler.calibration.order_search.candidates import (
    SquaredError,
    Tally,
    candidates,
    survey_of,
    surveyed_steps,
)
from calibatt_compiler.calibration.order_search.observer import SurveyObserver
from calibatt_compiler.calibration.store.records import InputRecord
from calibatt_compiler.models import text_position


def surveyed_step_seconds(
    pipe: Any,
    module: torch.nn.Module,
    config: CalibrationConfig,
    one: tuple[int, Mapping[str, Any]],
    arguments: Mapping[str, Any],
) -> float:
    """Survey the first step of an input twice, the second time by the clock; return that time.

    Args:
        pipe: the pipeline.
        module: its component that is observed.
        config: settings.
        one: seed and own arguments of the input.
        arguments: of all inputs.

    Raises:
        CalibrationError: attention that can't be observed.
        OptionError: the number of steps or the grid is not known.
    """
    clock = FirstStepClock(next(module.parameters()).device)
    observer = SurveyObserver(
        config,
        text_position(type(module).__name__),
        schedule=lambda: schedule_of(pipe.scheduler),
        on_step=clock.on_step,
        steps=lambda steps: tuple(range(steps)),
    )
    seed, varying = one
    with observing(pipe, module, config, observer):
        for _ in range(2):
            clock.ticks.clear()
            observer.begin("survey", {}, samples_of({**arguments, **varying}))
            clock.run(pipe, seed, {**arguments, **varying})
            observer.abandon()
    return clock.ticks[1] - clock.ticks[0]


def surveyed_count(record: InputRecord) -> int:
    """Return how many steps of an input are surveyed."""
    return len(set(surveyed_steps(record.schedule_steps)) & set(record.positions))


def survey_bytes(about: object, record: InputRecord) -> int:
    """Return the size of a survey's file.

    Args:
        about: what the surveyed inputs are.
        record: of that input, for the sizes.
    """
    third = Tally(kept=1, blocks=3, own=SquaredError(1.0, 9.0))
    sites = {site.name: third for site in record.sites}
    orders = candidates(record.grid, record.block)
    steps = surveyed_steps(record.schedule_steps)
    return len(survey_of(about, steps, {str(x): sites for x in orders}).text().encode())
