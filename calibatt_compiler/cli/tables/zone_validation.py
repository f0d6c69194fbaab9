"""The output error of a plan of zones on held-out inputs, as a table for the terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table

from calibatt_compiler.calibration.validation.output_error import (
    SiteZoneValidation,
    ZoneValidation,
)
from calibatt_compiler.printable import printable


def terminal(validation: ZoneValidation) -> RenderableType:
    """Return the figures of each site and which are flagged, to be printed with rich."""
    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        padding=(0, 1, 0, 0),
        caption="error that the draw gives a row's attention output, relative to it: root of the "
        "mean square over inputs, steps, heads and query blocks; what the plan expected of its "
        "calibration inputs; at the worst step; of the worst input at any step; of the worst head "
        "at any step; of the worst query block",
    )
    table.add_column("site", overflow="fold")
    for name in ("error", "expected", "worst step", "worst input", "worst head", "worst row", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for site in validation.sites:
        table.add_row(*_row(site, flagged=site in validation.flagged))
    return Group(table, "", *_words(validation))


def _row(site: SiteZoneValidation, *, flagged: bool) -> list[str]:
    return [
        printable(site.site),
        f"{site.error:.4f}",
        _figure(site.expected),
        f"{max(site.errors):.4f} ({site.worst_step})",
        _figure(site.worst_input),
        f"{site.worst_head:.4f}",
        _figure(site.worst_row),
        "flagged" if flagged else "",
    ]


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _words(validation: ZoneValidation) -> list[str]:
    words = [f"{validation.inputs} inputs, relative output error {validation.error:.4f}"]
    if any(site.worst_row is None for site in validation.sites):
        words.append(
            "measured on sums over the inputs and steps of a group: for the worst input and query "
            "block, run the model (--validate MODEL) or keep energies (--keep-energies)"
        )
    if not validation.held_out:
        words.append("these are the inputs that the plan was made from: this validates nothing")
    if all(site.expected is None for site in validation.sites):
        words.append("the plan records no expected error of its sites, so none can be flagged")
    elif validation.flagged:
        words.append(
            f"{len(validation.flagged)} of {len(validation.sites)} sites do not generalise: their "
            f"error is above the expected one by more than {validation.margin:g} of it"
        )
    else:
        words.append(f"every site has the error expected of it within {validation.margin:g} of it")
    return words
