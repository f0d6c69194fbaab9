"""Calibration of a diffusers pipeline, in one call."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from calibatt_compiler.arguments import require_path
from calibatt_compiler.calibration.config import CalibrationConfig, checked_config
from calibatt_compiler.calibration.observe.pipelines import (
    FirstStepDone,
    ObservedPipeline,
    Prompt,
    generate,
    read_inputs,
    samples_of,
)
from calibatt_compiler.calibration.order_search.candidates import INPUTS
from calibatt_compiler.calibration.order_search.search import Surveyor, describe, survey_pipeline
from calibatt_compiler.calibration.progress import CalibrationProgress
from calibatt_compiler.calibration.run import CalibrationRun, recording
from calibatt_compiler.calibration.store import identity
from calibatt_compiler.calibration.store.order_survey import OrderSurvey
from calibatt_compiler.calibration.store.ranks import Ranks
from calibatt_compiler.files import check_folder, check_output
from calibatt_compiler.logs import logger
from calibatt_compiler.model.families import cfg_mode, unwrap
from calibatt_compiler.plan import Plan

log = logger("calibration")


def calibrate(
    pipe: Any,
    prompts: Sequence[Prompt],
    seeds: int | Sequence[int] = 0,
    *,
    out: str | os.PathLike[str] | None = None,
    config: CalibrationConfig | None = None,
    **pipeline_arguments: Any,
) -> Plan:
    """Run a diffusers pipeline on prompts, observe its attention, write the plan.

    Finished inputs are kept in `<out>.calibration`: the same call, made again after a kill at any
    moment, goes on from the last finished one and gives the same plan, bit for bit. The pipeline
    is left as it was.

    Within an initialised process group of torch.distributed, every rank must make the same call,
    with a pipeline of its own on its own device. The ranks share the inputs and the run folder,
    rank 0 writes the plan, and all return it; it is the plan that one process makes. If a rank
    fails or is lost, the others end within a step, and the run can be resumed with any number of
    processes.

    Args:
        pipe: a pipeline with a transformer and a scheduler, on its device, ready to generate.
        prompts: one input each: a prompt, or a mapping of pipeline arguments that differ between
            inputs, such as `{"prompt": ..., "image": ...}`.
        seeds: one seed an input, or the first of consecutive ones.
        out: where the plan is written; None only returns it, and nothing can be resumed.
        config: settings; default `CalibrationConfig()`.
        **pipeline_arguments: handed to the pipeline for every input: size of the video, number of
            steps, guidance scale, negative prompt. A plan serves these only.

    Raises:
        CalibrationError: the pipeline can't be calibrated, or the run folder belongs to another
            run or process, or another rank failed.
        OptionError: prompts, seeds or arguments that can't be used.
        FileError: plan or run folder can't be written.
    """
    config = checked_config(config)
    inputs = read_inputs(prompts, seeds, pipeline_arguments, pipe)
    arguments = identity.describe(pipeline_arguments)
    if out is not None:
        require_path("out", out)
    config = replace(config, run_folder=run_folder(config, out))
    if out is not None:
        check_output(out)
    if config.run_folder is not None:
        check_folder(config.run_folder)
    ranks = Ranks.current() if config.distributed else Ranks()
    names = [f"{index:05d}" for index in range(len(inputs))]
    job = _Job(ObservedPipeline.of(pipe, config), names, inputs, pipeline_arguments, ranks)
    with recording(
        job.model,
        about_pipeline(pipe),
        cfg=cfg_mode(pipe),
        arguments=arguments,
        ranks=ranks,
        surveyor=job.surveyor(),
        task={
            "inputs": [identity.describe({"seed": seed, **v}) for seed, v in inputs],
            "out": None if out is None else os.path.abspath(out),
        },
    ) as run:
        job.observe(run)
        plan = _shared_plan(run, ranks, names, out)
        if ranks.rank == 0 and out is not None and not config.keep_run:
            run.discard()
    log.info("calibrated on %d inputs: %r", len(names), plan)
    return plan


class _Job:
    """Runs this rank's share of the inputs.

    Attributes:
        model: what is observed; its steps are shown, and the other ranks looked after.
    """

    def __init__(
        self,
        model: ObservedPipeline,
        names: Sequence[str],
        inputs: Sequence[tuple[int, Mapping[str, Any]]],
        arguments: Mapping[str, Any],
        ranks: Ranks,
    ) -> None:
        self.model = replace(model, on_step=self.on_step)
        self._config = model.config
        self._inputs = dict(zip(names, inputs, strict=True))
        self._arguments = arguments
        self._ranks = ranks
        self._progress: CalibrationProgress | None = None
        self._only_first = False

    def on_step(self, step: int, steps: int | None) -> None:
        """Look after the other ranks, then show the step."""
        self._ranks.check()
        if self._only_first and step:
            raise FirstStepDone
        if self._progress is not None and not self._only_first:
            self._progress.step(step, steps)

    def surveyor(self) -> Surveyor:
        """Return how token orders are measured on the first inputs."""
        first = list(self._inputs.values())[:INPUTS]

        def measure() -> OrderSurvey:
            shown = self._config.progress
            with CalibrationProgress(len(first), 0, shown, what="survey") as self._progress:
                return survey_pipeline(self.model, first, self._arguments, self._progress)

        return Surveyor(describe(first), measure)

    def observe(self, run: CalibrationRun) -> None:
        """Observe this rank's inputs; the first rank then waits for the others."""
        ranks = self._ranks
        stored = [name for name in self._inputs if name in run.begun_with]
        mine = ranks.share([name for name in self._inputs if name not in run.begun_with])
        shown = self._config.progress if ranks.rank == 0 else False

        def count() -> int:
            return sum(run.written(name) for name in self._inputs)

        total = len(self._inputs)
        with CalibrationProgress(total, len(stored), shown, count) as self._progress:
            if ranks.rank:
                self._only_first = True
                first = next(iter(self._inputs))
                run.learn_sizes(lambda: self._generate(first), samples_of(self._own(first)))
                self._only_first = False
            # Stored ones are entered too: that checks that they are the same inputs.
            for name in sorted([*stored, *mine]):
                seed, varying = self._inputs[name]
                about = {"seed": seed, **varying}
                # By index, so that it does not matter which rank observes an input.
                scored = int(name) < self._config.similarity_inputs
                samples = samples_of(self._own(name))
                with run.input(name, about=about, samples=samples, scored=scored):
                    if name in mine:
                        self._generate(name)
                if name in mine:
                    self._progress.finished()
            if ranks.rank == 0:
                ranks.wait_for(ranks.others, self._progress.waiting)

    def _generate(self, name: str) -> None:
        generate(self.model.pipe, self._inputs[name][0], self._own(name))

    def _own(self, name: str) -> dict[str, Any]:
        """All arguments of an input."""
        return {**self._arguments, **self._inputs[name][1]}


def _shared_plan(
    run: CalibrationRun, ranks: Ranks, names: Sequence[str], out: str | os.PathLike[str] | None
) -> Plan:
    """Let rank 0 make the plan of all inputs and write it; return it on every rank."""
    path = run.folder / "plan.calibatt" if out is None else Path(out)
    if ranks.rank:
        ranks.done()
        ranks.wait_for([0])
        return Plan.load(path)
    plan = run.plan(names=tuple(names))
    if out is not None or ranks.size > 1:
        plan.save(path)
    ranks.done()
    ranks.wait_until_alone()
    return plan


def run_folder(config: CalibrationConfig, out: str | os.PathLike[str] | None) -> Path | None:
    """Return where finished inputs are kept, or None if only a temporary folder has them."""
    if config.run_folder is not None:
        return Path(config.run_folder)
    return None if out is None else Path(f"{os.fspath(out)}.calibration")


def about_pipeline(pipe: Any) -> dict[str, Any]:
    """Return what a run depends on beside model and settings: weights, scheduler."""
    components: Mapping[str, Any] = getattr(pipe, "components", {})
    modules = {
        name: identity.weights_fingerprint(unwrap(component))
        for name, component in components.items()
        if isinstance(component, torch.nn.Module)
    }
    scheduler = pipe.scheduler
    config = {
        key: value
        for key, value in dict(getattr(scheduler, "config", {})).items()
        if not key.startswith("_")
    }
    return {
        "kind": "pipeline",
        "pipeline": type(pipe).__name__,
        "scheduler": type(scheduler).__name__,
        "scheduler_config": json.loads(json.dumps(config, default=str, sort_keys=True)),
        "weights": modules,
    }
