"""`calibatt inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from calibatt_compiler.cli import options


def inspect(
    plan: options.PlanFile,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            help="Also write a page with heat maps and a picture of each head's mask: one file, "
            "to be opened in any browser.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show what is in a plan: what it was made for, and how much each layer computes.

    Density is the share of attention blocks that are computed, sparsity the share left out.

    Example: calibatt inspect fox.calibatt --html fox.html
    """
    from rich.console import Console

    from calibatt_compiler.plan import Plan
    from calibatt_compiler.report import inspect as report
    from calibatt_compiler.report.plan_page import write_page

    loaded = Plan.load(plan)
    console = Console()
    if as_json:
        console.print_json(data=report.to_dict(loaded))
    else:
        console.print(report.terminal(loaded))
    if html is not None:
        write_page(loaded, html, title=plan.name)
        Console(stderr=True).print(f"page written to {html}", highlight=False)
