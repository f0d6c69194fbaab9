"""What a comparison found: results of each plan, times, and how they were taken."""

from __future__ import annotations

import datetime
import math
import os
import platform
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from calibatt_compiler.evaluation.quality import Quality
from calibatt_compiler.evaluation.timing import StepTimes
from calibatt_compiler.options import Lowering
from calibatt_compiler.plan import Plan
from calibatt_compiler.report.summary import Summary

DENSE = "dense"
DenseKind = Literal["inductor", "eager"]
PACKAGES = ("calibatt", "torch", "triton", "diffusers", "transformers", "numpy")


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
        component: which module of the pipeline the plans are for; others stay as they are.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    dense: DenseKind = "inductor"
    lowering: Lowering = "baked"
    rounds: int = 5
    timed_steps: int = 6
    further_cases: int | None = None
    component: str = "transformer"


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
            "component": self.config.component,
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
