"""`calibatt inspect --validate`: from what a person typed to a validation, and to a raised plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibatt_compiler.cli import options
from calibatt_compiler.printable import printable

if TYPE_CHECKING:
    from calibatt_compiler.calibration.validation.measures import AnyValidation
    from calibatt_compiler.plan import Plan


def measure(
    source: str,
    plan: Plan,
    inputs: options.Inputs,
    sampling: options.Sampling,
    place: options.Place,
    *,
    margin: float | None,
) -> AnyValidation:
    """Validate a plan on what a run folder holds, or by running the model.

    Args:
        source: a run folder, or the folder or name of a model.
        plan: the plan.
        inputs: prompts and seeds; read only if the model is run, as the next two.
        sampling: arguments of the pipeline.
        place: where the model runs.
        margin: see `calibatt_compiler.validate`; None is the default of the plan's form.
    """
    from calibatt_compiler.calibration import CalibrationConfig, validate, validate_run
    from calibatt_compiler.calibration.validation.measures import margin_of

    margin = margin_of(plan, margin)
    if (Path(source) / "run.json").is_file():
        return validate_run(source, plan, margin=margin)
    given = options.texts_and_seeds(inputs.cases())
    pipe = place.load(source)
    config = CalibrationConfig(component=place.component)
    arguments = sampling.arguments_for(pipe, plan)
    return validate(pipe, plan, **given, margin=margin, config=config, **arguments)


def raise_flagged(path: Path, plan: Plan, validation: AnyValidation, out: Path) -> str:
    """Write the plan that a run gives with thresholds, or energies, of flagged sites raised.

    Args:
        path: file of the plan; its run is in `<path>.calibration`.
        plan: the plan.
        validation: of this plan.
        out: file to write.

    Returns:
        What was done, in a line.

    Raises:
        CalibrationError: the run is not there, or has no energies, or sums of zones.
    """
    from calibatt_compiler.calibration.validation.kept_mass import Validation

    if not validation.flagged:
        return f"no site is flagged: {printable(out)} was not written"
    masks = isinstance(validation, Validation)
    raised = _mask_plan if masks else _zone_plan
    new = raised(f"{path}.calibration", plan, validation.raised())
    new.save(out)
    what = "thresholds" if masks else "energies"
    return (
        f"{printable(out)}: {what} of {len(validation.flagged)} sites raised, density "
        f"{new.density():.3f} instead of {plan.density():.3f}"
    )


def _mask_plan(folder: str, plan: Plan, amounts: dict[str, float]) -> Plan:
    from calibatt_compiler.calibration import plan_from_run

    used = plan.metadata.thresholds
    for name, value in _raised_before(plan).items():
        amounts[name] = min(1.0, amounts.get(name, 0.0) + value)
    names = ("A", "C", "k", "share_steps", "merge_budget", "gamma")
    settings: dict[str, Any] = {name: used.get(name) for name in names}
    if "sample_power" in used:  # such plans can't be made again: refused by name
        settings["sample_power"] = used["sample_power"]
    return plan_from_run(
        folder,
        raised=amounts,
        rho=used.get("rho", 0.5),
        pooled=plan.metadata.sites[0].pooled,
        **settings,
    )


def _zone_plan(folder: str, plan: Plan, factors: dict[str, float]) -> Plan:
    from calibatt_compiler.calibration import zone_plan_from_run

    used = plan.metadata.thresholds
    for name, value in _raised_before(plan).items():
        factors[name] = factors.get(name, 1.0) * value
    counts = {name: int(used[name]) for name in ("numbers", "step_groups") if name in used}
    settings: dict[str, Any] = {"price": used.get("price"), **counts}
    return zone_plan_from_run(folder, raised=factors, **settings)


def _raised_before(plan: Plan) -> dict[str, float]:
    """By what each site of a plan was raised already."""
    return {
        name.removeprefix("raised:"): value
        for name, value in plan.metadata.thresholds.items()
        if name.startswith("raised:")
    }
