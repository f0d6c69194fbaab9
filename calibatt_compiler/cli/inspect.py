"""The command `calibatt inspect`: shows what is in a plan, and validates it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from calibatt_compiler.cli import options
from calibatt_compiler.cli.groups import grouped
from calibatt_compiler.cli.options import option
from calibatt_compiler.errors import OptionError
from calibatt_compiler.files import check_output
from calibatt_compiler.printable import printable

_VALIDATION = "Validation"


@grouped
def inspect(
    plan: options.PlanFile,
    sampling: options.Sampling,
    place: options.Place,
    inputs: options.Inputs = options.HELD_OUT,
    html: Annotated[
        Path | None,
        option(
            None,
            "Also write a page with heat maps and a picture of each head's mask: one file, to be "
            "opened in any browser.",
        ),
    ] = None,
    as_json: Annotated[
        bool, option(None, "Print JSON instead of a table.", None, "--json")
    ] = False,
    validate: Annotated[
        str | None,
        option(
            _VALIDATION,
            "Measure what the plan keeps on held-out inputs, or the output error of its zones. "
            "SOURCE: the model, to be run on --prompts that the plan was not made from, or the "
            "folder that a calibration on such inputs left, for masks with --keep-energies.",
            "SOURCE",
        ),
    ] = None,
    margin: Annotated[
        float | None,
        option(
            _VALIDATION,
            "Flag a site of masks that at some step keeps less than its threshold by more than "
            "this, by default 0.02; one of zones whose output error is above the one that the "
            "plan expected by more than this share of it, by default 0.25.",
        ),
    ] = None,
    raised: Annotated[
        Path | None,
        option(
            _VALIDATION,
            "Write the plan that keeps more at the flagged sites: masks selected again with "
            "thresholds raised by what they lack, zones fitted again at the plan's price, with "
            "energies raised by what the error is above the expected one. Needs "
            "PLAN.calibration, of masks with energies (--keep-energies).",
            "OUT",
            "--raise",
        ),
    ] = None,
) -> None:
    """Show what is in a plan: what it was made for, and how much each layer computes.

    Density is the share of attention blocks that are computed, sparsity the share left out. With
    --validate it also shows whether the plan holds on inputs that it was not made from: of masks
    the share of attention mass that each site keeps there, of zones the relative error that their
    draw gives each site's output. Size and steps are those of the plan.

    Example: calibatt inspect fox.calibatt --html fox.html
    """
    from calibatt_compiler.cli import validation
    from calibatt_compiler.cli.tables import validation as validation_report
    from calibatt_compiler.plan import Plan
    from calibatt_compiler.report import inspect as report
    from calibatt_compiler.report.plan_page import write_page
    from calibatt_compiler.terminal import PlainConsole

    if validate is None and raised is not None:
        raise OptionError(
            "--raise goes by a validation",
            expected="--validate with it",
            got="no --validate",
            remedy="add --validate MODEL --prompts HELD_OUT.txt",
        )
    for path, others in ((html, (plan, inputs.prompts)), (raised, (plan, inputs.prompts, html))):
        if path is not None:
            check_output(path, inputs=others)
    loaded = Plan.load(plan)
    found = None
    if validate is not None:
        found = validation.measure(validate, loaded, inputs, sampling, place, margin=margin)
    console = PlainConsole()
    if as_json:
        extra = {} if found is None else {"validation": found.to_dict()}
        console.print_json(data={**report.to_dict(loaded), **extra}, ensure_ascii=True)
    else:
        console.print(report.terminal(loaded))
        if found is not None:
            console.print("", validation_report.terminal(found))
    said = PlainConsole(stderr=True, soft_wrap=True)
    if html is not None:
        write_page(loaded, html, title=plan.name)
        said.print(f"page written to {printable(html)}")
    if raised is not None and found is not None:
        said.print(validation.raise_flagged(plan, loaded, found, raised))
