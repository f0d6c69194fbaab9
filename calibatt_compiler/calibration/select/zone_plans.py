"""From what a run has stored to a plan of zones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from calibatt_compiler.calibration.select.checks import (
    check_alike,
    inputs_digest,
    sampler_of,
    text_policy_of,
)
from calibatt_compiler.calibration.select.zone_fit import BUDGET
from calibatt_compiler.calibration.select.zone_price import Priced, Squares, ZoneTarget
from calibatt_compiler.calibration.select.zones import (
    STEP_GROUPS,
    ZoneMap,
    fit_zones,
    group_of,
    seed_of,
)
from calibatt_compiler.calibration.store import order_survey
from calibatt_compiler.calibration.store.records import InputRecord, SiteSize
from calibatt_compiler.calibration.store.run_folder import RunStore
from calibatt_compiler.errors import CalibrationError
from calibatt_compiler.plan import CalibrationInputs, Plan, SitePatterns
from calibatt_compiler.plan.order import TokenOrder
from calibatt_compiler.plan.schema import TEXT_POSITIONS, CfgMode
from calibatt_compiler.plan.text import TextPosition
from calibatt_compiler.plan.zone_rows import video_blocks


@dataclass(frozen=True)
class ZoneSelection:
    """How zones are chosen from what a run has stored.

    Attributes:
        target: what the plan is to be.
        step_groups: groups of steps that share runs.
        numbers: that a site may have at a step group.
    """

    target: ZoneTarget = field(default_factory=lambda: ZoneTarget(density=0.25))
    step_groups: int = STEP_GROUPS
    numbers: int = BUDGET


def derive_zone_plan(
    store: RunStore,
    names: Sequence[str],
    selection: ZoneSelection,
    *,
    cfg: CfgMode = "none",
    arguments: object = None,
) -> Plan:
    """Build the plan of a run from its finished inputs.

    Depends on nothing but what is stored, so that a run killed and resumed gives the same plan.

    Args:
        store: the run's folder; energies must have been kept.
        names: the inputs that count, in order.
        selection: how zones are chosen.
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
    policy = text_policy_of(first)
    groups = _groups(first, selection.step_groups)
    maps = [
        _map(store, records, size, index, steps, TEXT_POSITIONS.get(policy))
        for index, size in enumerate(first.sites)
        for steps in _members(groups)
    ]
    patterns, found = fit_zones(maps, selection.target, budget=selection.numbers)
    count = len(_members(groups))
    sites = {
        size.name: SitePatterns.of_zones(
            patterns[index * count : (index + 1) * count], groups, size.head_dim
        ).packed()
        for index, size in enumerate(first.sites)
    }
    guided = any(record.guided for record in records)
    return Plan.create(
        sites,
        grid=first.grid,
        sampler=sampler_of(first),
        model=first.model,
        token_order=TokenOrder.parse(first.token_order),
        text_policy=policy,
        cfg="none" if cfg in ("separate", "batched") and not guided else cfg,
        thresholds=_settings(selection, found),
        inputs=CalibrationInputs(
            count=len(records),
            digest=inputs_digest([record.about for record in records], arguments),
        ),
        quality={"expected_error": round(found.error, 6), **order_survey.figures(store.folder)},
    )


def _settings(selection: ZoneSelection, found: Priced) -> dict[str, float]:
    target = selection.target
    names = ("density", "speed_up", "error", "attention_share")
    asked = {name: getattr(target, name) for name in names}
    return {
        **{name: float(value) for name, value in asked.items() if value is not None},
        "price": found.price,
        "numbers": float(selection.numbers),
    }


def _groups(record: InputRecord, step_groups: int) -> tuple[int, ...]:
    """For each step the number of its group; groups without a step are left out."""
    steps = record.schedule_steps
    found = [group_of(position, steps, step_groups) for position in record.positions]
    number = {group: index for index, group in enumerate(sorted(set(found)))}
    return tuple(number[group] for group in found)


def _members(groups: Sequence[int]) -> list[list[int]]:
    """The steps of each group."""
    return [
        [step for step, group in enumerate(groups) if group == wanted]
        for wanted in range(max(groups) + 1)
    ]


def _map(
    store: RunStore,
    records: Sequence[InputRecord],
    size: SiteSize,
    site: int,
    steps: Sequence[int],
    text: TextPosition | None,
) -> ZoneMap:
    lengths = (size.query_length, size.key_length)
    video = records[0].video if text is not None and max(lengths) > records[0].video else 0
    position = text if video else None
    squares: Callable[[], Squares] = partial(
        _kept_squares, store, records, size, steps, video, position
    )
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
