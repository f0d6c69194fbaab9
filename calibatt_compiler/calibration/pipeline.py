"""Calibration of a diffusers pipeline, in one call."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from calibatt_compiler.calibration import identity
from calibatt_compiler.calibration.config import CalibrationConfig
from calibatt_compiler.calibration.observation import Branch, Schedule
from calibatt_compiler.calibration.progress import CalibrationProgress
from calibatt_compiler.calibration.run import CalibrationRun, recording
from calibatt_compiler.errors import CalibrationError, OptionError
from calibatt_compiler.plan import Plan

log = logging.getLogger("calibatt")

Prompt = str | Mapping[str, Any]


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
    inputs = _inputs(prompts, seeds, pipeline_arguments)
    arguments = identity.describe(pipeline_arguments)
    if out is not None and config.run_folder is None:
        config = replace(config, run_folder=f"{os.fspath(out)}.calibration")
    module = _component(pipe, config.component)
    names = [f"{index:05d}" for index in range(len(inputs))]
    from calibatt_compiler.models import cfg_mode

    progress: CalibrationProgress | None = None

    def on_step(step: int, steps: int | None) -> None:
        if progress is not None:
            progress.step(step, steps)

    with (
        _quiet(pipe),
        _in_place(pipe, config.component, module),
        recording(
            module,
            config,
            _about(pipe),
            cfg=cfg_mode(pipe),
            arguments=arguments,
            schedule=lambda: _schedule(pipe.scheduler),
            on_step=on_step,
        ) as run,
    ):
        done = sum(run.has(name) for name in names)
        with (
            CalibrationProgress(len(names), done, config.progress) as progress,
            _branches(module, run),
        ):
            for name, (seed, varying) in zip(names, inputs, strict=True):
                # Entered even if the input is stored: that checks that it is the same input.
                about = {"seed": seed, **varying}
                stored = run.has(name)
                with run.input(name, about=about, samples=_samples(pipeline_arguments)):
                    if not stored:
                        _generate(pipe, seed, {**pipeline_arguments, **varying})
                if not stored:
                    progress.finished()
        plan = run.plan(names=tuple(names))
        if out is not None:
            plan.save(out)
        if out is not None and not config.keep_run:
            run.discard()
    log.info("calibrated on %d inputs: %r", len(names), plan)
    return plan


def _inputs(
    prompts: Sequence[Prompt], seeds: int | Sequence[int], arguments: Mapping[str, Any]
) -> list[tuple[int, dict[str, Any]]]:
    if isinstance(prompts, (str, Mapping)) or not prompts:
        raise OptionError(
            "calibration needs prompts",
            expected="a list of at least one prompt",
            got=repr(prompts),
            remedy='pass prompts=["...", "..."]; the paper takes 16 to 64 of them',
        )
    taken = {"prompt", "generator", "callback_on_step_end"} & set(arguments)
    if taken:
        raise OptionError(
            f"calibration sets {', '.join(sorted(taken))} itself",
            expected="arguments that all inputs share: size, steps, guidance",
            got=sorted(arguments),
            remedy="use prompts=... and seeds=...; arguments that differ between inputs go into "
            'prompts as mappings: {"prompt": ..., "image": ...}',
        )
    if isinstance(seeds, bool) or not isinstance(seeds, (int, Sequence)):
        raise OptionError(
            "seeds are not usable",
            expected="an integer, or one for each prompt",
            got=repr(seeds),
            remedy="pass seeds=0",
        )
    numbers = [seeds + i for i in range(len(prompts))] if isinstance(seeds, int) else list(seeds)
    if len(numbers) != len(prompts):
        raise OptionError(
            "seeds don't match the prompts",
            expected=f"{len(prompts)} seeds, or one number",
            got=f"{len(numbers)} seeds",
            remedy="pass one seed for each prompt; repeat a prompt to use it with several seeds",
        )
    varying = [{"prompt": p} if isinstance(p, str) else dict(p) for p in prompts]
    return list(zip(numbers, varying, strict=True))


def _component(pipe: Any, name: str) -> torch.nn.Module:
    from calibatt_compiler.models import unwrap

    module = getattr(pipe, name, None)
    scheduler = getattr(pipe, "scheduler", None)
    if not isinstance(module, torch.nn.Module) or scheduler is None or not callable(pipe):
        raise CalibrationError(
            f"{type(pipe).__name__} can't be calibrated",
            expected=f"a diffusers pipeline with a scheduler and a module {name!r}",
            got=f"{name}: {type(module).__name__}, scheduler: {type(scheduler).__name__}",
            remedy="name the denoiser with CalibrationConfig(component=...), or use "
            "calibatt_compiler.calibration(module) for a module without a pipeline",
        )
    return unwrap(module)


def _about(pipe: Any) -> dict[str, Any]:
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


def _schedule(scheduler: Any) -> Schedule | None:
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None or len(timesteps) == 0:
        return None
    values = [float(value) for value in timesteps]
    distinct = tuple(dict.fromkeys(values))
    sigmas = getattr(scheduler, "sigmas", None)
    levels: tuple[float, ...] | None = None
    if sigmas is not None and len(sigmas) in (len(values), len(values) + 1):
        levels = tuple(float(sigmas[values.index(value)]) for value in distinct)
    return Schedule(timesteps=distinct, sigmas=levels, name=type(scheduler).__name__)


def _samples(arguments: Mapping[str, Any]) -> int:
    return int(arguments.get("num_videos_per_prompt") or 1)


def _generate(pipe: Any, seed: int, arguments: Mapping[str, Any]) -> None:
    generator = torch.Generator("cpu").manual_seed(seed)
    pipe(**{"output_type": "latent", **arguments}, generator=generator)


@contextmanager
def _branches(module: torch.nn.Module, run: CalibrationRun) -> Iterator[None]:
    """Learn each call's branch from the `cache_context` that diffusers pipelines enter."""
    original = getattr(module, "cache_context", None)

    @contextmanager
    def cache_context(name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        with original(name, *args, **kwargs), run.branch(branch_of(name)):  # type: ignore[misc]
            yield

    with run.branch("unknown"):
        if original is None:
            log.info(
                "%s has no cache_context: the first call at each timestep is taken for the "
                "conditional branch",
                type(module).__name__,
            )
            yield
            return
        object.__setattr__(module, "cache_context", cache_context)
        try:
            yield
        finally:
            object.__delattr__(module, "cache_context")


def branch_of(context: str) -> Branch:
    """Return the branch that a diffusers cache context stands for.

    The names in use are `cond`, `uncond`, `cond_uncond` (one batch of both) and, with guiders,
    `pred_cond`, `pred_uncond`; other `uncond_*` are perturbed branches, which are not observed.
    """
    if context == "cond_uncond":
        return "batched"
    return "unconditional" if "uncond" in context else "conditional"


@contextmanager
def _in_place(pipe: Any, name: str, module: torch.nn.Module) -> Iterator[None]:
    """Let the pipeline call the module itself where it holds a compiled wrapper of it."""
    held = getattr(pipe, name)
    if held is module:
        yield
        return
    setattr(pipe, name, module)
    try:
        yield
    finally:
        setattr(pipe, name, held)


@contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """Turn the pipeline's own progress bar off."""
    missing = object()
    previous = getattr(pipe, "_progress_bar_config", missing)
    if not hasattr(pipe, "set_progress_bar_config"):
        yield
        return
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        if previous is missing:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = previous
