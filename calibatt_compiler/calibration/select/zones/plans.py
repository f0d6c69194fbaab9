"""From what a run has stored to a plan of zones."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from calibatt_compiler.calibration.select.checks import (
    check_alike,
    check_factors,
    guidance_of,
    inputs_digest,
    sampler_of,
    text_policy_of,
)
from calibatt_compiler.calibration.select.zones.price import Squares
from calibatt_compiler.calibration.select.zones.site import (
    FittedZones,
    ZoneMap,
    fit_zones,
    group_of,
)
from calibatt_compiler.calibration.store import order_survey
from calibatt_compiler.calibration.store.records import InputRecord, SiteSize
from calibatt_compiler.calibration.store.run_folder import RunStore
from calibatt_compiler.calibration.store.zone_sums import ZoneSums
from calibatt_compiler.calibration.zone_target import BUDGET, STEP_GROUPS, ZoneSelection, ZoneTarget
from calibatt_compiler.errors import CalibrationError
from calibatt_compiler.plan import CalibrationInputs, Plan, SitePatterns
from calibatt_compiler.plan.order import TokenOrder
from calibatt_compiler.plan.schema import TEXT_POSITIONS, CfgMode
from calibatt_compiler.plan.text import TextPosition
from calibatt_compiler.plan.zones.drawing import seed_of
from calibatt_compiler.plan.zones.form import video_blocks
from calibatt_compiler.plan.zones.quality import EXPECTED_ERROR, OF_SITE


def zone_plan_from_run(
    folder: str | os.PathLike[str],
    *,
    density: float | None = None,
    speed_up: float | None = None,
    error: float | None = None,
    attention_share: float | None = None,
    price: float | None = None,
    step_groups: int = STEP_GROUPS,
    numbers: int = BUDGET,
    raised: Mapping[str, float] | None = None,
) -> Plan:
    """Make a plan of zones from the folder that a calibration left, without running the model.

    Args:
        folder: `<plan>.calibration`, of a run with `form="zones"` or `keep_energies`.
        density: see `CalibrationConfig`; one of this, the next two and `price`.
        speed_up: see `CalibrationConfig`.
        error: see `CalibrationConfig`.
        attention_share: see `CalibrationConfig`.
        price: what a kept block is worth, as a plan of this run records it in its thresholds.
        step_groups: see `CalibrationConfig`; a run for zones keeps those that it was recorded with.
        numbers: `CalibrationConfig.zone_numbers`.
        raised: by site, a factor of at least 1 that its energies are multiplied by for the fit,
            such as `ZoneValidation.raised()` of a plan of this run. The price is that of the plan
            without it, so that these sites keep more blocks and no other site fewer; so are the
            errors expected of sites that the plan records.

    Raises:
        CalibrationError: no run there, a damaged one, or energies needed but not kept.
        OptionError: a value out of range.
    """
    store = RunStore(folder)
    identity = store.identity()
    target = ZoneTarget(density, speed_up, error, attention_share, price)
    return derive_zone_plan(
        store,
        store.names(),
        ZoneSelection(target, step_groups, numbers),
        raised=raised,
        cfg=identity["cfg"],
        arguments=identity["arguments"],
    )


def derive_zone_plan(
    store: RunStore,
    names: Sequence[str],
    selection: ZoneSelection,
    *,
    raised: Mapping[str, float] | None = None,
    cfg: CfgMode = "none",
    arguments: object = None,
) -> Plan:
    """Build the plan of a run from its finished inputs.

    Depends on nothing but what is stored, so that a run killed and resumed gives the same plan.

    Args:
        store: the run's folder, of a run for zones, or with energies that were kept.
        names: the inputs that count, in order.
        selection: how zones are chosen.
        raised: see `zone_plan_from_run`.
        cfg: how the sampler runs guidance, to be recorded.
        arguments: JSON values common to all inputs, part of the inputs' digest.

    Raises:
        CalibrationError: no inputs, inputs that don't fit together, energies needed but not kept.
        OptionError: what the plan is to be can't be had.
    """
    if not names:
        raise CalibrationError(
            "there is nothing to make a plan from",
            expected="at least one finished input",
            got="none",
            remedy="run the module within `with run.input():` first",
        )
    records = [store.record(name) for name in names]
    first = records[0]
    for record in records[1:]:
        check_alike(first, record)
    raised = raised or {}
    check_factors(first, raised)
    policy = text_policy_of(first)
    # Runs for zones have summed their own groups up.
    step_groups = first.step_groups if first.form == "zones" else selection.step_groups
    places = [group_of(at, first.schedule_steps, step_groups) for at in first.positions]
    groups = sorted(set(places))
    maps = [
        replace(
            _map(store, records, size, index, (group, places), TEXT_POSITIONS.get(policy)),
            factor=raised.get(size.name, 1.0),
        )
        for index, size in enumerate(first.sites)
        for group in groups
    ]
    fitted = fit_zones(maps, selection.target, budget=selection.numbers)
    of_step = [groups.index(place) for place in places]
    sites = {
        size.name: SitePatterns.of_zones(
            fitted.patterns[index * len(groups) : (index + 1) * len(groups)],
            of_step,
            size.head_dim,
        ).packed()
        for index, size in enumerate(first.sites)
    }
    return Plan.create(
        sites,
        grid=first.grid,
        sampler=sampler_of(first),
        model=first.model,
        token_order=TokenOrder.parse(first.token_order),
        text_policy=policy,
        cfg=guidance_of(records, cfg),
        thresholds={
            **_settings(replace(selection, step_groups=step_groups), fitted, raised=bool(raised)),
            **{f"raised:{name}": float(value) for name, value in raised.items()},
        },
        inputs=CalibrationInputs(
            count=len(records),
            digest=inputs_digest([record.about for record in records], arguments),
        ),
        quality={
            EXPECTED_ERROR: round(fitted.found.error, 6),
            **_site_errors(fitted, [size.name for size in first.sites], of_step),
            **order_survey.figures(store.folder),
        },
    )


def _settings(selection: ZoneSelection, fitted: FittedZones, *, raised: bool) -> dict[str, float]:
    target = selection.target
    # With raised errors a plan keeps its price, and no more what was asked for.
    names = () if raised else ("density", "speed_up", "error", "attention_share")
    asked = {name: getattr(target, name) for name in names}
    return {
        **{name: float(value) for name, value in asked.items() if value is not None},
        "price": fitted.found.price,
        "numbers": float(selection.numbers),
        "step_groups": float(selection.step_groups),
    }


def _site_errors(
    fitted: FittedZones, names: Sequence[str], of_step: Sequence[int]
) -> dict[str, float]:
    """Root of each site's expected variance, mean over the steps; for `PlanMetadata.quality`.

    Of raised sites that of the plan before: what they promise, and validation holds them to.
    """
    groups = len(fitted.variances) // len(names)
    found = {}
    for site, name in enumerate(names):
        by_step = [fitted.variances[site * groups + group] for group in of_step]
        found[OF_SITE + name] = round(math.sqrt(math.fsum(by_step) / len(by_step)), 6)
    return found


def _map(
    store: RunStore,
    records: Sequence[InputRecord],
    size: SiteSize,
    site: int,
    group: tuple[int, Sequence[int]],
    text: TextPosition | None,
) -> ZoneMap:
    lengths = (size.query_length, size.key_length)
    video = records[0].video if text is not None and max(lengths) > records[0].video else 0
    position = text if video else None
    steps = [step for step, place in enumerate(group[1]) if place == group[0]]
    squares: Callable[[], Squares]
    if records[0].form == "zones":
        names = [record.name for record in records]
        squares = partial(ZoneSums(store.folder).mean_squares, size.name, group[0], names)
    else:
        squares = partial(_kept_squares, store, records, size, steps, video, position)
    return ZoneMap(
        size.heads,
        lengths,
        records[0].block,
        squares,
        len(steps),
        video,
        position,
        seed_of(site),
    )


def _kept_squares(
    store: RunStore,
    records: Sequence[InputRecord],
    size: SiteSize,
    steps: Sequence[int],
    video: int,
    text: TextPosition | None,
) -> Squares:
    """Mean squared energies of the blocks without text, from energies that were kept."""
    block = records[0].block
    rows = slice(*video_blocks(size.query_length, video, block[0], text))
    columns = slice(*video_blocks(size.key_length, video, block[1], text))
    shape = (size.heads, rows.stop - rows.start, columns.stop - columns.start)
    total, votes = np.zeros(shape), 0
    for record in records:
        for step in steps:
            energy = store.energy(record, size.name, step)[:, :, rows, columns]
            total += np.square(energy.astype(np.float64)).sum(0)
            votes += len(energy)
    return total / votes
