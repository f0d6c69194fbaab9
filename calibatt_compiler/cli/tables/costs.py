"""What a calibration will cost, as a table for the terminal."""

from __future__ import annotations

from rich.table import Table

from calibatt_compiler.calibration.cost.estimate import Estimate


def terminal(estimate: Estimate) -> Table:
    """Return the figures and how each was found, to be printed with rich."""
    measured = estimate.measured
    device = measured.device_bytes
    todo = estimate.inputs - estimate.finished
    scored = (
        f" + {estimate.steps} x {duration(measured.scoring_seconds)} for {estimate.scored} that "
        "are scored for repetition"
        if estimate.scored
        else ""
    )
    shared = f", shared by {estimate.processes} processes" if estimate.processes > 1 else ""
    survey = (
        f" + {duration(estimate.survey_seconds)} to survey token orders"
        if estimate.survey_seconds
        else ""
    )
    written = (
        f"; each input writes {size(estimate.input_bytes)} of sums, over those of the one before"
        if estimate.input_bytes
        else ""
    )
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(
        "time",
        f"about {duration(estimate.seconds)}",
        f"{todo} inputs x ({duration(measured.input_seconds)} + {estimate.steps} steps x "
        f"{duration(measured.step_seconds)}){scored} + {duration(measured.warm_up_seconds)} to "
        "compile"
        f"{shared}{survey}; measured on one step; {estimate.finished} of {estimate.inputs} inputs "
        "are done already",
    )
    if device is not None:
        table.add_row(
            "GPU memory",
            f"at most {size(estimate.device_bytes)}",
            "beside model and generation, from the shapes of "
            f"{estimate.sites} attention calls; with both, {size(device)} in the measured step",
        )
    table.add_row(
        "host memory",
        f"at most {size(estimate.host_bytes)}",
        "beside model and generation, from shapes: "
        + ("sums of" if estimate.input_bytes else "the masks of")
        + " one input, then the plan",
    )
    table.add_row(
        "disk",
        size(estimate.disk_bytes),
        f"from shapes: {size(estimate.run_bytes)} of finished inputs, at most "
        f"{size(estimate.plan_bytes)} of plan{written}",
    )
    return table


def duration(seconds: float) -> str:
    """Write a time with its unit, to about two digits."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def size(count: int) -> str:
    """Write a number of bytes with a binary unit, to three digits."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1000:
            break
        value, unit = value / 1024, larger
    return f"{value:.3g} {unit}"
