"""`calibatt inspect --validate`: from what a person typed to a validation, and to a raised plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibatt_compiler.cli import options
from calibatt_compiler.printable import printable

if TYPE_CHECKING:
    from calibatt_compiler.calibration.validation.kept_mass import Validation
    from calibatt_compiler.plan import Plan


def measure(
    source: str,
    plan: Plan,
    inputs: options.Inputs,
    sampling: options.Sampling,
    place: options.Place,
    *,
    margin: float,
) -> Validation:
    """Validate a plan on what a run folder holds, or by running the model.

    Args:
        source: a run folder, or the folder or name of a model.
        plan: the plan.
        inputs: prompts and seeds; read only if the model is run, as the next two.
        sampling: arguments of the pipeline.
        place: where the model runs.
        margin: see `calibatt_compiler.validate`.
    """
    from calibatt_compiler.calibration import CalibrationConfig, validate, validate_run
    from calibatt_compiler.calibration.validation.kept_mass import check_margin

    check_margin(margin)
    if (Path(source) / "run.json").is_file():
        return validate_run(source, plan, margin=margin)
    given = options.texts_and_seeds(inputs.cases())
    pipe = place.load(source)
    config = CalibrationConfig(component=place.component)
    arguments = sampling.arguments_for(pipe, plan)
    return validate(pipe, plan, **given, margin=margin, config=config, **arguments)


def raise_flagged(path: Path, plan: Plan, validation: Validation, out: Path) -> str:
    """Write the plan that a run gives with the thresholds of flagged sites raised.

    Args:
        path: file of the plan; its run is in `<path>.calibration`.
        plan: the plan.
        validation: of this plan.
        out: file to write.

    Returns:
        What was done, in a line.

    Raises:
        CalibrationError: the run is not there, or has no energies.
    """
    from calibatt_compiler.calibration import plan_from_run

    if not validation.flagged:
        return f"no site is flagged: {printable(out)} was not written"
    used = plan.metadata.thresholds
    before = {
        name.removeprefix("raised:"): value
        for name, value in used.items()
        if name.startswith("raised:")
    }
    amounts = validation.raised()
    for name, value in before.items():
        amounts[name] = min(1.0, amounts.get(name, 0.0) + value)
    names = ("A", "C", "k", "share_steps", "merge_budget", "sample_power", "gamma")
    settings: dict[str, Any] = {name: used.get(name) for name in names}
    new = plan_from_run(
        f"{path}.calibration",
        raised=amounts,
        rho=used.get("rho", 0.5),
        pooled=plan.metadata.sites[0].pooled,
        **settings,
    )
    new.save(out)
    return (
        f"{printable(out)}: thresholds of {len(validation.flagged)} sites raised, density "
        f"{new.density():.3f} instead of {plan.density():.3f}"
    )
