"""What a plan keeps, or errs, on held-out inputs, as a table for the terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table

from calibatt_compiler.calibration.validation.kept_mass import SiteValidation, Validation
from calibatt_compiler.calibration.validation.measures import AnyValidation
from calibatt_compiler.calibration.validation.output_error import ZoneValidation
from calibatt_compiler.cli.tables import zone_validation
from calibatt_compiler.printable import printable


def terminal(validation: AnyValidation) -> RenderableType:
    """Return the figures of each site and which are flagged, to be printed with rich."""
    if isinstance(validation, ZoneValidation):
        return zone_validation.terminal(validation)
    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        padding=(0, 1, 0, 0),
        caption="share of attention mass that the plan keeps: mean over inputs, steps, heads and "
        "query blocks; at the step furthest below its threshold; of the worst head at any step; "
        "of the worst query block",
    )
    table.add_column("site", overflow="fold")
    for name in ("mean", "worst step", "wanted", "worst head", "worst row", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for site in validation.sites:
        table.add_row(*_row(site, flagged=site in validation.flagged))
    return Group(table, "", *_words(validation))


def _row(site: SiteValidation, *, flagged: bool) -> list[str]:
    at = site.steps.index(site.worst_step)
    return [
        printable(site.site),
        f"{site.mean:.4f}",
        f"{site.kept[at]:.4f} ({site.worst_step})",
        f"{site.thresholds[at]:.4f}" if site.thresholds else "",
        f"{site.worst_head:.4f}",
        f"{site.worst_row:.4f}",
        "flagged" if flagged else "",
    ]


def _words(validation: Validation) -> list[str]:
    words = [f"{validation.inputs} inputs, mean share kept {validation.mean:.4f}"]
    if validation.repetitive:
        words.append(
            f"{validation.repetitive} heads, over sites and steps, copy rows instead of dropping "
            "blocks: they are left out"
        )
    if not validation.held_out:
        words.append("these are the inputs that the plan was made from: this validates nothing")
    if not any(site.thresholds for site in validation.sites):
        words.append("the plan records no thresholds, so no site can be flagged")
    elif validation.flagged:
        words.append(
            f"{len(validation.flagged)} of {len(validation.sites)} sites do not generalise: at "
            f"some step they keep less than the threshold by more than {validation.margin:g}"
        )
    else:
        words.append(f"every site keeps its thresholds within {validation.margin:g}")
    return words
