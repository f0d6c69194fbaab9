"""Plan: building, arithmetic, finding the step, and that nothing in it can be changed."""

from __future__ import annotations

import dataclasses
import math

import pydantic
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibatt_compiler.errors import PlanError
from calibatt_compiler.plan import BlockPattern, Plan, Sampler, SitePatterns
from calibatt_compiler.plan.order import TokenOrder

BLOCK = (16, 16)
GRID = (1, 4, 8)  # two blocks of 16 tokens


def plan_with(timesteps: list[float]) -> Plan:
    masks = torch.ones(len(timesteps), 1, 2, 2, dtype=torch.bool)
    return Plan.from_masks({"a": masks}, grid=GRID, timesteps=timesteps, block=BLOCK)


def test_masks_come_back_as_given():
    masks = torch.ones(3, 2, 2, 2, dtype=torch.bool)
    masks[1, 0, 0, 1] = masks[2, 1, 1, 0] = False
    plan = Plan.from_masks({"a": masks, "b": masks[:, :1]}, GRID, [3.0, 2.0, 1.0], BLOCK)
    assert list(plan.sites) == ["a", "b"]
    assert plan.grid == GRID
    assert plan.timesteps == (3.0, 2.0, 1.0)
    assert plan.steps == 3
    for step in range(3):
        assert torch.equal(plan.block_mask("a", step), masks[step])
    assert torch.equal(plan.block_mask("a", -1), masks[2])
    assert plan.sites["b"].heads == 1
    assert plan.metadata.text_policy == "none"
    assert "2 sites, 3 steps" in repr(plan)


def test_equal_steps_are_stored_once():
    one = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    other = one.clone()
    other[..., 0, 1] = False
    plan = Plan.from_masks({"a": torch.cat([one, other, one])}, GRID, [3, 2, 1], BLOCK)
    assert plan.sites["a"].steps == (0, 1, 0)
    assert len(plan.sites["a"].patterns) == 2


def test_density_counts_blocks():
    small = torch.tensor([[[[True, False], [False, True]]], [[[True, True], [False, True]]]])
    large = torch.ones(2, 3, 2, 2, dtype=torch.bool)
    plan = Plan.from_masks({"small": small, "large": large}, GRID, [2.0, 1.0], BLOCK)
    assert plan.density("small", 0) == 2 / 4
    assert plan.density("small", 1) == 3 / 4
    assert plan.density("small") == 5 / 8
    assert plan.density(step=0) == (2 + 12) / 16
    assert plan.density() == (5 + 24) / 32
    assert plan.metadata.sites[0].density == (0.5, 0.75)


def test_sites_may_be_rectangular_and_hold_text():
    mask = torch.ones(1, 2, 3, 4, dtype=torch.bool)
    plan = Plan.from_masks({"a": mask}, GRID, [1.0], BLOCK, lengths={"a": (40, 50)})
    assert (plan.sites["a"].query_length, plan.sites["a"].key_length) == (40, 50)
    assert plan.metadata.text_policy == "in_mask"


def test_digest_is_stable_and_covers_everything():
    masks = torch.ones(2, 1, 2, 2, dtype=torch.bool)
    build = Plan.from_masks
    base = build({"a": masks}, GRID, [2.0, 1.0], BLOCK)
    same = build({"a": masks.clone()}, GRID, [2.0, 1.0], BLOCK)
    assert base == same
    assert hash(base) == hash(same)
    changed = masks.clone()
    changed[1, 0, 1, 0] = False
    others = [
        build({"a": changed}, GRID, [2.0, 1.0], BLOCK),
        build({"b": masks}, GRID, [2.0, 1.0], BLOCK),
        build({"a": masks}, (2, 4, 4), [2.0, 1.0], BLOCK),
        build({"a": masks}, GRID, [2.0, 1.5], BLOCK),
        build({"a": masks}, (1, 4, 16), [2.0, 1.0], (32, 32)),
    ]
    assert len({plan.digest for plan in [base, *others]}) == 6
    assert base != "a plan"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"masks": {}}, "at least one site"),
        ({"masks": {"a": torch.ones(2, 1, 2, 2)}}, "site 'a' has the wrong form"),
        ({"masks": {"a": torch.ones(1, 2, 2, dtype=torch.bool)}}, "wrong form"),
        ({"masks": {"a": torch.ones(3, 1, 2, 2, dtype=torch.bool)}}, "steps = 2"),
        ({"masks": {"a": torch.ones(2, 1, 3, 2, dtype=torch.bool)}}, "does not cover"),
        ({"masks": {"a": torch.zeros(2, 1, 2, 2, dtype=torch.bool)}}, "site 'a'.*no kept"),
        ({"masks": {"": torch.ones(2, 1, 2, 2, dtype=torch.bool)}}, "name"),
        ({"masks": {"x" * 501: torch.ones(2, 1, 2, 2, dtype=torch.bool)}}, "name"),
        ({"masks": {"__metadata__": torch.ones(2, 1, 2, 2, dtype=torch.bool)}}, "this name"),
        ({"grid": (1, 4, 9)}, r"36 tokens needs lengths=\{'a'"),
        ({"grid": (0, 4, 8)}, "query_length"),
        ({"grid": (-1, -4, 8)}, "grid"),
        ({"grid": (4, 8)}, "grid"),
        ({"grid": (1.0, 4, 8)}, "grid"),
        ({"timesteps": [1.0, math.nan]}, "strictly falling or strictly rising"),
        ({"timesteps": [math.inf, 1.0]}, "strictly falling"),
        ({"timesteps": [1.0, 1.0]}, "strictly falling"),
        ({"timesteps": ["late", "early"]}, "strictly falling"),
        ({"timesteps": []}, "no sampler"),
        ({"block": (16, 20)}, "multiple of 16"),
        ({"lengths": {"a": (33, 33)}}, "does not cover"),
        ({"lengths": {"b": (32, 32)}}, "lengths name sites that have no mask"),
    ],
)
def test_what_makes_no_plan_is_refused(change: dict[str, object], problem: str):
    arguments: dict[str, object] = {
        "masks": {"a": torch.ones(2, 1, 2, 2, dtype=torch.bool)},
        "grid": GRID,
        "timesteps": [2.0, 1.0],
        "block": BLOCK,
    }
    with pytest.raises(PlanError, match=f"(?s){problem}"):
        Plan.from_masks(**(arguments | change))  # type: ignore[arg-type]


def test_timesteps_may_be_a_tensor_in_any_order():
    masks = torch.ones(3, 1, 2, 2, dtype=torch.bool)
    for values in ([0.0, 0.5, 1.0], [999, 500, 1]):
        plan = Plan.from_masks({"a": masks}, GRID, torch.tensor(values), BLOCK)
        assert plan.timesteps == tuple(float(value) for value in values)


def test_sites_must_be_made_of_like_patterns():
    small, large = BlockPattern.dense(1, 32, 32, BLOCK), BlockPattern.dense(1, 48, 48, BLOCK)
    with pytest.raises(PlanError, match="one size"):
        SitePatterns.share([small, large])
    with pytest.raises(PlanError, match="one size"):
        SitePatterns((), ())
    with pytest.raises(PlanError, match="has no pattern"):
        SitePatterns((small,), (0, 1))


def test_every_site_needs_every_step():
    site = SitePatterns.share([BlockPattern.dense(1, 32, 32, BLOCK)])
    with pytest.raises(PlanError, match="site a has 1 steps, the sampler has 2"):
        Plan.create({"a": site}, grid=GRID, sampler=Sampler(timesteps=(2.0, 1.0)))


@pytest.mark.parametrize("timesteps", [[900.0, 600.0, 100.0], [100.0, 600.0, 900.0]])
def test_nearest_step_serves(timesteps: list[float]):
    plan = plan_with(timesteps)
    at = {value: step for step, value in enumerate(timesteps)}
    for asked, nearest in (
        (900, 900),
        (760, 900),
        (740, 600),
        (351, 600),
        (349, 100),
        (100, 100),
        (1049, 900),  # half a step past the first
        (-149, 100),  # half a step past the last
    ):
        assert plan.step_of(asked) == at[nearest], asked
    for outside in (1060, 1e9, -151, -1e9, math.nan, math.inf, -math.inf):
        assert plan.step_of(outside) is None, outside


def test_single_step_has_no_neighbours():
    plan = plan_with([500.0])
    assert plan.step_of(500.0) == 0
    assert plan.step_of(float(torch.tensor(500.7).bfloat16())) == 0
    assert plan.step_of(510.0) is None
    assert plan.step_of(0.0) is None


@given(st.lists(st.floats(0, 1000, width=32), min_size=1, max_size=60, unique=True))
@settings(deadline=None, max_examples=100)
def test_every_timestep_finds_its_own_step(values: list[float]):
    plan = plan_with(sorted(values, reverse=True))
    for step, value in enumerate(plan.timesteps):
        assert plan.step_of(value) == step


@pytest.mark.parametrize("steps", [1, 4, 16, 50])
def test_timesteps_rounded_to_bfloat16_are_inside_the_range(steps: int):
    plan = plan_with(torch.linspace(999.7, 3.3, steps).tolist())
    for step, value in enumerate(plan.timesteps):
        rounded = float(torch.tensor(value).bfloat16())
        found = plan.step_of(rounded)
        assert found is not None
        nearest = min(abs(other - rounded) for other in plan.timesteps)
        assert abs(plan.timesteps[found] - rounded) == nearest
        if steps <= 16:  # steps are further apart than bfloat16 rounds
            assert found == step


@pytest.mark.parametrize("call", [lambda p: p.density("b"), lambda p: p.block_mask("b", 0)])
def test_unknown_sites_are_named(call):
    with pytest.raises(PlanError, match=r"(?s)one of a.*'b'"):
        call(plan_with([1.0]))


@pytest.mark.parametrize("step", [2, -3])
def test_unknown_steps_are_named(step: int):
    plan = plan_with([2.0, 1.0])
    for call in (lambda: plan.density(step=step), lambda: plan.block_mask("a", step)):
        with pytest.raises(PlanError, match="0 to 1"):
            call()


def test_nothing_can_be_changed():
    plan = Plan.create(
        {"a": SitePatterns.share([BlockPattern.dense(1, 32, 32, BLOCK)])},
        grid=GRID,
        sampler=Sampler(timesteps=(1.0,)),
        thresholds={"A": 0.8},
        quality={"psnr": 30.0},
    )
    site = plan.sites["a"]
    before = plan.digest
    with pytest.raises(TypeError):
        plan.sites["b"] = site  # type: ignore[index]
    with pytest.raises(TypeError):
        plan.metadata.thresholds["A"] = 0.1  # type: ignore[index]
    with pytest.raises(TypeError):
        plan.metadata.quality["psnr"] = 99.0  # type: ignore[index]
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        plan.metadata.grid = (1, 1, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        site.steps = (0, 0)  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        site.at(0).bits[...] = 0
    for name in ("timesteps", "grid", "sites", "metadata"):
        with pytest.raises(AttributeError):
            setattr(plan, name, None)
    plan.block_mask("a", 0).zero_()  # a copy
    plan.sites["a"].at(0).mask().zero_()
    assert plan.density() == 1
    assert Plan(plan.metadata, plan.sites).digest == before


def test_weights_pooling_and_token_order_are_stored(tmp_path):
    grid, timesteps = (2, 4, 8), [3.0, 2.0]
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(2, 3, 4, 4, generator=generator) < 0.6
    mask |= torch.eye(4, dtype=torch.bool)
    weight = 1 + torch.rand(3, 4, 4, generator=generator)
    sites = {
        "plain": [BlockPattern.from_mask(m, block=(16, 16)) for m in mask],
        "pooled": [BlockPattern.from_mask(m, block=(16, 16), pooled=2) for m in mask],
        # The second pattern has no weights: what is read back must be that very pattern.
        "weighted": [
            BlockPattern.from_mask(mask[0], block=(16, 16), weight=weight),
            BlockPattern.from_mask(mask[1], block=(16, 16)),
        ],
    }
    plan = Plan.create(
        {name: SitePatterns.share(patterns) for name, patterns in sites.items()},
        grid=grid,
        sampler=Sampler(timesteps=tuple(timesteps)),
        token_order=TokenOrder((1, 2, 2)),
    )
    assert plan.metadata.requires == ("kept_weights", "pooled_keys", "token_order")
    plan.save(tmp_path / "a.calibatt")
    read = Plan.load(tmp_path / "a.calibatt")
    assert read == plan
    assert read.token_order == TokenOrder((1, 2, 2))
    for name, patterns in sites.items():
        for step, pattern in enumerate(patterns):
            assert read.sites[name].at(step).digest == pattern.digest
    assert read.sites["pooled"].at(0).pooled == 2
    plain = Plan.from_masks({"a": mask}, grid, timesteps, (16, 16))
    assert plain.metadata.requires == ()


def test_a_token_order_must_fit_the_sequences():
    pattern = BlockPattern.dense(1, 64, 32, (16, 16))
    with pytest.raises(PlanError, match="a sequence has 32"):
        Plan.create(
            {"a": SitePatterns.share([pattern])},
            grid=(2, 4, 8),
            sampler=Sampler(timesteps=(1.0,)),
            token_order=TokenOrder((1, 2, 2)),
        )
