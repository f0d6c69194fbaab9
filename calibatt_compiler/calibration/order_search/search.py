"""The survey: inputs are run densely, and every candidate order of tokens is measured on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from calibatt_compiler.calibration.config import CalibrationConfig
from calibatt_compiler.calibration.observe.observer import ObservedModel
from calibatt_compiler.calibration.observe.pipelines import ObservedPipeline, generate, samples_of
from calibatt_compiler.calibration.order_search.observer import SurveyObserver
from calibatt_compiler.calibration.progress import CalibrationProgress
from calibatt_compiler.calibration.store import identity
from calibatt_compiler.calibration.store.order_survey import FILE, OrderSurvey, stored
from calibatt_compiler.calibration.store.ranks import Ranks
from calibatt_compiler.errors import CalibrationError, OptionError
from calibatt_compiler.logs import logger
from calibatt_compiler.model.families import unwrap

log = logger("calibration")

Input = tuple[int, Mapping[str, Any]]
"""Seed and own arguments of one input of a pipeline."""


@dataclass(frozen=True)
class Surveyor:
    """How a run makes its survey, if it has none yet.

    Attributes:
        about: JSON values that say what the surveyed inputs are.
        measure: runs them.
    """

    about: Any
    measure: Callable[[], OrderSurvey]


def survey(
    module: torch.nn.Module,
    inputs: Sequence[Callable[[], object]],
    config: CalibrationConfig,
    *,
    samples: int | None = None,
) -> OrderSurvey:
    """Measure candidate token orders of a module; the module is left as it was.

    For modules that `calibration` is to observe:

        found = survey(model, [lambda: sample(model, first), lambda: sample(model, second)], config)
        config = replace(config, token_order=found.chosen)

    Attention is dense. At a few steps every candidate's blocks are counted and the error of its
    output is measured, over sampled query blocks. Nothing is stored.

    Args:
        module: see `calibration`.
        inputs: each runs the module over all steps of one input; best two: the second shows what
            the masks of the first are worth on another input.
        config: settings; `num_steps` must be given, and `grid` if the module's family is not known.
        samples: see `CalibrationRun.input`; without it every sample of every call counts.

    Raises:
        CalibrationError: nothing could be measured.
        OptionError: the steps or the grid are not known, or there are no inputs.
    """
    if not inputs:
        raise OptionError(
            "a survey of token orders needs inputs",
            expected="one or two functions that run the module",
            got=inputs,
            remedy="pass [lambda: sample(module, first), lambda: sample(module, second)]",
        )
    model = ObservedModel(module=unwrap(module), config=config)
    observer = SurveyObserver(model)
    with model.shown_to(observer), torch.no_grad():
        for run_input in inputs:
            observer.begin("survey", {}, samples)
            run_input()
            observer.finish()
    return observer.result(None)


def survey_pipeline(
    model: ObservedPipeline,
    inputs: Sequence[Input],
    arguments: Mapping[str, Any],
    progress: CalibrationProgress,
) -> OrderSurvey:
    """Measure candidate token orders on inputs of a pipeline.

    Args:
        model: what is observed.
        inputs: seed and own arguments of each.
        arguments: of all inputs.
        progress: counts the finished ones.

    Raises:
        CalibrationError: nothing could be measured.
    """
    observer = SurveyObserver(model)
    with model.shown_to(observer):
        for seed, varying in inputs:
            observer.begin("survey", {}, samples_of({**arguments, **varying}))
            generate(model.pipe, seed, {**arguments, **varying})
            observer.finish()
            progress.finished()
    return observer.result(describe(inputs))


def describe(inputs: Sequence[Input]) -> list[Any]:
    """Return JSON values that say what inputs of a pipeline are."""
    return [identity.describe({"seed": seed, **varying}) for seed, varying in inputs]


def settled(
    folder: Path, surveyor: Surveyor, ranks: Ranks, finished: tuple[str, ...]
) -> OrderSurvey:
    """Return the survey of a run: the stored one, or a new one, which rank 0 makes and stores.

    Args:
        folder: of the run, open on all ranks.
        surveyor: makes a new one; the same on all ranks.
        ranks: that calibrate together.
        finished: inputs that were stored before.

    Raises:
        CalibrationError: the stored one is damaged or gone, another rank failed, or nothing could
            be measured.
    """

    def known() -> OrderSurvey | None:
        found = stored(folder)
        # Before an input is finished, other inputs are no other run: they are surveyed anew.
        fits = found is not None and (finished or found.inputs == surveyor.about)
        return found if fits else None

    found = known()
    if found is None and finished:
        raise CalibrationError(
            "the survey of this run's token orders is gone",
            expected=f"{folder / FILE} beside finished inputs",
            got="no such file",
            remedy="restart the run (--restart, CalibrationConfig(restart=True))",
        )
    if found is None and ranks.rank == 0:
        log.info("surveying token orders on the first inputs")
        found = surveyor.measure()
        found.write(folder)
    if found is None:
        ranks.wait_until(lambda: known() is not None)
        found = known()
    assert found is not None
    log.info("%s", found)
    return found
