"""Calibration of a diffusers pipeline, in one call."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from calibatt_compiler.calibration import identity
from calibatt_compiler.calibration.config import CalibrationConfig
from calibatt_compiler.calibration.generation import (
    Prompt,
    branches,
    component_of,
    generate,
    in_place,
    quiet,
    read_inputs,
    samples_of,
    schedule_of,
)
from calibatt_compiler.calibration.progress import CalibrationProgress
from calibatt_compiler.calibration.run import recording
from calibatt_compiler.plan import Plan

log = logging.getLogger("calibatt")


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
            run or process.
        OptionError: prompts, seeds or arguments that can't be used.
    """
    config = config or CalibrationConfig()
    inputs = read_inputs(prompts, seeds, pipeline_arguments)
    arguments = identity.describe(pipeline_arguments)
    config = replace(config, run_folder=run_folder(config, out))
    module = component_of(pipe, config.component)
    names = [f"{index:05d}" for index in range(len(inputs))]
    from calibatt_compiler.models import cfg_mode

    progress: CalibrationProgress | None = None

    def on_step(step: int, steps: int | None) -> None:
        if progress is not None:
            progress.step(step, steps)

    with (
        quiet(pipe),
        in_place(pipe, config.component, module),
        recording(
            module,
            config,
            about_pipeline(pipe),
            cfg=cfg_mode(pipe),
            arguments=arguments,
            schedule=lambda: schedule_of(pipe.scheduler),
            on_step=on_step,
        ) as run,
    ):
        done = sum(run.has(name) for name in names)
        with (
            CalibrationProgress(len(names), done, config.progress) as progress,
            branches(module, run.branch),
        ):
            for name, (seed, varying) in zip(names, inputs, strict=True):
                # Entered even if the input is stored: that checks that it is the same input.
                about = {"seed": seed, **varying}
                stored = run.has(name)
                with run.input(name, about=about, samples=samples_of(pipeline_arguments)):
                    if not stored:
                        generate(pipe, seed, {**pipeline_arguments, **varying})
                if not stored:
                    progress.finished()
        plan = run.plan(names=tuple(names))
        if out is not None:
            plan.save(out)
        if out is not None and not config.keep_run:
            run.discard()
    log.info("calibrated on %d inputs: %r", len(names), plan)
    return plan


def run_folder(config: CalibrationConfig, out: str | os.PathLike[str] | None) -> Path | None:
    """Return where finished inputs are kept, or None if only a temporary folder has them."""
    if config.run_folder is not None:
        return Path(config.run_folder)
    return None if out is None else Path(f"{os.fspath(out)}.calibration")


def about_pipeline(pipe: Any) -> dict[str, Any]:
    """Return what a run depends on beside model and settings: weights, scheduler."""
    from calibatt_compiler.models import unwrap

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
