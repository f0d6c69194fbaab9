"""What a validation measures: of a plan of masks its kept mass, of zones their output error."""

from __future__ import annotations

import math

from calibatt_compiler.calibration.validation import kept_mass, output_error
from calibatt_compiler.calibration.validation.kept_mass import KeptMass, Validation
from calibatt_compiler.calibration.validation.output_error import OutputError, ZoneValidation
from calibatt_compiler.errors import CalibrationError, OptionError
from calibatt_compiler.plan import Plan

Measure = KeptMass | OutputError
AnyValidation = Validation | ZoneValidation


def measure_of(plan: Plan) -> Measure:
    """Return what is measured of a plan.

    Raises:
        CalibrationError: it has sites of both forms.
    """
    return OutputError(plan) if _zoned(plan) else KeptMass(plan)


def margin_of(plan: Plan, margin: float | None) -> float:
    """Return the margin of a validation of a plan; None is the default of its form.

    Raises:
        CalibrationError: the plan has sites of both forms.
        OptionError: the margin is out of range.
    """
    zoned = _zoned(plan)
    default = output_error.MARGIN if zoned else kept_mass.MARGIN
    if margin is None:
        return default
    number = isinstance(margin, (int, float)) and not isinstance(margin, bool)
    if not number or not 0 <= margin <= (math.inf if zoned else 1) or margin == math.inf:
        raise OptionError(
            "the margin of a validation is out of range",
            expected="a share of the expected error, at least 0"
            if zoned
            else "a share of attention mass in [0, 1]",
            got=repr(margin),
            remedy=f"leave it out for {default}",
        )
    return margin


def _zoned(plan: Plan) -> bool:
    zoned = {name: site.zones is not None for name, site in plan.sites.items()}
    if len(set(zoned.values())) > 1:
        raise CalibrationError(
            "masks and zones of one plan can't be judged together",
            expected="a plan of one form",
            got=f"masks at {min(name for name in zoned if not zoned[name])}, zones at "
            f"{min(name for name in zoned if zoned[name])}",
            remedy="validate two plans, one of each form",
        )
    return any(zoned.values())
