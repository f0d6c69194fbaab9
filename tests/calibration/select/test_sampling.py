"""Samples of blocks: exact counts, unbiased weights, certain blocks certain, each step anew."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibatt_compiler.calibration.select.sampling import draw, inclusion, rounded, sample
from calibatt_compiler.plan.weights import MAX_WEIGHT


def energies(seed: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    energy = torch.rand(2, 3, columns, generator=generator) ** 6
    counts = torch.randint(1, columns + 1, (2, 3), generator=generator)
    return energy / energy.sum(-1, keepdim=True), counts


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.sampled_from([0.5, 0.65, 1.0]))
def test_each_row_keeps_what_it_is_asked_for(seed: int, columns: int, power: float) -> None:
    energy, counts = energies(seed, columns)
    mask, weight = sample(energy, counts, power)
    assert torch.equal(mask.sum(-1), counts)
    assert (weight >= 1).all()
    full = counts == columns
    assert (weight[full] == 1).all()


def test_rows_of_hardly_any_energy_keep_no_block_more() -> None:
    """Chances have a least value; where that is above their share the others have less."""
    generator = torch.Generator().manual_seed(0)
    energy = torch.rand(2, 2000, 600, generator=generator, dtype=torch.float64) ** 80
    counts = torch.randint(1, 300, (2, 2000), generator=generator)
    mask, weight = sample(energy, counts, 1.0)
    assert torch.equal(mask.sum(-1), counts)
    assert (weight <= MAX_WEIGHT).all()


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40))
def test_probabilities_are_in_proportion_up_to_one(seed: int, columns: int) -> None:
    energy, counts = energies(seed, columns)
    score = energy.double() + 1e-3
    p = inclusion(score, counts)
    torch.testing.assert_close(p.sum(-1), counts.double())
    assert ((p > 0) & (p <= 1)).all()
    for head, row in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        open_ = p[head, row] < 1
        if not open_.any():
            continue
        ratio = p[head, row, open_] / score[head, row, open_]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
        certain = score[head, row, ~open_]
        # A certain block would have got at least 1 in that proportion.
        assert (certain * ratio[0] >= 1 - 1e-9).all()


def test_over_all_starts_a_block_comes_as_often_as_its_probability_says() -> None:
    energy = torch.linspace(1, 12, 12, dtype=torch.float64).expand(1, 1, 12) / 78
    p = inclusion(energy**0.65, torch.full((1, 1), 5))
    assert (p < 1).sum() > 6
    runs = 400
    starts = (torch.arange(runs, dtype=torch.float64) + 0.5).view(1, runs) / runs
    seen = draw(p.expand(1, runs, 12), starts)
    assert (seen.sum(-1) == 5).all()
    assert (seen.double().mean(1) - p[0]).abs().max() < 0.01


def test_what_is_kept_is_evenly_spread() -> None:
    p = torch.full((2, 50, 600), 0.2, dtype=torch.float64)
    mask = draw(p, torch.rand(2, 50, dtype=torch.float64))
    gaps = torch.cat([row.nonzero().flatten().diff() for row in mask.flatten(0, 1)])
    assert set(gaps.tolist()) <= {4, 5, 6}


def test_steps_draw_samples_of_their_own() -> None:
    """Over steps with the same energies each block is kept as often as its probability says."""
    generator = torch.Generator().manual_seed(0)
    energy = torch.rand(2, 10, 60, generator=generator) ** 3
    counts = torch.full((2, 10), 20)
    p = inclusion(energy.double(), counts)
    masks = torch.stack([sample(energy, counts, 1.0, step=step)[0] for step in range(50)])
    assert (masks.double().mean(0) - p).abs().max() < 0.06
    # Neighbours have what is certain in common, and of the rest less than independent draws would.
    open_ = p < 1
    both = (masks[1:] & masks[:-1] & open_).double().sum((1, 2, 3)).mean()
    assert both < 0.95 * (p[open_] ** 2).sum()


@settings(deadline=None)
@given(st.floats(1.0, MAX_WEIGHT))
def test_weights_are_rounded_to_half_octaves(weight: float) -> None:
    exact = torch.tensor([weight], dtype=torch.float64)
    found = rounded(exact)
    assert ((found / exact).log2().abs() <= 0.25 + 1e-9).all() or weight > MAX_WEIGHT / 2**0.5
    assert (found >= 1).all()
    assert (found <= MAX_WEIGHT).all()
    assert (2 * found.log2()).frac().abs().max() < 1e-9


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_blocks_of_text_are_certain(seed: int) -> None:
    energy, counts = energies(seed, 10)
    always = torch.zeros(10, dtype=torch.bool)
    always[-2:] = True
    counts = counts.clamp_min(2)
    mask, weight = sample(energy, counts, 0.65, always)
    assert mask[..., -2:].all()
    assert (weight[..., -2:] == 1).all()
    assert torch.equal(mask.sum(-1), counts)


def test_the_same_energies_give_the_same_sample() -> None:
    energy, counts = energies(5, 20)
    one, two = sample(energy, counts, 0.65), sample(energy.clone(), counts, 0.65)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
