"""Validation: compares what a plan keeps on other inputs with what it was to keep."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from calibatt_compiler.calibration.config import CalibrationConfig, checked_config
from calibatt_compiler.calibration.observe.observation import InputObservation
from calibatt_compiler.calibration.observe.observer import EnergyObserver, ObservedModel
from calibatt_compiler.calibration.observe.pipelines import (
    ObservedPipeline,
    Prompt,
    generate,
    read_inputs,
    samples_of,
)
from calibatt_compiler.calibration.progress import CalibrationProgress
from calibatt_compiler.calibration.select.checks import inputs_digest
from calibatt_compiler.calibration.select.repetition_scores import AttentionCall
from calibatt_compiler.calibration.store import identity
from calibatt_compiler.calibration.store.records import SiteSize
from calibatt_compiler.calibration.store.run_folder import RunStore
from calibatt_compiler.calibration.validation.kept_mass import (
    MARGIN,
    KeptMass,
    Validation,
    check_margin,
)
from calibatt_compiler.errors import CalibrationError, PlanMismatchError
from calibatt_compiler.logs import logger
from calibatt_compiler.models import identify, is_model
from calibatt_compiler.plan import Plan
from calibatt_compiler.plan.order import TokenOrder
from calibatt_compiler.plan.text import other_text

log = logger("calibration")


def validate(
    pipe: Any,
    plan: Plan | str | os.PathLike[str],
    prompts: Sequence[Prompt],
    seeds: int | Sequence[int] = 1000,
    *,
    margin: float = MARGIN,
    config: CalibrationConfig | None = None,
    **pipeline_arguments: Any,
) -> Validation:
    """Run a diffusers pipeline densely on held-out inputs and measure what a plan would keep.

    Recording is that of calibration, but of each call's energies only the share that the
    plan's mask keeps is taken; they are never stored, nor written anywhere. Takes about as long
    as calibrating on as many inputs. The pipeline is left as it was.

    Args:
        pipe: the pipeline that the plan was made for.
        plan: the plan, or its file.
        prompts: inputs that the plan was not made from; see `calibrate`.
        seeds: see `calibrate`.
        margin: a site is flagged if at some step it keeps less than the step's threshold by more
            than this share of mass.
        config: settings; of them `component`, `cfg`, `grid`, `text`, `num_steps`, `inductor` and
            `progress` count, the block sizes are those of the plan.
        **pipeline_arguments: see `calibrate`, for the same size and sampler.

    Raises:
        CalibrationError: the pipeline can't be observed, or calls don't fit the plan.
        PlanMismatchError: the plan was made for another model.
        OptionError: prompts, seeds, arguments or a margin that can't be used.
    """
    check_margin(margin)
    config = checked_config(config)
    plan = plan if isinstance(plan, Plan) else Plan.load(plan)
    inputs = read_inputs(prompts, seeds, pipeline_arguments, pipe)
    model = ObservedPipeline.of(pipe, config)
    _check_model(plan, model.module)
    kept = KeptMass(plan)
    with CalibrationProgress(len(inputs), 0, config.progress) as progress:
        model = replace(model, on_step=progress.step)
        observer = PlanObserver(model, kept)
        with model.shown_to(observer):
            for index, (seed, varying) in enumerate(inputs):
                arguments = {**pipeline_arguments, **varying}
                observer.begin(f"{index:05d}", {}, samples_of(arguments))
                generate(pipe, seed, arguments)
                observer.finish()
                progress.finished()
    about = [identity.describe({"seed": seed, **varying}) for seed, varying in inputs]
    digest = inputs_digest(about, identity.describe(pipeline_arguments))
    return kept.result(inputs=len(inputs), digest=digest, margin=margin)


def validate_run(
    folder: str | os.PathLike[str],
    plan: Plan | str | os.PathLike[str],
    *,
    margin: float = MARGIN,
) -> Validation:
    """Measure what a plan keeps of the energies that another calibration run has stored.

    One array of energies is in memory at a time.

    Args:
        folder: of a run with `CalibrationConfig(keep_energies=True)` on held-out inputs, of the
            same model, size and sampler as the plan.
        plan: the plan, or its file.
        margin: see `validate`.

    Raises:
        CalibrationError: no run there, no energies in it, or not those of the plan's sites.
        OptionError: the margin is out of range.
    """
    check_margin(margin)
    plan = plan if isinstance(plan, Plan) else Plan.load(plan)
    store = RunStore(folder)
    arguments = store.identity()["arguments"]
    kept = KeptMass(plan)
    names = store.names()
    for name in names:
        record = store.record(name)
        for size in record.sites:
            if not _planned(plan, size, record.block):
                continue
            if record.token_order != str(plan.token_order):
                raise CalibrationError(
                    "energies of another order of tokens say nothing of a plan",
                    expected=f"token order {plan.token_order}",
                    got=record.token_order,
                    remedy="record the held-out inputs with the plan's token_order",
                )
            for step, timestep in enumerate(record.timesteps):
                energy = torch.from_numpy(store.energy(record, size.name, step))
                position = record.positions[step]
                lengths = (size.query_length, size.key_length)
                kept.add(size.name, timestep, energy, position, record.schedule_steps, lengths)
    digest = inputs_digest([store.record(name).about for name in names], arguments)
    return kept.result(inputs=len(names), digest=digest, margin=margin)


class PlanObserver(EnergyObserver):
    """Measures what the masks of a plan keep of each call's energies, and drops the energies.

    Args:
        model: what is observed.
        kept: where it is added up.
    """

    def __init__(self, model: ObservedModel, kept: KeptMass) -> None:
        super().__init__(model)
        self._kept = kept

    def finish(self) -> None:
        """End the input.

        Raises:
            CalibrationError: nothing was observed, or not every site at every step.
        """
        assert self._input is not None
        self._input.check_complete(self._skips)
        self.abandon()

    def _block(self, site: str) -> tuple[int, int] | None:
        planned = self._kept.plan.sites.get(site)
        return None if planned is None else (planned.size.block_m, planned.size.block_n)

    def _order(self) -> TokenOrder:
        return self._kept.plan.token_order

    def _observe(
        self, run: InputObservation, size: SiteSize, step: int, energy: Tensor, call: AttentionCall
    ) -> None:
        plan = self._kept.plan
        block = self._block(size.name)
        assert block is not None
        _planned(plan, size, block)
        steps = self._steps(run) or plan.steps
        lengths = (size.query_length, size.key_length)
        self._kept.add(size.name, run.timesteps[step], energy, run.positions[step], steps, lengths)


def _planned(plan: Plan, size: SiteSize, block: tuple[int, int]) -> bool:
    """Return whether the plan has this site.

    Raises:
        CalibrationError: it has, but of another size.
    """
    planned = plan.sites.get(size.name)
    if planned is None:
        return False
    first = planned.size
    expected = (first.heads, first.query_length, first.key_length, first.block_m, first.block_n)
    got = (size.heads, size.query_length, size.key_length, *block)
    lengths, planned_lengths = (size.query_length, size.key_length), expected[1:3]
    if plan.text_position and other_text(planned_lengths, lengths, math.prod(plan.grid)):
        got = (size.heads, *planned_lengths, *block)
    if got != expected:
        raise CalibrationError(
            f"the calls of site {size.name} don't fit the plan",
            expected=f"{expected} (heads, query tokens, key tokens, block sizes)",
            got=got,
            remedy="validate with the size of video that the plan was made for",
        )
    return True


def _check_model(plan: Plan, module: torch.nn.Module) -> None:
    expected, got = plan.metadata.model, identify(module)
    if expected is not None and not is_model(expected, module):
        raise PlanMismatchError(
            "the plan was made for another model",
            expected=f"{expected.class_name}, configuration {expected.config_digest[:16]}",
            got=f"{got.class_name}, configuration {got.config_digest[:16]}",
            remedy="validate the plan with its own model",
        )
