"""docs/performance.md: the figures that a user asks for, from the records.

A figure without a record names the section of the figures written by hand that has one, and its
date; it copies none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from catalogue import matching
from tables import Cells

PICTURES = ("attention", "dit_layer", "fidelity")
"""Benchmarks whose pictures are shown."""


@dataclass(frozen=True)
class Table:
    """A benchmark's table on one device, each row with what every run found."""

    device: str
    date: str
    rows: Sequence[Sequence[Cells]]


@dataclass(frozen=True)
class Earlier:
    """Where a figure is that was written by hand.

    Attributes:
        date: of the measurement.
        title: of the section in `benchmarks/results/2026-11-27.md`.
    """

    date: str
    title: str

    @property
    def link(self) -> str:
        """As Markdown."""
        kept = (letter for letter in self.title.lower() if letter.isalnum() or letter in " -_")
        anchor = "".join(kept).replace(" ", "-")
        return f"[{self.date}](../benchmarks/results/2026-11-27.md#{anchor})"


@dataclass(frozen=True)
class Figure:
    """One line of the page.

    Attributes:
        question: what a user asks.
        benchmark: that answers it.
        rows: of its table.
        column: of its table.
        unit: behind the number.
        digits: behind the point; None: four that count.
        earlier: where it was written by hand.
    """

    question: str
    benchmark: str
    rows: Callable[[Cells], bool]
    column: str
    unit: str = ""
    digits: int | None = 2
    earlier: Earlier | None = None


_ATTENTION = Earlier("2026-11-25", "Attention on an H100: `attention.py`")
_LAYER = Earlier("2026-11-25", "A layer of Wan 14B: `dit_layer.py`")
_FIDELITY = Earlier("2026-11-25", "The mid-size model")
_CALIBRATION = Earlier(
    "2026-11-25", "Calibration on an H100: `calibration_cost.py`, `calibration_memory.py`"
)
_SERVING = Earlier(
    "2026-11-27", "Serving a large plan on an H200: `plan_serving.py`, `plan_serving_model.py`"
)
_SIZE = Earlier("2026-11-23", "Plans of a large model: `plan_size.py`")

FIGURES = (
    Figure("A layer of Wan 14B at 720p, zones of density 0.20, beside stock `torch.compile`: how "
           "many times as fast?", "dit_layer",
           matching(size="720p", density="0.2", attention="zones baked"), "x stock", "x"),
    Figure("The same beside FlashAttention-3", "dit_layer",
           matching(size="720p", density="0.2", attention="zones baked"),
           "x FlashAttention-3", "x"),
    Figure("The same with masks of density 0.375", "dit_layer",
           matching(size="720p", density="0.375", attention="hopper table"),
           "x FlashAttention-3", "x", earlier=_LAYER),
    Figure("At 480p, zones of density 0.20, beside FlashAttention-3", "dit_layer",
           matching(size="480p", density="0.2", attention="zones baked"),
           "x FlashAttention-3", "x"),
    Figure("One attention call with masks of density 0.20, 480p, beside dense FlashAttention-3",
           "attention", matching(case="480p banded 0.20", kernel="hopper fixed"), "x dense", "x",
           earlier=_ATTENTION),
    Figure("The same with zones of density 0.20, 720p", "attention",
           matching(case="720p zones 0.20", kernel="hopper zones"), "x dense", "x"),
    Figure("What the portable GPU kernel makes of what is skipped (e, all masks)", "attention",
           matching(kernel="table*"), "e sustained", earlier=_ATTENTION),
    Figure("A call on a CPU, blocks of 64, beside stock SDPA, by density", "cpu_attention",
           matching(block="64", kernel="ours"), "x SDPA", "x",
           earlier=Earlier("2026-11-23", "Attention on a CPU: `cpu_attention.py`")),
    Figure("Videos of a model of 25 million parameters, zones of density 0.20, beside dense ones "
           "(median PSNR)", "fidelity",
           matching(model="mid", density="0.2", method="octave zones (ours)"),
           "median dB", " dB", 1),
    Figure("The same with the paper's masks", "fidelity",
           matching(model="mid", density="0.2", method="calibrated plan (ours)"),
           "median dB", " dB", 1,
           earlier=_FIDELITY),
    Figure("Dense attention by another kernel: the floor", "fidelity",
           matching(model="mid", density="0.2", method="dense,*"), "median dB", " dB", 1),
    Figure("A forward pass while it is calibrated, beside a dense compiled one",
           "calibration_cost", lambda cells: True, "ratio", "x", earlier=_CALIBRATION),
    Figure("Host memory of a calibration of Wan 14B at 720p", "calibration_memory",
           matching(what="host memory with the masks of 40*"), "found", " MB", 0,
           Earlier("2026-11-23", "Memory of a calibration: `calibration_memory.py --drawn`")),
    Figure("Plan file of zones, Wan 14B at 720p, 50 steps", "plan_size",
           matching(form="zones", what="file MB at 40 sites"), "found", " MB", 2),
    Figure("Time to open it, every byte checked", "plan_size",
           matching(form="zones", what="load s"), "found", " s", 2),
    Figure("Plan file of masks, Wan 14B at 720p, 50 steps", "plan_size",
           matching(form="masks", what="file MB at 40 sites"), "found", " MB", 0, _SIZE),
    Figure("Time to open it, every byte checked", "plan_size",
           matching(form="masks", what="load s"), "found", " s", 2, _SIZE),
    Figure("GPU memory of a large plan's tables while it is served", "plan_serving",
           matching(plan="masks"), "tables mb", " MB", 0, _SERVING),
    Figure("What bringing these tables costs (1: nothing)", "plan_serving",
           matching(plan="masks"), "ratio", "x", 3, _SERVING),
)  # fmt: skip

_HEAD = """\
# Performance

The figures that users ask for. Made from the records in `benchmarks/results` by `make results`;
not to be edited. Several rows or runs give the least and the greatest. All figures, with what
misses its aim, are in [benchmarks/RESULTS.md](../benchmarks/RESULTS.md). A date in the place of a
figure leads to one that was written by hand then and has no record yet.

| | figure | measured on |
|---|---|---|
"""


def page(tables: Mapping[str, Sequence[Table]]) -> str:
    """Return docs/performance.md; tables by benchmark, the newest first."""
    lines = [f"| {figure.question} | {_found(figure, tables)} |" for figure in FIGURES]
    pictures = [
        f"![{name}](../benchmarks/results/{name}/picture.svg)\n"
        for name in PICTURES
        if tables[name]
    ]
    return _HEAD + "\n".join([*lines, "", *pictures])


def _found(figure: Figure, tables: Mapping[str, Sequence[Table]]) -> str:
    for table in tables[figure.benchmark]:
        values = [
            float(cells[figure.column])
            for row in table.rows
            if figure.rows(row[-1])
            for cells in row
        ]
        if words := spread(values, figure.digits):
            return f"**{words}{figure.unit}** | {table.device}, {table.date}"
    return " | ".join(("", "not recorded yet" if figure.earlier is None else figure.earlier.link))


def spread(values: Sequence[float], digits: int | None) -> str:
    """Write the least and the greatest of numbers, or one if they look alike."""
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return ""
    low, high = (_written(value, digits) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _written(value: float, digits: int | None) -> str:
    if digits is None:
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:.{digits}f}"
