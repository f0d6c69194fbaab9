"""Checks that what was observed is what a plan would have served."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from calibatt_compiler.errors import CalibrationError
from calibatt_compiler.plan import Plan


def planned_step(plan: Plan, timestep: float) -> int:
    """Return the plan's step of a timestep.

    Raises:
        CalibrationError: the timestep is not of the plan's range.
    """
    step = plan.step_of(timestep)
    if step is None:
        raise CalibrationError(
            "the plan has no step for a timestep of these inputs",
            expected=f"{plan.timesteps[0]:g} to {plan.timesteps[-1]:g}",
            got=timestep,
            remedy="validate with the sampler and the number of steps of the plan",
        )
    return step


def check_observed(votes: Mapping[str, npt.NDArray[np.int64]]) -> None:
    """Raise `CalibrationError` unless every site has votes at some step."""
    missing = [name for name, of_site in votes.items() if not of_site.any()]
    if missing:
        raise CalibrationError(
            "not every site of the plan was observed",
            expected=f"calls of all {len(votes)} sites",
            got=f"none of {', '.join(missing[:4])}" + (" and more" if missing[4:] else ""),
            remedy="validate with the model that the plan was made for",
        )
