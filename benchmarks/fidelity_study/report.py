"""Table, curves and record of what the study has found so far."""

from __future__ import annotations

import math
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
from fidelity_study.methods import ORACLE, OURS, RANDOM, ROUTER
from fidelity_study.setting import name_of
from fidelity_study.study import Study
from record import write_record

from calibatt_compiler.files import replacing, write_text

METRICS = {
    "psnr": ("PSNR, dB", ".2f"),
    "ssim": ("SSIM", ".4f"),
    "perceptual": ("DINOv2 distance", ".4f"),
    "flicker": ("flicker, 8-bit levels", ".2f"),
}
"""Titles and formats; higher is better for the first two, lower for the others."""


def mean(study: Study, method: str, density: float, metric: str) -> float | None:
    """Return the mean over the videos measured, None if there is none.

    Equal videos, whose PSNR is infinite, make it infinite.
    """
    setting = study.setting
    keys = [setting.key(method, density, case) for case in setting.held_out]
    rows = [study.results[key] for key in keys if key in study.results]
    values = [row[metric] for row in rows]
    if metric == "psnr" and rows and None in values:
        return math.inf
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def table(study: Study) -> str:
    """Return the means over the prompts as Markdown, one row a method and density."""
    heads = ["density", "method", *(title for title, _ in METRICS.values()), "measured density"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for density in study.setting.densities:
        for method in study.setting.methods:
            if mean(study, method, density, "ssim") is None:
                continue
            cells = [
                _cell(mean(study, method, density, metric), form)
                for metric, (_, form) in METRICS.items()
            ]
            found = _cell(mean(study, method, density, "density"), ".3f")
            title = study.setting.title(method)
            lines.append(f"| {density:g} | {title} | {' | '.join(cells)} | {found} |")
    return "\n".join(lines)


def _cell(value: float | None, form: str) -> str:
    if value is None:
        return ""
    return format(value, form) if math.isfinite(value) else "equal"


def draw(study: Study, path: Path) -> None:
    """Write a picture: each metric over density, one line a method."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 8.6), sharex=True, layout="constrained")
    colours = plt.get_cmap("tab10")
    for axis, (metric, (title, _)) in zip(axes.flat, METRICS.items(), strict=True):
        for number, method in enumerate(study.setting.methods):
            points = [
                (found, value)
                for density in sorted(study.setting.densities)
                if (found := mean(study, method, density, "density")) is not None
                and (value := mean(study, method, density, metric)) is not None
                and math.isfinite(value)
            ]
            axis.plot(
                [x for x, _ in points],
                [y for _, y in points],
                "--" if method in {ORACLE, ROUTER, RANDOM} else "-",
                marker="o",
                markersize=3,
                linewidth=2.5 if method == OURS else 1.3,
                color=colours(number),
                label=study.setting.title(method),
            )
        axis.set(ylabel=title)
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set(xlabel="density (key work / that of dense attention)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)


def rows(study: Study) -> list[dict[str, Any]]:
    """Return a row for each density and method measured: means and PSNR by video.

    A PSNR of None is that of equal videos.
    """
    setting, found = study.setting, []
    for density in setting.densities:
        for method in setting.methods:
            keys = {name_of(c): setting.key(method, density, c) for c in setting.held_out}
            videos = {
                case: study.results[key]["psnr"]
                for case, key in keys.items()
                if key in study.results
            }
            if not videos:
                continue
            means = {metric: mean(study, method, density, metric) for metric in METRICS}
            psnr = means["psnr"]
            found.append(
                {
                    "model": model_name(study),
                    "density": density,
                    "name": method,
                    "method": setting.title(method),
                    **means,
                    "psnr": psnr if psnr is not None and math.isfinite(psnr) else None,
                    "measured_density": mean(study, method, density, "density"),
                    "by_video": videos,
                }
            )
    return found


def model_name(study: Study) -> str:
    """Return a model's name without the folder where it lies."""
    path = Path(str(getattr(study.pipe, "name_or_path", "") or type(study.pipe).__name__))
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def settings(study: Study) -> dict[str, Any]:
    """Return what all rows have in common."""
    setting = study.setting
    return {
        "dtype": str(study.pipe.transformer.dtype),
        "python": platform.python_version(),
        "arguments": {name: repr(value) for name, value in setting.arguments.items()},
        "block": setting.block,
        "thresholds": {"C": setting.C, "k": setting.k, "rho": setting.rho},
        "calibration_prompts": len(setting.calibration),
        "held_out": [{"prompt": case.prompt, "seed": case.seed} for case in setting.held_out],
        "peers_budget": "the same at each step" if setting.even else "our plan's, step by step",
        "absent": dict(study.absent),
        "complete": not study.missing(),
    }


def write(study: Study, *, check: bool = False) -> None:
    """Write fidelity.json, .md and .png, or fidelity-even.*, into the study's folder."""
    name = "fidelity-even" if study.setting.even else "fidelity"
    device = torch.device(study.pipe._execution_device)
    write_record(
        study.folder / f"{name}.json",
        device,
        rows(study),
        benchmark="fidelity",
        check=check,
        **settings(study),
    )
    write_text(study.folder / f"{name}.md", table(study) + "\n")
    draw(study, study.folder / f"{name}.png")
