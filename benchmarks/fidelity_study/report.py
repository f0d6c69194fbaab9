"""Table, curves and record of what the study has found so far."""

from __future__ import annotations

import datetime
import json
import math
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
from fidelity_study.methods import ORACLE, OURS, RANDOM, ROUTER
from fidelity_study.study import Study

from calibatt_compiler.evaluation.comparison import device_name, versions
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


def record(study: Study) -> dict[str, Any]:
    """Return everything as plain values."""
    setting = study.setting
    return {
        "schema": 1,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": str(getattr(study.pipe, "name_or_path", None) or type(study.pipe).__name__),
        "device": device_name(torch.device(study.pipe._execution_device)),
        "dtype": str(study.pipe.transformer.dtype),
        "python": platform.python_version(),
        "versions": versions(),
        "arguments": {name: repr(value) for name, value in setting.arguments.items()},
        "block": setting.block,
        "thresholds": {"C": setting.C, "k": setting.k, "rho": setting.rho},
        "calibration_prompts": len(setting.calibration),
        "held_out": [{"prompt": case.prompt, "seed": case.seed} for case in setting.held_out],
        "methods": {method: setting.title(method) for method in setting.methods},
        "means": {
            f"{density:g}": {
                method: {
                    metric: value if value is None or math.isfinite(value) else "equal"
                    for metric in (*METRICS, "density")
                    for value in [mean(study, method, density, metric)]
                }
                for method in setting.methods
            }
            for density in setting.densities
        },
        "peers_budget": "the same at each step" if setting.even else "our plan's, step by step",
        "absent": dict(study.absent),
        "videos": dict(study.results),
        "complete": not study.missing(),
    }


def write(study: Study) -> None:
    """Write fidelity.json, .md and .png, or fidelity-even.*, into the study's folder."""
    name = "fidelity-even" if study.setting.even else "fidelity"
    text = json.dumps(record(study), indent=1, allow_nan=False)
    write_text(study.folder / f"{name}.json", text + "\n")
    write_text(study.folder / f"{name}.md", table(study) + "\n")
    draw(study, study.folder / f"{name}.png")
