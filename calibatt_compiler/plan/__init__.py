"""The artefact: what calibration writes and every later stage reads."""

from calibatt_compiler.plan.copies import AnchorRows, RowCopies
from calibatt_compiler.plan.intervals import Intervals
from calibatt_compiler.plan.pattern import BlockPattern
from calibatt_compiler.plan.plan import Plan
from calibatt_compiler.plan.refine import merge_intervals, share_steps
from calibatt_compiler.plan.schema import (
    CalibrationInputs,
    ModelIdentity,
    PlanMetadata,
    Sampler,
    SiteRecord,
)
from calibatt_compiler.plan.site import SitePatterns

__all__ = [
    "AnchorRows",
    "BlockPattern",
    "CalibrationInputs",
    "Intervals",
    "ModelIdentity",
    "Plan",
    "PlanMetadata",
    "RowCopies",
    "Sampler",
    "SitePatterns",
    "SiteRecord",
    "merge_intervals",
    "share_steps",
]
