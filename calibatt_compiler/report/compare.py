"""Dense against sparse: the same prompts and seeds, quality and time side by side."""

from __future__ import annotations

import datetime
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import nn

from calibatt_compiler.errors import PipelineError
from calibatt_compiler.options import Lowering
from calibatt_compiler.plan import Plan
from calibatt_compiler.report.cases import Case
from calibatt_compiler.report.quality import Frames, Quality, measure
from calibatt_compiler.report.summary import Summary, summary
from calibatt_compiler.report.timing import DenoisingStep, StepTimes, spread, time_steps, watching

DENSE = "dense"
DenseKind = Literal["inductor", "eager"]
PACKAGES = ("calibatt", "torch", "triton", "diffusers", "transformers", "numpy")


class Progress(Protocol):
    """What is told how far a comparison has come."""

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


@dataclass(frozen=True)
class ComparisonConfig:
    """How to compare.

    Attributes:
        arguments: handed to the pipeline with each prompt: height, width, guidance_scale, ...
        dense: what the sparse model is measured against: stock `torch.compile` (Inductor), or
            eager PyTorch.
        lowering: of the sparse models.
        rounds: how often each step is timed; at least 5.
        timed_steps: how many steps of the schedule are timed.
        further_cases: how many cases the plans after the first are run on. Default: all.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    dense: DenseKind = "inductor"
    lowering: Lowering = "baked"
    rounds: int = 5
    timed_steps: int = 6
    further_cases: int | None = None


@dataclass(frozen=True)
class VideoResult:
    """One case under one plan, against the dense video of the same case."""

    prompt: str
    seed: int
    quality: Quality
    seconds: float
    dense_seconds: float


@dataclass(frozen=True)
class PlanResult:
    """All that was measured of one plan.

    Attributes:
        label: what the plan is called here.
        plan: the plan.
        videos: one a case.
        summary: what the backend did with the model.
        step_seconds: median seconds of a denoising step.
        step_ratio: dense time / sparse time of a step, median over the rounds.
    """

    label: str
    plan: Plan
    videos: tuple[VideoResult, ...]
    summary: Summary
    step_seconds: float
    step_ratio: float

    @property
    def psnr(self) -> float:
        """Mean PSNR over the videos, dB."""
        return statistics.fmean(video.quality.psnr for video in self.videos)

    @property
    def ssim(self) -> float:
        """Mean SSIM over the videos."""
        return statistics.fmean(video.quality.ssim for video in self.videos)

    @property
    def flicker(self) -> float:
        """Mean flicker over the videos, 8-bit levels."""
        return statistics.fmean(video.quality.flicker for video in self.videos)

    @property
    def sparsity(self) -> float:
        """Share of blocks that the plan leaves out."""
        return 1 - self.plan.density()

    @property
    def video_ratio(self) -> float:
        """Dense time / sparse time of whole videos, text encoder and VAE included."""
        dense = sum(video.dense_seconds for video in self.videos)
        return dense / sum(video.seconds for video in self.videos)

    @property
    def computed_density(self) -> float | None:
        """Density of what the kernels compute: that of the plan, or above it where covered."""
        found = [row.computed_density for row in self.summary.rows]
        known = [value for value in found if value is not None]
        return statistics.fmean(known) if known else None


@dataclass(frozen=True)
class Comparison:
    """Dense against one or more plans; the first plan is the main one."""

    plans: tuple[PlanResult, ...]
    times: StepTimes
    model: str
    config: ComparisonConfig
    device: str

    @property
    def main(self) -> PlanResult:
        """Result of the first plan."""
        return self.plans[0]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values; an infinite PSNR is the text `inf`."""
        return {
            "schema": 1,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "model": self.model,
            "device": self.device,
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "versions": versions(),
            "dense": self.config.dense,
            "lowering": self.config.lowering,
            "pipeline_arguments": {key: repr(v) for key, v in self.config.arguments.items()},
            "denoising_step": {
                "rounds": self.config.rounds,
                "steps": self.times.steps,
                "dense_seconds": self.times.median(DENSE),
                "dense_seconds_by_step": self.times.by_step(DENSE),
                "seconds": self.times.seconds,
            },
            "plans": [self._plan_dict(result) for result in self.plans],
        }

    def _plan_dict(self, result: PlanResult) -> dict[str, Any]:
        return {
            "label": result.label,
            "digest": result.plan.digest,
            "thresholds": dict(result.plan.metadata.thresholds),
            "density": result.plan.density(),
            "computed_density": result.computed_density,
            "sparsity": result.sparsity,
            "psnr": _finite(result.psnr),
            "ssim": result.ssim,
            "flicker": result.flicker,
            "step_seconds": result.step_seconds,
            "step_seconds_by_step": self.times.by_step(result.label),
            "step_ratio": result.step_ratio,
            "video_ratio": result.video_ratio,
            "videos": [
                {**asdict(video), "quality": _quality_dict(video.quality)}
                for video in result.videos
            ],
            "summary": result.summary.to_dict(),
        }


class _FirstStepDone(Exception):  # noqa: N818 - not an error: how a warm-up ends
    pass


class Comparer:
    """Generates and times videos of one pipeline under several compiled models."""

    def __init__(self, pipe: Any, config: ComparisonConfig, progress: Progress) -> None:
        self._pipe = pipe
        self._config = config
        self._progress = progress
        self._model: nn.Module = pipe.transformer

    def dense(self) -> nn.Module:
        """Return the model that the sparse ones are measured against."""
        if self._config.dense == "eager":
            return self._model
        compiled: nn.Module = torch.compile(self._model)
        return compiled

    def sparse(self, plan: Plan) -> nn.Module:
        """Return the model compiled with a plan; a size that the plan does not fit is an error."""
        options: dict[str, Any] = {
            "plan": plan,
            "lowering": self._config.lowering,
            "on_mismatch": "error",
        }
        compiled: nn.Module = torch.compile(self._model, backend="calibatt", options=options)
        return compiled

    def warm_up(self, module: nn.Module, case: Case) -> None:
        """Compile a model by running the first denoising step of a video."""

        def stop_after_first(step: int) -> None:
            if step:
                raise _FirstStepDone

        try:
            with watching(module, stop_after_first):
                self._frames(module, case)
        except _FirstStepDone:
            pass

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
        self._pipe.transformer = module
        try:
            output = self._pipe(
                prompt=case.prompt,
                generator=generator,
                output_type="np",
                **self._config.arguments,
            )
        except (TypeError, ValueError) as error:
            raise PipelineError(
                f"{type(self._pipe).__name__} refused its arguments",
                expected="arguments of its __call__",
                got=f"{error}",
                remedy="check height, width, frames and what was given with --set",
            ) from error
        finally:
            self._pipe.transformer = self._model
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
        pipe: a diffusers pipeline with a `transformer`, on its device.
        cases: prompts and seeds; better none that the plans were calibrated on.
        plans: by label; the first is the main one.
        config: how.
        progress: told how far it has come.
        on_video: given each case's index, the case, the dense frames, the main plan's frames, and
            their quality: to write the videos, of which none is kept in memory.

    Raises:
        PlanMismatchError: a plan does not fit the model or the size of the video.
        PipelineError: no cases or plans, or the pipeline refuses its arguments.
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
            quality = measure(dense, frames)
            results[label].append(
                VideoResult(case.prompt, case.seed, quality, seconds, dense_seconds)
            )
            if label == first and on_video is not None:
                on_video(index, case, dense, frames, quality)

    timed = {index: kept[index] for index in spread(len(kept), config.timed_steps)}
    progress.start("timing denoising steps", (config.rounds + 1) * len(timed))
    device = torch.device(pipe._execution_device)
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


def to_bytes(frames: np.ndarray[Any, Any]) -> Frames:
    """Round frames in [0, 1] to 8 bits, as a video file would hold them."""
    if frames.dtype == np.uint8:
        return frames
    return (frames.clip(0, 1) * 255).round().astype(np.uint8)


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of the machine's processor and the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def versions() -> dict[str, str]:
    """Versions of the packages that a measurement depends on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _quality_dict(quality: Quality) -> dict[str, float | str]:
    return {"psnr": _finite(quality.psnr), "ssim": quality.ssim, "flicker": quality.flicker}


def _finite(value: float) -> float | str:
    # JSON knows no infinity: equal videos.
    return value if math.isfinite(value) else "inf"
