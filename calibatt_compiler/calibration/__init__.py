"""Calibration: run a model on example inputs, observe its attention, write the plan.

`calibrate` does it for a diffusers pipeline, `calibration` for any module:

    with calibatt_compiler.calibration(module, config) as run:
        for example in examples:
            with run.input():
                module(example)
        plan = run.plan()

The package itself is callable, because `calibatt_compiler.calibration` is both its name and the
name of that function.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from calibatt_compiler.calibration.config import (
    CalibrationConfig,
    ObservationConfig,
    RunConfig,
    SelectionConfig,
    StorageConfig,
)
from calibatt_compiler.plan.thresholds import Thresholds

if TYPE_CHECKING:
    from calibatt_compiler.calibration.cost.estimate import estimate
    from calibatt_compiler.calibration.order_search.search import survey
    from calibatt_compiler.calibration.pipeline import calibrate
    from calibatt_compiler.calibration.run import CalibrationRun, calibration
    from calibatt_compiler.calibration.select.derive import plan_from_run
    from calibatt_compiler.calibration.select.zones.plans import zone_plan_from_run
    from calibatt_compiler.calibration.tuning.config import TuningConfig
    from calibatt_compiler.calibration.tuning.pareto import Tuning
    from calibatt_compiler.calibration.tuning.study import SearchSpace
    from calibatt_compiler.calibration.tuning.tune import tune, tuning_cost
    from calibatt_compiler.calibration.validation.validate import validate, validate_run

__all__ = [
    "CalibrationConfig",
    "CalibrationRun",
    "ObservationConfig",
    "RunConfig",
    "SearchSpace",
    "SelectionConfig",
    "StorageConfig",
    "Thresholds",
    "Tuning",
    "TuningConfig",
    "calibrate",
    "calibration",
    "estimate",
    "plan_from_run",
    "survey",
    "tune",
    "tuning_cost",
    "validate",
    "validate_run",
    "zone_plan_from_run",
]

_HOMES = {
    "CalibrationRun": "run",
    "SearchSpace": "tuning.study",
    "Tuning": "tuning.pareto",
    "TuningConfig": "tuning.config",
    "calibrate": "pipeline",
    "calibration": "run",
    "estimate": "cost.estimate",
    "plan_from_run": "select.derive",
    "survey": "order_search.search",
    "tune": "tuning.tune",
    "tuning_cost": "tuning.tune",
    "validate": "validation.validate",
    "validate_run": "validation.validate",
    "zone_plan_from_run": "select.zones.plans",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from calibatt_compiler.calibration.run import calibration

        return calibration(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
