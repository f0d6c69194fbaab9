"""The picture of quality against sparsity."""

from __future__ import annotations

import math
import os
from pathlib import Path

from calibatt_compiler.errors import PipelineError
from calibatt_compiler.evaluation.comparison import Comparison
from calibatt_compiler.files import replacing

GOAL_DB = 30
_INK, _SOFT, _ACCENT, _SECOND = "#27272a", "#a1a1aa", "#4f46e5", "#d97706"


def write_curve(comparison: Comparison, path: str | os.PathLike[str]) -> Path:
    """Draw PSNR (left axis) and speed-up of a denoising step (right) against sparsity.

    Each plan is one point of either line, marked with its label; equal videos (infinite PSNR)
    have no point. Plans of one form make a line; those of another form than the main plan's, such
    as without its weights, have hollow marks.

    Raises:
        PipelineError: matplotlib is not installed.
        OSError: the folder can't be written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter
    except ImportError as error:
        raise PipelineError(
            "the curve needs a package that is not installed",
            expected="matplotlib",
            got="no such module",
            remedy='pip install "calibatt[report]"',
        ) from error
    results = sorted(comparison.plans, key=lambda result: result.sparsity)
    figure = Figure(figsize=(7.6, 4.4), dpi=150, layout="constrained")
    left = figure.add_subplot()
    right = left.twinx()
    shown = [result for result in results if math.isfinite(result.psnr)]
    left.axhline(GOAL_DB, color=_SOFT, linewidth=1, linestyle=(0, (4, 4)), zorder=0)
    main = comparison.main.plan.metadata.requires
    for form in sorted({result.plan.metadata.requires for result in results}):
        hollow = form != main
        alike = [result for result in results if result.plan.metadata.requires == form]
        finite = [result for result in alike if result in shown]
        left.plot(
            [result.sparsity for result in finite],
            [result.psnr for result in finite],
            marker="o",
            color=_ACCENT,
            linewidth=2,
            markerfacecolor="white" if hollow else _ACCENT,
        )
        right.plot(
            [result.sparsity for result in alike],
            [result.step_ratio for result in alike],
            marker="s",
            markersize=5,
            color=_SECOND,
            linewidth=1.5,
            linestyle=(0, (5, 2)),
            markerfacecolor="white" if hollow else _SECOND,
        )
    for result in shown:
        left.annotate(
            result.label,
            (result.sparsity, result.psnr),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=_INK,
        )
    left.margins(x=0.1, y=0.18)
    right.margins(y=0.18)
    left.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    left.set_xlabel("sparsity: attention blocks left out")
    left.set_ylabel("PSNR against dense, dB", color=_ACCENT)
    right.set_ylabel("speed-up of a denoising step", color=_SECOND)
    right.yaxis.set_major_formatter(lambda value, _: f"{value:.2f}x")
    left.set_title(f"{comparison.device}", fontsize=9, color=_SOFT, loc="left")
    for axes in (left, right):
        axes.spines["top"].set_visible(False)
        axes.tick_params(colors=_INK, labelsize=9)
    with replacing(path) as temporary:
        figure.savefig(temporary)
    return Path(path)
