"""Dense against sparse: the same prompts and seeds, quality and time side by side."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import nn

from calibatt_compiler.build import PlanSpecs, build_for_device
from calibatt_compiler.errors import CalibattError, PipelineError
from calibatt_compiler.evaluation.cases import Case
from calibatt_compiler.evaluation.comparison import (
    DENSE,
    Comparison,
    ComparisonConfig,
    PlanResult,
    VideoResult,
    device_name,
)
from calibatt_compiler.evaluation.quality import Frames, Quality, measure
from calibatt_compiler.evaluation.timing import DenoisingStep, spread, time_steps, watching
from calibatt_compiler.kernels.portable.tiles import architecture
from calibatt_compiler.plan import Plan
from calibatt_compiler.report.summary import summary


class Progress(Protocol):
    """Receives how far a comparison has come."""

    def start(self, what: str, total: int | None) -> None:
        """Begin something of `total` parts; None if nobody knows how many."""

    def advance(self) -> None:
        """One part of it is done."""


class Silent:
    """Progress that nobody watches."""

    def start(self, what: str, total: int | None) -> None:
        """Ignore it."""

    def advance(self) -> None:
        """Ignore it."""


class _FirstStepDone(Exception):  # noqa: N818 - not an error: how a warm-up ends
    pass


class Comparer:
    """Generates and times videos of one pipeline under several compiled models."""

    def __init__(self, pipe: Any, config: ComparisonConfig, progress: Progress) -> None:
        self._pipe = pipe
        self._config = config
        self._progress = progress
        self._model: nn.Module = _component(pipe, config.component)

    def dense(self) -> nn.Module:
        """Return the model that the sparse ones are measured against."""
        if self._config.dense == "eager":
            return self._model
        return _compile(self._model)

    def sparse(self, plan: Plan) -> nn.Module:
        """Return the model compiled with a plan; a size that the plan does not fit is an error."""
        options: dict[str, Any] = {
            "plan": plan,
            "lowering": self._config.lowering,
            "on_mismatch": "error",
        }
        return _compile(self._model, backend="calibatt", options=options)

    def warm_up(self, module: nn.Module, case: Case) -> None:
        """Compile a model by running the first denoising step of a video."""

        def stop_after_first(step: int) -> None:
            if step:
                raise _FirstStepDone

        with suppress(_FirstStepDone), watching(module, stop_after_first):
            self._frames(module, case)

    def video(
        self, module: nn.Module, case: Case, *, keep: bool = False
    ) -> tuple[Frames, float, list[DenoisingStep]]:
        """Generate one video.

        Returns:
            uint8 (frames, height, width, 3); seconds; the steps' inputs if `keep`.
        """
        with watching(module, lambda _: self._progress.advance(), keep=keep) as watch:
            start = time.perf_counter()
            frames = self._frames(module, case)
            seconds = time.perf_counter() - start
        return frames, seconds, watch.steps

    def _frames(self, module: nn.Module, case: Case) -> Frames:
        generator = torch.Generator("cpu").manual_seed(case.seed)
        setattr(self._pipe, self._config.component, module)
        try:
            output = self._pipe(
                prompt=case.prompt,
                generator=generator,
                output_type="np",
                **self._config.arguments,
            )
        except (CalibattError, _FirstStepDone):
            raise
        except Exception as error:
            raise PipelineError(
                f"{type(self._pipe).__name__} failed",
                expected="a pipeline that makes a video of these prompts and arguments",
                got=f"{type(error).__name__}: {error}",
                remedy="check height, width, frames and what was given with --set",
            ) from error
        finally:
            setattr(self._pipe, self._config.component, self._model)
        return to_bytes(np.asarray(output.frames[0]))


OnVideo = Callable[[int, Case, Frames, Frames, Quality], None]


def compare(
    pipe: Any,
    cases: Sequence[Case],
    plans: Mapping[str, Plan],
    config: ComparisonConfig,
    *,
    progress: Progress | None = None,
    on_video: OnVideo | None = None,
) -> Comparison:
    """Generate videos dense and sparse from the same prompts and seeds; measure quality and time.

    Args:
        pipe: a diffusers pipeline, on its device.
        cases: prompts and seeds; better none that the plans were calibrated on.
        plans: by label; the first is the main one.
        config: how.
        progress: receives how far it has come.
        on_video: given each case's index, the case, the dense frames, the main plan's frames, and
            their quality: to write the videos, of which none is kept in memory.

    Raises:
        PlanMismatchError: a plan does not fit the model or the size of the video.
        PipelineError: no cases or plans, no such component, or the pipeline refuses its arguments.
    """
    if not cases or not plans or DENSE in plans:
        raise PipelineError(
            "nothing to compare",
            expected=f"at least one prompt, and one plan not called {DENSE!r}",
            got=f"{len(cases)} prompts, plans {list(plans)}",
            remedy="give held-out prompts with --prompts",
        )
    progress = progress or Silent()
    comparer = Comparer(pipe, config, progress)
    pipe.set_progress_bar_config(disable=True)
    modules = {DENSE: comparer.dense()}
    modules |= {label: comparer.sparse(plan) for label, plan in plans.items()}
    device = torch.device(pipe._execution_device)
    if device.type == "cuda" and config.lowering == "baked":
        _build(plans, device, getattr(pipe, config.component).dtype, progress)
    progress.start("compiling", len(modules))
    for module in modules.values():
        comparer.warm_up(module, cases[0])
        progress.advance()

    further = len(cases) if config.further_cases is None else config.further_cases
    first = next(iter(plans))
    results: dict[str, list[VideoResult]] = {label: [] for label in plans}
    runs = sum(1 + (len(plans) if index < further else 1) for index in range(len(cases)))
    progress.start("generating videos", runs * plans[first].steps)
    kept: list[DenoisingStep] = []
    for index, case in enumerate(cases):
        dense, dense_seconds, steps = comparer.video(modules[DENSE], case, keep=index == 0)
        kept = steps or kept
        for label in plans:
            if label != first and index >= further:
                continue
            frames, seconds, _ = comparer.video(modules[label], case)
            quality = measure(dense, frames, device)
            results[label].append(
                VideoResult(case.prompt, case.seed, quality, seconds, dense_seconds)
            )
            if label == first and on_video is not None:
                on_video(index, case, dense, frames, quality)

    timed = {index: kept[index] for index in spread(len(kept), config.timed_steps)}
    progress.start("timing denoising steps", (config.rounds + 1) * len(timed))
    times = time_steps(
        modules, timed, rounds=config.rounds, device=device, on_step=progress.advance
    )
    return Comparison(
        plans=tuple(
            PlanResult(
                label=label,
                plan=plan,
                videos=tuple(results[label]),
                summary=summary(modules[label]),
                step_seconds=times.median(label),
                step_ratio=times.ratio(DENSE, label),
            )
            for label, plan in plans.items()
        ),
        times=times,
        model=str(getattr(pipe, "name_or_path", None) or type(pipe).__name__),
        config=config,
        device=device_name(device),
    )


def _component(pipe: Any, name: str) -> nn.Module:
    module = getattr(pipe, name, None)
    if not isinstance(module, nn.Module):
        names = [key for key, value in pipe.components.items() if isinstance(value, nn.Module)]
        raise PipelineError(
            f"the pipeline has no {name}",
            expected=f"one of its modules: {', '.join(names)}",
            got=f"{name}: {type(module).__name__}",
            remedy="name the transformer that the plan was made for (--component)",
        )
    return module


def _build(
    plans: Mapping[str, Plan], device: torch.device, dtype: torch.dtype, progress: Progress
) -> None:
    """Compile the plans' kernels first: a model would otherwise be timed on its stand-in kernel."""
    wanted = [PlanSpecs(plan, [architecture(device)], dtype) for plan in plans.values()]
    progress.start("compiling kernels", sum(map(len, wanted)))
    for specs in wanted:
        build_for_device(specs, lambda *_: progress.advance())


def _compile(model: nn.Module, **settings: Any) -> nn.Module:
    """Compile apart from all else: variants of one model must not share graphs or a limit.

    Dynamo would serve two equal plans from one graph, and run the ninth variant of a class eagerly.
    """
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        settings["isolate_recompiles"] = True
    return cast(nn.Module, torch.compile(model, **settings))


def to_bytes(frames: np.ndarray[Any, Any]) -> Frames:
    """Round frames in [0, 1] to 8 bits, as a video file would hold them."""
    if frames.dtype == np.uint8:
        return frames
    return (frames.clip(0, 1) * 255).round().astype(np.uint8)
