"""Validation: compares what a plan does on other inputs with what it was to do."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
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
from calibatt_compiler.calibration.select.checks import check_alike, inputs_digest
from calibatt_compiler.calibration.select.repetition_scores import AttentionCall
from calibatt_compiler.calibration.select.zones.site import group_of
from calibatt_compiler.calibration.store import identity
from calibatt_compiler.calibration.store.records import InputRecord, SiteSize
from calibatt_compiler.calibration.store.run_folder import RunStore
from calibatt_compiler.calibration.store.zone_sums import ZoneSums
from calibatt_compiler.calibration.validation.measures import (
    AnyValidation,
    Measure,
    margin_of,
    measure_of,
)
from calibatt_compiler.calibration.validation.output_error import OutputError
from calibatt_compiler.errors import CalibrationError, PlanMismatchError
from calibatt_compiler.logs import logger
from calibatt_compiler.model.families import identify, is_model
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
    margin: float | None = None,
    config: CalibrationConfig | None = None,
    **pipeline_arguments: Any,
) -> AnyValidation:
    """Run a diffusers pipeline densely on held-out inputs and measure what a plan would do.

    Recording is that of calibration, but of each call's energies only a figure a head and row is
    taken: the share that the plan's mask keeps, or of zones the variance that their draw gives.
    Energies are never stored, nor written anywhere. Takes about as long as calibrating on as
    many inputs. The pipeline is left as it was.

    Args:
        pipe: the pipeline that the plan was made for.
        plan: the plan, or its file.
        prompts: inputs that the plan was not made from; see `calibrate`.
        seeds: see `calibrate`.
        margin: of masks, a site is flagged if at some step it keeps less than the step's
            threshold by more than this share of mass, default 0.02; of zones, if its output error
            is above the expected one by more than this share of it, default 0.25.
        config: settings; of them `component`, `cfg`, `grid`, `text`, `num_steps`, `inductor` and
            `progress` count, the block sizes are those of the plan.
        **pipeline_arguments: see `calibrate`, for the same size and sampler.

    Returns:
        A `Validation` of a plan of masks, a `ZoneValidation` of one of zones.

    Raises:
        CalibrationError: the pipeline can't be observed, or calls don't fit the plan.
        PlanMismatchError: the plan was made for another model.
        OptionError: prompts, seeds, arguments or a margin that can't be used.
    """
    config = checked_config(config)
    plan = plan if isinstance(plan, Plan) else Plan.load(plan)
    margin = margin_of(plan, margin)
    inputs = read_inputs(prompts, seeds, pipeline_arguments, pipe)
    model = ObservedPipeline.of(pipe, config)
    _check_model(plan, model.module)
    measure = measure_of(plan)
    with CalibrationProgress(len(inputs), 0, config.progress) as progress:
        model = replace(model, on_step=progress.step)
        observer = PlanObserver(model, measure)
        with model.shown_to(observer):
            for index, (seed, varying) in enumerate(inputs):
                arguments = {**pipeline_arguments, **varying}
                observer.begin(f"{index:05d}", {}, samples_of(arguments))
                generate(pipe, seed, arguments)
                observer.finish()
                progress.finished()
    about = [identity.describe({"seed": seed, **varying}) for seed, varying in inputs]
    digest = inputs_digest(about, identity.describe(pipeline_arguments))
    return measure.result(inputs=len(inputs), digest=digest, margin=margin)


def validate_run(
    folder: str | os.PathLike[str],
    plan: Plan | str | os.PathLike[str],
    *,
    margin: float | None = None,
) -> AnyValidation:
    """Measure what a plan does on the energies that another calibration run has stored.

    One array of energies is in memory at a time.

    Args:
        folder: of a run with `CalibrationConfig(keep_energies=True)` on held-out inputs, of the
            same model, size and sampler as the plan. Of a plan of zones a run for zones serves,
            too: its sums give the error of each step group and head, and no worst input or row.
        plan: the plan, or its file.
        margin: see `validate`.

    Returns:
        See `validate`.

    Raises:
        CalibrationError: no run there, neither energies nor sums in it that the plan can be judged
            by, or not those of the plan's sites.
        OptionError: the margin is out of range.
    """
    plan = plan if isinstance(plan, Plan) else Plan.load(plan)
    margin = margin_of(plan, margin)
    store = RunStore(folder)
    arguments = store.identity()["arguments"]
    measure = measure_of(plan)
    records = [store.record(name) for name in store.names()]
    if records and records[0].form == "zones":
        _add_sums(measure, store, records)
    else:
        _add_energies(measure, store, records)
    digest = inputs_digest([record.about for record in records], arguments)
    return measure.result(inputs=len(records), digest=digest, margin=margin)


def _add_energies(measure: Measure, store: RunStore, records: Sequence[InputRecord]) -> None:
    """Judge a plan by the energies that a run has kept."""
    for record in records:
        for size in _planned_sites(measure.plan, record):
            lengths = (size.query_length, size.key_length)
            for step, timestep in enumerate(record.timesteps):
                energy = torch.from_numpy(store.energy(record, size.name, step))
                position = record.positions[step]
                measure.add(size.name, timestep, energy, position, record.schedule_steps, lengths)


def _add_sums(measure: Measure, store: RunStore, records: Sequence[InputRecord]) -> None:
    """Judge a plan by the mean squares of a run for zones."""
    first = records[0]
    if not isinstance(measure, OutputError):
        raise CalibrationError(
            "what a run for zones has stored can't judge masks",
            expected="a run with CalibrationConfig(keep_energies=True) or --keep-energies",
            got=f"sums of energies over its inputs in {store.folder}",
            remedy="record the held-out inputs with energies, or run the model on them",
        )
    for record in records[1:]:
        check_alike(first, record)
    names = [record.name for record in records]
    places = [group_of(at, first.schedule_steps, first.step_groups) for at in first.positions]
    for size in _planned_sites(measure.plan, first):
        for group in sorted(set(places)):
            timesteps = [
                at for at, place in zip(first.timesteps, places, strict=True) if place == group
            ]
            squares = ZoneSums(store.folder).mean_squares(size.name, group, names)
            lengths = (size.query_length, size.key_length)
            measure.add_squares(size.name, timesteps, squares, lengths)


def _planned_sites(plan: Plan, record: InputRecord) -> Iterator[SiteSize]:
    """The sites of an input that the plan has.

    Raises:
        CalibrationError: one of another size, or tokens in another order.
    """
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
        yield size


class PlanObserver(EnergyObserver):
    """Judges a plan by each call's energies, and drops the energies.

    Args:
        model: what is observed.
        measure: where it is added up.
    """

    def __init__(self, model: ObservedModel, measure: Measure) -> None:
        super().__init__(model)
        self._measure = measure

    def finish(self) -> None:
        """End the input.

        Raises:
            CalibrationError: nothing was observed, or not every site at every step.
        """
        assert self._input is not None
        self._input.check_complete(self._skips)
        self.abandon()

    def _block(self, site: str) -> tuple[int, int] | None:
        planned = self._measure.plan.sites.get(site)
        return None if planned is None else (planned.size.block_m, planned.size.block_n)

    def _order(self) -> TokenOrder:
        return self._measure.plan.token_order

    def _observe(
        self, run: InputObservation, size: SiteSize, step: int, energy: Tensor, call: AttentionCall
    ) -> None:
        plan = self._measure.plan
        block = self._block(size.name)
        assert block is not None
        _planned(plan, size, block)
        steps = self._steps(run) or plan.steps
        lengths = (size.query_length, size.key_length)
        self._measure.add(
            size.name, run.timesteps[step], energy, run.positions[step], steps, lengths
        )


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
