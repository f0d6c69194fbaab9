"""calibatt: calibrated block-sparse attention for video diffusion transformers.

    pipe.transformer = torch.compile(
        pipe.transformer, backend="calibatt", options={"plan": "wan14b-720p.calibatt"}
    )

Importing the package is cheap: each name is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from calibatt_compiler import logs, version

if TYPE_CHECKING:
    from calibatt_compiler import errors
    from calibatt_compiler.calibration import CalibrationConfig, calibrate, calibration, validate
    from calibatt_compiler.plan import Plan
    from calibatt_compiler.report.summary import summary

__version__ = version.VERSION
logs.start()

_HOMES = {
    "CalibrationConfig": "calibatt_compiler.calibration",
    "Plan": "calibatt_compiler.plan",
    "calibrate": "calibatt_compiler.calibration",
    "calibration": "calibatt_compiler.calibration",
    "errors": "calibatt_compiler.errors",
    "summary": "calibatt_compiler.report.summary",
    "validate": "calibatt_compiler.calibration",
}

__all__ = [
    "CalibrationConfig",
    "Plan",
    "__version__",
    "calibrate",
    "calibration",
    "errors",
    "summary",
    "validate",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_HOMES[name])
    return module if name == "errors" else getattr(module, name)
