"""Sharing and merging: they only add, within what was asked for, and count it exactly."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calibatt_compiler.errors import OptionError, PlanError
from calibatt_compiler.plan import (
    BlockPattern,
    Plan,
    SitePatterns,
    merge_intervals,
    share_steps,
)
from calibatt_compiler.plan.refine import Refiner
from calibatt_compiler.plan.text import fit_pattern


def plan_of(masks: Tensor) -> Plan:
    """A plan of one site: bool (steps, heads, query_blocks, key_blocks)."""
    steps, _, rows, columns = masks.shape
    return Plan.from_masks(
        {"a": masks},
        (1, 1, 1),
        [float(steps - step) for step in range(steps)],
        (16, 16),
        lengths={"a": (rows * 16, columns * 16)},
    )


def masks_of(plan: Plan) -> Tensor:
    return torch.stack([plan.block_mask("a", step) for step in range(plan.steps)])


@st.composite
def drifting(draw: st.DrawFn) -> Tensor:
    """Masks that change a little from step to step, as late steps do, at times much."""
    seed = draw(st.integers(0, 10_000))
    steps, columns = draw(st.integers(1, 7)), draw(st.integers(1, 19))
    change = draw(st.sampled_from([0.0, 0.02, 0.1, 0.5]))
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, 5, columns, generator=generator) < draw(st.floats(0.1, 0.9))
    masks = []
    for _ in range(steps):
        mask = mask ^ (torch.rand(mask.shape, generator=generator) < change)
        masks.append(mask.clone())
        masks[-1][..., int(torch.randint(columns, (), generator=generator))] = True
    return torch.stack(masks)


def groups(masks: Tensor, tau: Fraction) -> list[list[int]]:
    """The grouping rule by its words, over pairs of masks as sets."""
    found: list[list[int]] = []
    for step in reversed(range(len(masks))):
        if found:
            together = [*found[0], step]
            union = masks[together].any(0)
            ious = [
                Fraction(int((masks[m] & union).sum()), int((masks[m] | union).sum()))
                for m in together
            ]
            if min(ious) >= tau:
                found[0] = together
                continue
        found.insert(0, [step])
    return found


@given(drifting(), st.integers(1, 100))
@settings(max_examples=150, deadline=None)
def test_sharing_follows_its_rule_and_only_adds(masks: Tensor, percent: int) -> None:
    plan = plan_of(masks)
    shared = share_steps(plan, percent / 100)
    got = masks_of(shared)
    assert not (masks & ~got).any()
    for group in groups(masks, Fraction(percent, 100)):
        union = masks[group].any(0)
        assert all(torch.equal(got[step], union) for step in group)
        assert len({shared.sites["a"].steps[step] for step in group}) == 1
    for step in range(plan.steps):
        assert got[step].sum() * percent <= masks[step].sum() * 100
    added = shared.metadata.quality["share_steps_added_density"]
    assert added == pytest.approx(shared.density() - plan.density(), abs=1e-12)
    assert shared.metadata.thresholds["share_steps"] == percent / 100


@given(drifting())
@settings(max_examples=40, deadline=None)
def test_nothing_changes_at_the_neutral_settings(masks: Tensor) -> None:
    plan = plan_of(masks)
    for same in (share_steps(plan, 1.0), merge_intervals(plan, 0.0), merge_intervals(plan, 0)):
        assert torch.equal(masks_of(same), masks)
        assert same.sites == plan.sites or [p.digest for p in same.sites["a"].patterns] == [
            p.digest for p in plan.sites["a"].patterns
        ]
        assert [value for name, value in same.metadata.quality.items()] == [0.0]


def gaps_filled(mask: Tensor, allowed: int) -> Tensor:
    """Filling by its words: one gap at a time, always the narrowest, first come first served."""
    mask = mask.clone()
    while True:
        found = []
        for head, rows in enumerate(mask.tolist()):
            for row, blocks in enumerate(rows):
                kept = [c for c, keep in enumerate(blocks) if keep]
                for a, b in pairwise(kept):
                    if b - a > 1:
                        found.append((b - a - 1, head, row, a + 1, b))
        if not found:
            return mask
        width, head, row, start, end = min(found)
        if width > allowed:
            return mask
        mask[head, row, start:end] = True
        allowed -= width


@given(drifting(), st.integers(0, 60))
@settings(max_examples=150, deadline=None)
def test_merging_follows_its_rule_and_only_adds(masks: Tensor, percent: int) -> None:
    plan = plan_of(masks)
    merged = merge_intervals(plan, percent / 100)
    got = masks_of(merged)
    blocks = masks[0].numel()
    for step, mask in enumerate(masks):
        # Whole numbers: a budget of 29 % of 100 blocks is 29 blocks, not 28.
        assert torch.equal(got[step], gaps_filled(mask, percent * blocks // 100))
        assert int(got[step].sum() - mask.sum()) * 100 <= percent * blocks
        before, after = (p.sites["a"].at(step).intervals() for p in (plan, merged))
        assert len(after.starts) <= len(before.starts)
    added = merged.metadata.quality["merge_added_density"]
    assert added == pytest.approx(merged.density() - plan.density(), abs=1e-12)


@given(drifting(), st.floats(0, 0.5), st.floats(0, 0.5))
@settings(max_examples=40, deadline=None)
def test_a_larger_budget_fills_more(masks: Tensor, one: float, two: float) -> None:
    plan = plan_of(masks)
    small = masks_of(merge_intervals(plan, min(one, two)))
    large = masks_of(merge_intervals(plan, max(one, two)))
    assert not (small & ~large).any()


def test_the_budget_is_used_to_the_last_block() -> None:
    row = [True, False, True, False, False, True, False, True]
    mask = torch.tensor([row, row])[None, None]
    filled = [
        int(masks_of(merge_intervals(plan_of(mask), blocks / 16)).sum() - mask.sum())
        for blocks in range(10)
    ]
    # Four gaps of one block, then two of two.
    assert filled == [0, 1, 2, 3, 4, 4, 6, 6, 8, 8]


def test_early_steps_that_differ_keep_their_own_patterns() -> None:
    late = torch.rand(1, 8, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    late[..., 0] = True
    almost = late.clone()
    almost[0, 0, 1] ^= True
    early = torch.ones_like(late)
    shared = share_steps(plan_of(torch.stack([early, almost, late, almost])))
    assert shared.sites["a"].steps == (0, 1, 1, 1)
    assert shared.block_mask("a", 0).all()
    assert torch.equal(shared.block_mask("a", 2), late | almost)


def test_what_was_recorded_stays_and_additions_add_up(
    make_plan: Callable[..., Plan], tmp_path: Path
) -> None:
    plan = make_plan(sites=2, steps=4, grid=(3, 8, 40))
    refined = merge_intervals(share_steps(plan, 0.4), 0.05)
    twice = merge_intervals(refined, 0.05)
    assert refined.density() > plan.density()
    for new in (refined, twice):
        same = {"producer", "grid", "sampler", "model", "cfg", "inputs", "text_policy"}
        assert new.metadata.model_dump(include=same) == plan.metadata.model_dump(include=same)
        assert new.metadata.thresholds == {"share_steps": 0.4, "merge_budget": 0.05}
        added = sum(new.metadata.quality.values())
        assert plan.density() + added == pytest.approx(new.density(), abs=1e-12)
    assert twice.density() > refined.density()
    twice.save(tmp_path / "p")
    assert Plan.load(tmp_path / "p") == twice


def test_weights_and_unlike_pooling_are_not_merged() -> None:
    mask = torch.eye(6, dtype=torch.bool)[None]
    plain = BlockPattern.from_mask(mask, block=(16, 16))
    pooled = BlockPattern.from_mask(mask, block=(16, 16), pooled=4)
    with pytest.raises(PlanError, match="one size"):
        SitePatterns((plain, pooled), (0, 1))
    merged = Refiner(merge_budget=0.1).site(SitePatterns((pooled,), (0,)))
    assert merged.at(0).pooled == pooled.pooled
    weighted = BlockPattern.from_mask(mask, block=(16, 16), weight=2.0 * mask)
    for refiner in (Refiner(share_steps=0.5), Refiner(merge_budget=0.1)):
        with pytest.raises(PlanError, match="weights"):
            refiner.site(SitePatterns((weighted,), (0,)))
    with pytest.raises(PlanError, match="weights"):
        fit_pattern(weighted, (112, 112), video=90, position="last")


@pytest.mark.parametrize("tau", [0, -1, 1.01, float("nan"), "1", True])
def test_wrong_agreements_are_refused(make_plan: Callable[..., Plan], tau: object) -> None:
    with pytest.raises(OptionError, match="share_steps"):
        share_steps(make_plan(), tau)  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", [1, -0.1, float("nan"), "0", True])
def test_wrong_budgets_are_refused(make_plan: Callable[..., Plan], budget: object) -> None:
    with pytest.raises(OptionError, match="merge_budget"):
        merge_intervals(make_plan(), budget)  # type: ignore[arg-type]
