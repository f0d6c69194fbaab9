"""From the masks of all inputs to a plan, one site and step at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from calibatt_compiler.calibration.config import SelectionConfig
from calibatt_compiler.calibration.select.checks import (
    check_alike,
    check_raised,
    fixed_by_all,
    guidance_of,
    inputs_digest,
    sampler_of,
    text_policy_of,
)
from calibatt_compiler.calibration.select.repetition import (
    choose_head_modes,
    repetition_figures,
    repetition_settings,
)
from calibatt_compiler.calibration.select.selection import agreement, count_votes, pack, select
from calibatt_compiler.calibration.store import order_survey
from calibatt_compiler.calibration.store.records import InputRecord, SiteSize
from calibatt_compiler.calibration.store.run_folder import RunStore
from calibatt_compiler.errors import CalibrationError
from calibatt_compiler.plan import (
    BlockPattern,
    CalibrationInputs,
    Plan,
    SitePatterns,
)
from calibatt_compiler.plan.order import TokenOrder
from calibatt_compiler.plan.schema import CfgMode
from calibatt_compiler.plan.thresholds import Thresholds


def plan_from_run(
    folder: str | os.PathLike[str],
    selection: SelectionConfig | None = None,
    *,
    raised: Mapping[str, float] | None = None,
    **settings: Any,
) -> Plan:
    """Make another plan from the folder that a calibration left, without running the model.

    Args:
        folder: `<plan>.calibration`.
        selection: how blocks are selected; default `SelectionConfig()`. Other `A`, `C`, `k` than
            recorded need a run with `keep_energies`; `gamma` needs one that was recorded with one.
        raised: by site, what is added to its threshold at each step, such as
            `Validation.raised()` of a plan of this run; needs the energies of the run.
        **settings: of `SelectionConfig`, by name, in the place of those of `selection`.

    Raises:
        CalibrationError: no run there, a damaged one, or energies needed but not kept.
        OptionError: a value out of range.
    """
    store = RunStore(folder)
    identity = store.identity()
    return derive_plan(
        store,
        store.names(),
        SelectionConfig.of(selection or SelectionConfig(), **settings),
        raised=raised,
        cfg=identity["cfg"],
        arguments=identity["arguments"],
    )


def derive_plan(
    store: RunStore,
    names: Sequence[str],
    selection: SelectionConfig,
    *,
    raised: Mapping[str, float] | None = None,
    cfg: CfgMode = "none",
    arguments: object = None,
) -> Plan:
    """Build the plan of a run from its finished inputs.

    Depends on nothing but what is stored, so that a run killed and resumed gives the same plan.

    Args:
        store: the run's folder.
        names: the inputs that count, in order.
        selection: how blocks are selected.
        raised: by site, what is added to its threshold at each step, at most up to 1; such sites
            are selected again, from stored energies.
        cfg: how the sampler runs guidance, to be recorded.
        arguments: JSON values common to all inputs, part of the inputs' digest.

    Raises:
        CalibrationError: no inputs, inputs that don't fit together, energies needed but not kept.
        OptionError: amounts that thresholds can't be raised by.
    """
    if not names:
        raise CalibrationError(
            "there is nothing to make a plan from",
            expected="at least one finished input",
            got="none",
            remedy="run the module within `with run.input():` first",
        )
    raised = raised or {}
    records = [store.record(name) for name in names]
    first = records[0]
    if first.form != "masks":
        raise CalibrationError(
            "a run for zones has no masks to make a plan from",
            expected="a run with CalibrationConfig(form='masks')",
            got=f"form={first.form!r}",
            remedy="use zone_plan_from_run(folder, density=...), or calibrate again for masks",
        )
    check_raised(first, raised)
    for record in records[1:]:
        check_alike(first, record)
    selected = _Selected(store, records, selection, raised)
    refiner = selection.refiner()
    sites = {}
    for size in first.sites:
        by_step = [selected.pattern(size, step) for step in range(len(first.timesteps))]
        site = refiner.site(SitePatterns.share(by_step, size.head_dim))
        # Packed, since all sites of a large model don't fit into memory as bits.
        sites[size.name] = site.packed()
    return Plan.create(
        sites,
        grid=first.grid,
        sampler=sampler_of(first),
        model=first.model,
        token_order=TokenOrder.parse(first.token_order),
        text_policy=text_policy_of(first),
        cfg=guidance_of(records, cfg),
        thresholds={
            **asdict(selected.thresholds),
            "rho": float(selection.rho),
            **repetition_settings(records, selection.gamma),
            **refiner.thresholds(),
            **{f"raised:{name}": value for name, value in raised.items()},
        },
        inputs=CalibrationInputs(
            count=len(records),
            digest=inputs_digest([record.about for record in records], arguments),
        ),
        quality={
            **selected.quality(),
            **refiner.figures(),
            **repetition_figures(list(sites.values()), selection.gamma),
            **order_survey.figures(store.folder),
        },
        fixed_by=fixed_by_all(records),
    )


class _Selected:
    """What a selection keeps of the finished inputs, one site and step at a time.

    Args:
        store: the run's folder.
        records: the inputs that count, alike.
        selection: how blocks are selected.
        raised: by site, what is added to its threshold.

    Attributes:
        thresholds: that blocks are selected by, where none is raised.
    """

    def __init__(
        self,
        store: RunStore,
        records: Sequence[InputRecord],
        selection: SelectionConfig,
        raised: Mapping[str, float],
    ) -> None:
        self._store = store
        self._records = records
        self._first = records[0]
        self._selection = selection
        self._raised = raised
        recorded = Thresholds(**self._first.thresholds)
        self.thresholds = selection.completed(recorded)
        self._as_recorded = self.thresholds == recorded

    def pattern(self, size: SiteSize, step: int) -> BlockPattern:
        """Return the blocks of a site at a step that enough inputs keep, and each head's mode."""
        block, selection = self._first.block, self._selection
        rows, columns = -(-size.query_length // block[0]), -(-size.key_length // block[1])
        counts = np.zeros((size.heads, rows, columns), np.int32)
        votes = 0
        stored = self._as_recorded and size.name not in self._raised
        for record in self._records:
            if stored:
                bits = self._store.tensor(record.name, f"{size.name}@{step}")
            else:
                bits = pack(self._select_again(record, size, step)[0])
            count_votes(counts, bits)
            votes += len(bits)
        mask = torch.from_numpy(agreement(counts, votes, selection.rho))
        modes = choose_head_modes(
            self._store,
            self._records,
            size,
            step,
            mask,
            gamma=selection.gamma,
            pooled=selection.pooled,
            kept=None if stored else lambda record: self._select_again(record, size, step)[1],
        )
        return BlockPattern.from_mask(
            mask,
            query_length=size.query_length,
            key_length=size.key_length,
            block=block,
            pooled=selection.pooled,
            repetitive=modes.repetitive,
            copies=modes.copies,
        )

    def quality(self) -> dict[str, float]:
        """Return what the recorded masks keep, for `PlanMetadata.quality`."""

        def mean(by_site: Sequence[dict[str, tuple[float, ...]]]) -> float:
            values = [value for sites in by_site for steps in sites.values() for value in steps]
            return round(math.fsum(values) / len(values), 6)

        quality = {"best_20_percent_share": mean([record.best_share for record in self._records])}
        if self._as_recorded and not self._raised:
            quality["input_kept_mass"] = mean([record.kept_mass for record in self._records])
        return quality

    def _select_again(
        self, record: InputRecord, size: SiteSize, step: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        energy = torch.from_numpy(self._store.energy(record, size.name, step))
        threshold = self.thresholds.at(record.positions[step], record.schedule_steps)
        return select(
            energy,
            min(1.0, threshold + self._raised.get(size.name, 0.0)),
            lengths=(size.query_length, size.key_length),
            video=record.video,
            block=record.block,
            text=record.text,
        )
