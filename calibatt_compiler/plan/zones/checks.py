"""Checks of the arrays that make a pattern of zones."""

from __future__ import annotations

import numpy as np

from calibatt_compiler.errors import PlanError
from calibatt_compiler.plan.sizes import MAX_LENGTH
from calibatt_compiler.plan.zones.drawing import FORMULA, OCTAVES, UNIT
from calibatt_compiler.plan.zones.form import ZoneForm

ARRAYS = {
    "group_rows": np.int32,
    "diagonal": np.uint8,
    "leads": np.int32,
    "counts": np.int32,
    "cuts": np.int32,
    "octaves": np.uint8,
}
"""Arrays of a pattern and their dtypes, in the order in which a plan file holds them."""


def check(zones: ZoneForm) -> None:
    """Raise `PlanError` unless numbers, arrays and leads are as `ZonePattern` says.

    The arrays are made read-only.
    """
    _check_numbers(zones)
    _check_arrays(zones)
    _check_leads(zones)


def _check_numbers(zones: ZoneForm) -> None:
    if zones.formula != FORMULA:
        raise PlanError(
            "zones are drawn by a formula that this version does not know",
            expected=f"formula {FORMULA}",
            got=zones.formula,
            remedy="upgrade calibatt, or calibrate again with this version",
        )
    if not 0 <= zones.seed < UNIT:
        raise wrong("the seed of a pattern of zones", f"0 to {UNIT - 1}", zones.seed)
    lengths = (zones.query_length, zones.key_length)
    if zones.text not in (None, "first", "last"):
        raise wrong("the place of the text", "first, last or None", zones.text)
    if zones.text is None and zones.video:
        raise wrong("the video of a pattern without text", 0, zones.video)
    if zones.text is not None and not 0 < zones.video <= min(lengths):
        raise wrong("the video of a pattern", f"1 to {min(lengths)} tokens", zones.video)


def _check_arrays(zones: ZoneForm) -> None:
    for name, dtype in ARRAYS.items():
        array = getattr(zones, name)
        if array.dtype != dtype or array.ndim != 1:
            found = f"{array.dtype} {array.shape}"
            raise wrong(f"{name} of zones", f"{np.dtype(dtype)} of one dimension", found)
        array.setflags(write=False)
    if len(zones.group_rows) != zones.heads or (zones.group_rows < 1).any():
        raise wrong("group_rows of zones", f"{zones.heads} numbers of 1 or more", zones.group_rows)
    groups = int(zones.head_groups.sum())
    for name in ("diagonal", "leads", "counts"):
        if len(getattr(zones, name)) != groups:
            raise wrong(f"{name} of zones", f"{groups} groups", len(getattr(zones, name)))
    if (zones.diagonal > 1).any():
        raise wrong("diagonal of zones", "0 or 1", int(zones.diagonal.max()))
    if groups and zones.counts.min() < 1:
        raise wrong("runs of a group of zones", "at least 1", int(zones.counts.min()))
    runs = int(zones.counts.sum(dtype=np.int64))
    if len(zones.octaves) != runs or len(zones.cuts) != runs - groups:
        got = (len(zones.octaves), len(zones.cuts))
        raise wrong("octaves and cuts of zones", (runs, runs - groups), got)
    if (zones.octaves >= OCTAVES).any():
        raise wrong("octaves of zones", f"0 to {OCTAVES - 1}", int(zones.octaves.max()))
    inner = np.ones(runs, np.bool_)  # runs with another of their group before them
    inner[zones.run_offsets[:-1]] = False
    same = inner[1:] & (zones.octaves[1:] == zones.octaves[:-1])
    if same.any():
        raise wrong("neighbouring runs of a group of zones", "different octaves", "equal ones")
    cut_offsets = zones.run_offsets - np.arange(groups + 1)
    rising = np.diff(zones.cuts.astype(np.int64)) > 0
    between = np.ones(max(len(zones.cuts) - 1, 0), np.bool_)
    edges = cut_offsets[1:-1]
    between[edges[(edges > 0) & (edges < len(zones.cuts))] - 1] = False
    if not rising[between].all() or (np.abs(zones.cuts.astype(np.int64)) > MAX_LENGTH).any():
        raise wrong("cuts of a group of zones", "key blocks in rising order", "others")


def _check_leads(zones: ZoneForm) -> None:
    """Each row keeps its lead, so none is empty."""
    if not len(zones.leads):
        return
    first, last = zones.group_edges
    shift = zones.diagonal.astype(np.int64)
    low, high = zones.leads + shift * first, zones.leads + shift * (last - 1)
    bad = (low < 0) | (high >= zones.columns[1] - zones.columns[0])
    bad |= zones.octave_at(zones.leads) != 0
    if bad.any():
        group = int(np.flatnonzero(bad)[0])
        raise PlanError(
            "a group of zones does not lead with a block that all its rows keep",
            expected="a key block of octave 0 in each row of the group",
            got=f"lead {zones.leads[group]} of group {group}, rows {first[group]} to "
            f"{last[group] - 1}",
            remedy="give every row a block of octave 0, or make groups of fewer rows",
        )


def wrong(what: str, expected: object, got: object) -> PlanError:
    """Return the error of something that is not what it must be."""
    return PlanError(
        f"{what}: not what it must be",
        expected=expected,
        got=got,
        remedy="build zones with ZonePattern.from_octaves or by calibration; a plan that was read "
        "is damaged",
    )
