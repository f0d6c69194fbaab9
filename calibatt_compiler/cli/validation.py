"""`calibatt inspect --validate`: from what a person typed to a validation, and to a raised plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibatt_compiler.evaluation.cases import Case

if TYPE_CHECKING:
    from calibatt_compiler.calibration.validation.kept_mass import Validation
    from calibatt_compiler.plan import Plan


def measure(
    source: str,
    plan: Plan,
    cases: Callable[[], Sequence[Case]],
    named: Mapping[str, Any],
    settings: Sequence[str] | None,
    *,
    margin: float,
    component: str,
    device: str,
    dtype: str,
) -> Validation:
    """Validate a plan on what a run folder holds, or by running the model.

    Args:
        source: a run folder, or the folder or name of a model.
        plan: the plan.
        cases: gives prompts and seeds; asked only if the model is run.
        named: arguments of the pipeline by name, None where not given.
        settings: texts of `--set`.
        margin: as in `calibatt_compiler.validate`.
        component: of the pipeline.
        device: text of `--device`.
        dtype: text of `--dtype`.
    """
    from calibatt_compiler.calibration import CalibrationConfig, validate, validate_run
    from calibatt_compiler.calibration.validation.kept_mass import check_margin
    from calibatt_compiler.cli import pipelines

    check_margin(margin)
    if (Path(source) / "run.json").is_file():
        return validate_run(source, plan, margin=margin)
    chosen = cases()
    place = pipelines.device_of(device)
    pipe = pipelines.load_pipeline(source, place, pipelines.dtype_of(dtype, place))
    arguments = pipelines.arguments_for_plan(pipe, plan, named, settings)
    return validate(
        pipe,
        plan,
        prompts=[case.prompt for case in chosen],
        seeds=[case.seed for case in chosen],
        margin=margin,
        config=CalibrationConfig(component=component),
        **arguments,
    )


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
        return f"no site is flagged: {out} was not written"
    used = plan.metadata.thresholds
    before = {
        name.removeprefix("raised:"): value
        for name, value in used.items()
        if name.startswith("raised:")
    }
    amounts = validation.raised()
    for name, value in before.items():
        amounts[name] = min(1.0, amounts.get(name, 0.0) + value)
    new = plan_from_run(
        f"{path}.calibration",
        rho=used.get("rho", 0.5),
        A=used.get("A"),
        C=used.get("C"),
        k=used.get("k"),
        share_steps=used.get("share_steps"),
        merge_budget=used.get("merge_budget"),
        pooled=plan.metadata.sites[0].pooled,
        sample_power=used.get("sample_power"),
        gamma=used.get("gamma"),
        raised=amounts,
    )
    new.save(out)
    return (
        f"{out}: thresholds of {len(validation.flagged)} sites raised, density "
        f"{new.density():.3f} instead of {plan.density():.3f}"
    )
