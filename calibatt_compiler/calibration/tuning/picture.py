"""The picture of a search: fidelity against predicted speed-up."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from calibatt_compiler.errors import PipelineError
from calibatt_compiler.files import replacing

if TYPE_CHECKING:
    from calibatt_compiler.calibration.tuning.pareto import Tuning

_INK, _SOFT, _ACCENT, _SECOND = "#27272a", "#a1a1aa", "#4f46e5", "#d97706"


def write_front(tuning: Tuning, path: str | os.PathLike[str]) -> Path:
    """Draw all trials, their Pareto front as a line, and the chosen point, ringed.

    Raises:
        PipelineError: matplotlib is not installed.
        FileError: the file can't be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PipelineError(
            "the picture needs a package that is not installed",
            expected="matplotlib",
            got="no such module",
            remedy='pip install "calibatt[tune]"',
        ) from error
    figure = Figure(figsize=(7.6, 4.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    faster = tuning.times.speed_up
    front = tuning.front
    axes.scatter(
        [faster(point.cost) for point in tuning.points],
        [point.fidelity for point in tuning.points],
        color=_SOFT,
        s=18,
        label=f"{len(tuning.points)} trials",
    )
    axes.plot(
        [faster(point.cost) for point in front],
        [point.fidelity for point in front],
        marker="o",
        markersize=5,
        color=_ACCENT,
        linewidth=2,
        label="Pareto front",
    )
    if tuning.chosen is not None:
        values = tuning.chosen.settings.shown().items()
        axes.scatter(
            [faster(tuning.chosen.cost)],
            [tuning.chosen.fidelity],
            s=170,
            facecolors="none",
            edgecolors=_SECOND,
            linewidths=2,
            label="chosen: " + ", ".join(f"{name} {value}" for name, value in values if value),
        )
    axes.set_xlabel("predicted speed-up of a denoising step")
    axes.set_ylabel(
        "share of attention mass kept" if tuning.proxy else "PSNR against dense, dB", color=_INK
    )
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.2f}x")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK, labelsize=9)
    axes.margins(0.08)
    axes.legend(frameon=False, fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary)
    return Path(path)
