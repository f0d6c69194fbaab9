"""What a survey of token orders will cost, before it runs: time and disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from calibatt_compiler.calibration.cost.first_step import FirstStepClock
from calibatt_compiler.calibration.observe.pipelines import ObservedPipeline, samples_of
from calibatt_compiler.calibration.order_search.candidates import (
    SquaredError,
    Tally,
    candidates,
    survey_of,
    surveyed_steps,
)
from calibatt_compiler.calibration.order_search.observer import SurveyObserver
from calibatt_compiler.calibration.store.records import InputRecord


def surveyed_step_seconds(
    model: ObservedPipeline,
    one: tuple[int, Mapping[str, Any]],
    arguments: Mapping[str, Any],
) -> float:
    """Survey the first step of an input twice, the second time by the clock; return that time.

    Args:
        model: what is observed.
        one: seed and own arguments of the input.
        arguments: of all inputs.

    Raises:
        CalibrationError: attention that can't be observed.
        OptionError: the number of steps or the grid is not known.
    """
    clock = FirstStepClock(next(model.module.parameters()).device)
    model = replace(model, on_step=clock.on_step)
    observer = SurveyObserver(model, steps=lambda steps: tuple(range(steps)))
    seed, varying = one
    with model.shown_to(observer):
        for _ in range(2):
            clock.ticks.clear()
            observer.begin("survey", {}, samples_of({**arguments, **varying}))
            clock.run(model.pipe, seed, {**arguments, **varying})
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
