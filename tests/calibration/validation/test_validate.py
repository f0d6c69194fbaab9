"""What a plan keeps on held-out inputs: the figures, the flags, and raised thresholds."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import calibatt_compiler
from calibatt_compiler import Plan
from calibatt_compiler.calibration import CalibrationConfig, calibrate, plan_from_run, validate_run
from calibatt_compiler.calibration.store.run_folder import RunStore
from calibatt_compiler.calibration.validation.kept_mass import KeptMass, kept_share
from calibatt_compiler.errors import CalibrationError, OptionError, PlanMismatchError

CONFIG = CalibrationConfig(block=(16, 16), keep_energies=True)
PROMPTS, HELD_OUT = ["a big rabbit runs", "the small bird"], ["the bird flies", "a tree"]
SITES = ("blocks.0.attn1", "blocks.1.attn1")


@pytest.fixture(scope="module")
def runs(
    tiny_wan_pipeline: Any,
    tiny_wan_arguments: dict[str, int],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with a plan, its run, and a run on held-out inputs, all with energies."""
    folder = tmp_path_factory.mktemp("validation")
    for name, prompts, seed in (("plan", PROMPTS, 1), ("other", HELD_OUT, 50)):
        out = folder / f"{name}.calibatt"
        calibrate(tiny_wan_pipeline, prompts, seed, out=out, config=CONFIG, **tiny_wan_arguments)
    return folder


@pytest.fixture
def plan(runs: Path) -> Plan:
    return Plan.load(runs / "plan.calibatt")


@given(st.integers(0, 1000), st.integers(1, 9))
def test_kept_share_is_a_sum_over_kept_blocks(seed: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    energy = torch.rand(2, 3, 4, columns, generator=generator)
    energy[0, 0, 0] = 0
    mask = torch.rand(3, 4, columns, generator=generator) < 0.5
    got = kept_share(energy, mask)
    for index in np.ndindex(2, 3, 4):
        row = energy[index].tolist()
        kept = sum(e for e, keep in zip(row, mask[index[1:]].tolist(), strict=True) if keep)
        expected = kept / sum(row) if sum(row) else 1.0
        assert got[index].item() == pytest.approx(expected, rel=1e-6)
    assert (kept_share(energy, mask | True) == 1).all()


def test_figures_are_those_of_the_stored_energies(runs: Path, plan: Plan) -> None:
    store = RunStore(runs / "other.calibatt.calibration")
    validation = validate_run(store.folder, plan)
    assert [site.site for site in validation.sites] == list(SITES)
    assert (validation.inputs, validation.held_out) == (2, True)
    for site in validation.sites:
        rows = np.empty((plan.steps, 2, 2, 12))
        for step in range(plan.steps):
            mask = plan.block_mask(site.site, step).numpy()
            for i, name in enumerate(store.names()):
                energy = store.tensor(name, f"{site.site}@{step}/energy")[0].astype(np.float64)
                rows[step, i] = (energy * mask).sum(-1) / energy.sum(-1)
        assert site.kept == pytest.approx(rows.mean((1, 2, 3)))
        assert site.mean == pytest.approx(rows.mean())
        assert site.worst_head == pytest.approx(rows.mean((1, 3)).min())
        assert site.worst_row == pytest.approx(rows.min())
        thresholds = CONFIG.thresholds(3)
        wanted = [thresholds.at(step, 3) for step in range(3)]
        assert site.thresholds == pytest.approx(wanted)
        missing = np.array(wanted) - rows.mean((1, 2, 3))
        assert site.worst_step == missing.argmax()
        assert site.shortfall == pytest.approx(missing.max())


def test_the_pipeline_and_its_stored_energies_say_the_same(
    runs: Path,
    plan: Plan,
    tiny_wan_pipeline: Any,
    tiny_wan_arguments: dict[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe = tiny_wan_pipeline
    attributes = set(pipe.transformer.__dict__)
    stored = validate_run(runs / "other.calibatt.calibration", runs / "plan.calibatt")
    monkeypatch.chdir(tmp_path)
    live = calibatt_compiler.validate(pipe, plan, HELD_OUT, 50, **tiny_wan_arguments)
    assert live == stored
    assert not list(tmp_path.iterdir())
    assert set(pipe.transformer.__dict__) == attributes
    again = calibatt_compiler.validate(pipe, plan, PROMPTS, seeds=1, **tiny_wan_arguments)
    assert not again.held_out
    folder = runs / "plan.calibatt.calibration"
    assert validate_run(folder, plan) == again
    # A block that any input keeps is kept: then each input keeps at least its thresholds.
    own = validate_run(folder, plan_from_run(folder, rho=0.01), margin=0)
    assert all(site.shortfall <= 1e-6 for site in own.sites)
    assert not own.flagged
    assert not own.held_out


def test_one_array_of_energies_is_in_memory_at_a_time(
    runs: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0
    original = RunStore.energy

    def energy(self: RunStore, *arguments: Any) -> Any:
        nonlocal most
        found = original(self, *arguments).view(Tracked)
        alive.add(found)
        most = max(most, len(alive))
        return found

    monkeypatch.setattr(RunStore, "energy", energy)
    validate_run(runs / "other.calibatt.calibration", plan)
    # The one before is let go of when the next one takes its name.
    assert 1 <= most <= 2


class Tracked(np.ndarray):
    __hash__ = object.__hash__  # type: ignore[assignment]


def test_raised_thresholds_keep_more_where_it_was_too_little(runs: Path) -> None:
    folder, other = runs / "plan.calibatt.calibration", runs / "other.calibatt.calibration"
    # Blocks that all inputs must agree on hold less than the threshold.
    plan = plan_from_run(folder, rho=1)
    first = validate_run(other, plan, margin=0)
    assert first.flagged
    amounts = first.raised()
    assert amounts == {site.site: round(site.shortfall, 6) for site in first.flagged}
    raised = plan_from_run(folder, rho=1, raised=amounts)
    second = validate_run(other, raised, margin=0)
    for before, after in zip(first.sites, second.sites, strict=True):
        masks = [
            [plan.block_mask(before.site, step), raised.block_mask(before.site, step)]
            for step in range(plan.steps)
        ]
        if before.site in amounts:
            assert not any((old & ~new).any() for old, new in masks)
            assert after.shortfall < before.shortfall
            recorded = raised.metadata.thresholds[f"raised:{before.site}"]
            assert recorded == amounts[before.site]
        else:
            assert all(torch.equal(old, new) for old, new in masks)
            assert after == before
    assert raised.density() > plan.density()
    one = plan_from_run(folder, rho=1, raised={SITES[0]: 1.0})
    assert one.density(SITES[0]) > plan.density(SITES[0])
    assert one.density(SITES[1]) == plan.density(SITES[1])


def test_the_margin_decides_which_sites_are_flagged(runs: Path) -> None:
    other = runs / "other.calibatt.calibration"
    plan = plan_from_run(runs / "plan.calibatt.calibration", rho=1)
    shortfalls = sorted(site.shortfall for site in validate_run(other, plan).sites)
    assert shortfalls[-1] > 0
    assert not validate_run(other, plan, margin=max(0, shortfalls[-1])).flagged
    assert validate_run(other, plan, margin=shortfalls[-1] * 0.99).flagged
    for wrong in (-0.1, 2, True, "0.1"):
        with pytest.raises(OptionError, match="margin"):
            validate_run(other, plan, margin=wrong)  # type: ignore[arg-type]


def test_masks_without_thresholds_are_measured_and_never_flagged(runs: Path, plan: Plan) -> None:
    masks = {
        name: torch.stack([plan.block_mask(name, step) for step in range(3)]) for name in SITES
    }
    tokens = math.prod(plan.grid)
    own = Plan.from_masks(
        masks, plan.grid, plan.timesteps, (16, 16), lengths=dict.fromkeys(SITES, (tokens, tokens))
    )
    found = validate_run(runs / "other.calibatt.calibration", own, margin=0)
    known = validate_run(runs / "other.calibatt.calibration", plan, margin=0)
    assert [site.kept for site in found.sites] == [site.kept for site in known.sites]
    assert not found.flagged
    assert found.sites[0].worst_step == int(np.argmin(found.sites[0].kept))
    assert found.to_dict()["sites"][0]["shortfall"] is None


@pytest.mark.slow
def test_what_does_not_fit_is_refused(
    runs: Path,
    plan: Plan,
    tiny_wan_pipeline: Any,
    tiny_wan_arguments: dict[str, int],
    tmp_path: Path,
) -> None:
    pipe, folder = tiny_wan_pipeline, runs / "plan.calibatt.calibration"
    one_step = {**tiny_wan_arguments, "num_inference_steps": 1}
    other_size = {**one_step, "height": 96}
    with pytest.raises(CalibrationError, match="don't fit the plan"):
        calibatt_compiler.validate(pipe, plan, HELD_OUT[:1], **other_size)
    config = CalibrationConfig(block=(16, 16), form="masks", run_folder=tmp_path / "bare")
    calibrate(pipe, PROMPTS, config=config, **one_step)
    with pytest.raises(CalibrationError, match="were not kept"):
        validate_run(tmp_path / "bare", plan)
    with pytest.raises(CalibrationError, match="were not kept"):
        plan_from_run(tmp_path / "bare", raised={SITES[0]: 0.1})
    calibrate(pipe, PROMPTS, config=replace(config, block=(48, 48), restart=True), **one_step)
    with pytest.raises(CalibrationError, match="don't fit the plan"):
        validate_run(tmp_path / "bare", plan)
    for wrong in ({"elsewhere": 0.1}, {SITES[0]: -0.1}, {SITES[0]: 2}):
        with pytest.raises(OptionError, match="raised"):
            plan_from_run(folder, raised=wrong)
    masks = {"elsewhere": torch.ones(3, 2, 12, 12, dtype=torch.bool)}
    lengths = {"elsewhere": (189, 189)}
    foreign = Plan.from_masks(masks, plan.grid, plan.timesteps, (16, 16), lengths=lengths)
    with pytest.raises(CalibrationError, match="not every site"):
        validate_run(folder, foreign)
    identity = plan.metadata.model
    assert identity is not None
    changed = identity.model_copy(update={"config_digest": "0" * 64})
    metadata = plan.metadata.model_copy(update={"model": changed})
    with pytest.raises(PlanMismatchError):
        calibatt_compiler.validate(pipe, Plan(metadata, plan.sites), HELD_OUT, **one_step)
    with pytest.raises(CalibrationError, match="no step for a timestep"):
        KeptMass(plan).add(SITES[0], 5000.0, torch.ones(1, 2, 6, 6), 0, 3)
