"""What a search will cost, and what it found, for the terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table

from calibatt_compiler.calibration.tuning.pareto import Tuning
from calibatt_compiler.calibration.tuning.tune import TuningCost
from calibatt_compiler.cli.tables.costs import duration, size


def cost_table(cost: TuningCost) -> Table:
    """Return what a search will cost and how that was found."""
    recording = cost.recording
    kept, source = ("sums", "sums") if cost.zoned else ("masks and energies", "energies")
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(
        "recording",
        f"about {duration(recording.seconds)}",
        f"{recording.inputs - recording.finished} inputs to run, {recording.finished} done; "
        f"{size(recording.run_bytes)} of {kept} on disk",
    )
    each = f"{cost.videos} videos x {duration(cost.video_seconds)}" if cost.videos else "no video"
    table.add_row(
        "trials",
        f"about {duration(cost.trials * cost.trial_seconds)}",
        f"{cost.trials} trials x {duration(cost.trial_seconds)} ({each}); decoding, and making "
        f"each plan from {size(recording.run_bytes)} of {source}, come on top",
    )
    table.add_row(
        "in all",
        f"about {duration(cost.seconds)}",
        "with dense videos and measuring the time of steps; from one step, measured",
    )
    return table


def front_table(tuning: Tuning) -> Table:
    """Return the points of the front, the chosen one marked."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    fidelity = "mass kept" if tuning.proxy else "PSNR, dB"
    for heading in ("", fidelity, "speed-up", "density", *tuning.points[0].settings.shown()):
        table.add_column(heading, justify="right", no_wrap=True)
    for point in tuning.front:
        table.add_row(
            "chosen" if point == tuning.chosen else "",
            f"{point.fidelity:.4f}" if tuning.proxy else f"{point.fidelity:.2f}",
            f"{tuning.times.speed_up(point.cost):.2f}x",
            f"{point.density:.3f}",
            *point.settings.shown().values(),
        )
    return table
