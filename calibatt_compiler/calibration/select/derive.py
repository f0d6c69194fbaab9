"""From the masks of all inputs to a plan, one site and step at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from calibatt_compiler.calibration.config import (
    CalibrationConfig,
    check_gamma,
    check_rho,
    check_sample,
)
from calibatt_compiler.calibration.select.checks import (
    check_alike,
    check_raised,
    inputs_digest,
    sampler_of,
    text_policy_of,
)
from calibatt_compiler.calibration.select.repetition import (
    choose_forms,
    repetition_figures,
    repetition_settings,
)
from calibatt_compiler.calibration.select.sampling import sample
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
from calibatt_compiler.plan.refine import SHARE_STEPS, Refiner
from calibatt_compiler.plan.schema import CfgMode
from calibatt_compiler.plan.text import text_blocks
from calibatt_compiler.plan.thresholds import Thresholds


@dataclass(frozen=True)
class Selection:
    """How blocks are chosen from what a run has stored.

    Attributes:
        rho: share of the inputs that a block needs.
        thresholds: A, C and k to select with again, from stored energies; None: the masks as they
            were selected while recording.
        share_steps: as in `calibatt_compiler.plan.share_steps`; None: steps share equal masks only.
            Without effect on samples, of which each step has its own.
        merge_budget: as in `calibatt_compiler.plan.merge_intervals`; None: gaps stay.
        pooled: keys that each dropped block is pooled to.
        sample_power: as in `CalibrationConfig`; needs stored energies.
        gamma: as in `CalibrationConfig`; needs scored inputs.
        raised: by site, what is added to its threshold at each step, at most up to 1; such sites
            are selected again, from stored energies.
    """

    rho: float
    thresholds: Thresholds | None = None
    share_steps: float | None = None
    merge_budget: float | None = None
    pooled: int = 0
    sample_power: float | None = None
    gamma: float | None = None
    raised: Mapping[str, float] = field(default_factory=dict)


def plan_from_run(
    folder: str | os.PathLike[str],
    *,
    rho: float = 0.5,
    A: float | None = None,
    C: float | None = None,
    k: float | None = None,
    share_steps: float | None = SHARE_STEPS,
    merge_budget: float | None = None,
    pooled: int = 0,
    sample_power: float | None = None,
    gamma: float | None = None,
    raised: Mapping[str, float] | None = None,
) -> Plan:
    """Make another plan from the folder that a calibration left, without running the model.

    Args:
        folder: `<plan>.calibration`.
        rho: share of the inputs that a block needs.
        A: other threshold than the run was recorded with, as in `CalibrationConfig`; this and the
            next two need a run with `keep_energies=True`.
        C: likewise.
        k: likewise.
        share_steps: as in `CalibrationConfig`.
        merge_budget: as in `CalibrationConfig`.
        pooled: as in `CalibrationConfig`.
        sample_power: as in `CalibrationConfig`.
        gamma: as in `CalibrationConfig`; needs a run that was recorded with one.
        raised: by site, what is added to its threshold at each step, such as
            `Validation.raised()` of a plan of this run; needs the energies of the run.

    Raises:
        CalibrationError: no run there, a damaged one, or energies needed but not kept.
        OptionError: a value out of range.
    """
    store = RunStore(folder)
    identity = store.identity()
    names = store.names()
    selection = replace(
        select_by(store, names, rho=rho, A=A, C=C, k=k),
        share_steps=share_steps,
        merge_budget=merge_budget,
        pooled=pooled,
        sample_power=sample_power,
        gamma=gamma,
        raised=raised or {},
    )
    return derive_plan(
        store, names, selection, cfg=identity["cfg"], arguments=identity["arguments"]
    )


def select_by(
    store: RunStore,
    names: Sequence[str],
    *,
    rho: float,
    A: float | None,
    C: float | None,
    k: float | None,
) -> Selection:
    """Return a selection; thresholds left None are those that the run was recorded with."""
    if not names or A is C is k is None:
        return Selection(rho)
    recorded = store.record(names[0]).thresholds
    given = {name: value for name, value in (("A", A), ("C", C), ("k", k)) if value is not None}
    CalibrationConfig(**given)  # type: ignore[arg-type] # checks their ranges
    return Selection(rho, Thresholds(**{**recorded, **given}))


def derive_plan(
    store: RunStore,
    names: Sequence[str],
    selection: Selection,
    *,
    cfg: CfgMode = "none",
    arguments: object = None,
) -> Plan:
    """Build the plan of a run from its finished inputs.

    Depends on nothing but what is stored, so that a run killed and resumed gives the same plan.

    Args:
        store: the run's folder.
        names: the inputs that count, in order.
        selection: how blocks are chosen.
        cfg: how the sampler runs guidance, to be recorded.
        arguments: JSON values common to all inputs, part of the inputs' digest.

    Raises:
        CalibrationError: no inputs, inputs that don't fit together, energies needed but not kept.
        OptionError: a value of the selection is out of range.
    """
    check_rho(selection.rho)
    check_gamma(selection.gamma)
    check_sample(selection.sample_power, selection.merge_budget)
    power = selection.sample_power
    refiner = refiner_of(selection.share_steps, selection.merge_budget, power)
    if not names:
        raise CalibrationError(
            "there is nothing to make a plan from",
            expected="at least one finished input",
            got="none",
            remedy="run the module within `with run.input():` first",
        )
    records = [store.record(name) for name in names]
    first = records[0]
    check_raised(first, selection.raised)
    for record in records[1:]:
        check_alike(first, record)
    sites = {}
    for size in first.sites:
        by_step = [
            _pattern(store, records, size, step, selection) for step in range(len(first.timesteps))
        ]
        if power is not None:
            by_step = [
                _sampled(store, records, size, step, pattern, power)
                for step, pattern in enumerate(by_step)
            ]
        site = SitePatterns.share(by_step, size.head_dim)
        if power is None:
            site = refiner.site(site)
        # Packed, since all sites of a large model don't fit into memory as bits.
        sites[size.name] = site.packed()
    used = selection.thresholds or Thresholds(**first.thresholds)
    return Plan.create(
        sites,
        grid=first.grid,
        sampler=sampler_of(first),
        model=first.model,
        token_order=TokenOrder.parse(first.token_order),
        text_policy=text_policy_of(first),
        cfg=_guidance(records, cfg),
        thresholds={
            "A": used.A,
            "C": used.C,
            "k": used.k,
            "rho": float(selection.rho),
            **({} if power is None else {"sample_power": power}),
            **repetition_settings(records, selection.gamma),
            **refiner.thresholds(),
            **{f"raised:{name}": value for name, value in selection.raised.items()},
        },
        inputs=CalibrationInputs(
            count=len(records),
            digest=inputs_digest([record.about for record in records], arguments),
        ),
        quality={
            **_quality(records, selection),
            **refiner.figures(),
            **repetition_figures(list(sites.values()), selection.gamma),
            **order_survey.figures(store.folder),
        },
    )


def refiner_of(
    share_steps: float | None, merge_budget: float | None, sample_power: float | None
) -> Refiner:
    """What refines the masks of a plan; the arguments are those of `CalibrationConfig`.

    Raises:
        OptionError: a value out of range.
    """
    # Steps that shared a sample would share its errors.
    return Refiner(share_steps if sample_power is None else None, merge_budget)


def _pattern(
    store: RunStore,
    records: Sequence[InputRecord],
    size: SiteSize,
    step: int,
    selection: Selection,
) -> BlockPattern:
    block = records[0].block
    rows, columns = -(-size.query_length // block[0]), -(-size.key_length // block[1])
    counts = np.zeros((size.heads, rows, columns), np.int32)
    votes = 0
    for record in records:
        if _as_recorded(size, selection):
            bits = store.tensor(record.name, f"{size.name}@{step}")
        else:
            bits = pack(_select_again(store, record, size, step, selection)[0])
        count_votes(counts, bits)
        votes += len(bits)
    mask = torch.from_numpy(agreement(counts, votes, selection.rho))
    forms = choose_forms(
        store,
        records,
        size,
        step,
        mask,
        gamma=selection.gamma,
        pooled=selection.pooled,
        kept=None
        if _as_recorded(size, selection)
        else lambda record: _select_again(store, record, size, step, selection)[1],
    )
    return BlockPattern.from_mask(
        mask,
        query_length=size.query_length,
        key_length=size.key_length,
        block=block,
        pooled=selection.pooled,
        repetitive=forms.repetitive,
        copies=forms.copies,
    )


def _as_recorded(size: SiteSize, selection: Selection) -> bool:
    """Whether the masks of a site are those that the run stored."""
    return selection.thresholds is None and size.name not in selection.raised


def _sampled(
    store: RunStore,
    records: Sequence[InputRecord],
    size: SiteSize,
    step: int,
    pattern: BlockPattern,
    power: float,
) -> BlockPattern:
    """Sample as many blocks as each row of a pattern keeps; those of text stay, with weight 1."""
    first = records[0]
    text = text_blocks(size.key_length, math.prod(first.grid), first.block[1], first.text)
    total = torch.zeros(
        (pattern.heads, pattern.query_blocks, pattern.key_blocks), dtype=torch.float64
    )
    votes = 0
    for record in records:
        energy = torch.from_numpy(store.energy(record, size.name, step))
        total += energy.double().sum(0)
        votes += len(energy)
    # Rows that a repetitive head does not compute have no blocks; their sample is not taken.
    least = 1 if text is None else max(1, int(text.sum()))
    counts = pattern.mask().sum(-1).clamp_min(least)
    drawn, weight = sample(total / votes, counts, power, text, step=step)
    return BlockPattern.from_mask(
        drawn,
        query_length=size.query_length,
        key_length=size.key_length,
        block=first.block,
        weight=weight,
        pooled=pattern.pooled,
        repetitive=pattern.repetitive,
        copies=pattern.copies,
    )


def _select_again(
    store: RunStore, record: InputRecord, size: SiteSize, step: int, selection: Selection
) -> tuple[torch.Tensor, torch.Tensor]:
    energy = torch.from_numpy(store.energy(record, size.name, step))
    thresholds = selection.thresholds or Thresholds(**record.thresholds)
    threshold = thresholds.at(record.positions[step], record.schedule_steps)
    threshold = min(1.0, threshold + selection.raised.get(size.name, 0.0))
    video = math.prod(record.grid)
    return select(
        energy,
        threshold,
        lengths=(size.query_length, size.key_length),
        video=video,
        block=record.block,
        text=record.text,
    )


def _guidance(records: Sequence[InputRecord], family: CfgMode) -> CfgMode:
    """How guidance was run: as observed; what the family does only where records do not say."""
    if any(record.batched for record in records):
        return "batched"
    guided = [record for record in records if record.guided]
    if not guided:
        return family if family == "embedded" else "none"
    return family if all(record.batched is None for record in guided) else "separate"


def _quality(records: Sequence[InputRecord], selection: Selection) -> dict[str, float]:
    def mean(by_site: Sequence[dict[str, tuple[float, ...]]]) -> float:
        values = [value for sites in by_site for steps in sites.values() for value in steps]
        return round(math.fsum(values) / len(values), 6)

    quality = {"best_20_percent_share": mean([record.best_share for record in records])}
    if selection.thresholds is None and not selection.raised:
        quality["input_kept_mass"] = mean([record.kept_mass for record in records])
    return quality
