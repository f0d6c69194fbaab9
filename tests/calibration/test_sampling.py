"""Samples of blocks: exact counts, unbiased weights, certain blocks certain."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibatt_compiler.calibration import sampling
from calibatt_compiler.calibration.sampling import inclusion, sample


def draw(seed: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    energy = torch.rand(2, 3, columns, generator=generator) ** 6
    counts = torch.randint(1, columns + 1, (2, 3), generator=generator)
    return energy / energy.sum(-1, keepdim=True), counts


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.sampled_from([0.5, 0.65, 1.0]))
def test_each_row_keeps_what_it_is_asked_for(seed: int, columns: int, power: float) -> None:
    energy, counts = draw(seed, columns)
    mask, weight = sample(energy, counts, power)
    assert torch.equal(mask.sum(-1), counts)
    assert (weight >= 1).all()
    full = counts == columns
    assert (weight[full] == 1).all()


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40))
def test_probabilities_are_in_proportion_up_to_one(seed: int, columns: int) -> None:
    energy, counts = draw(seed, columns)
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


def test_over_all_starts_a_block_comes_as_often_as_its_probability_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    energy = torch.linspace(1, 12, 12).expand(2, 3, 12) / 78
    counts = torch.full((2, 3), 5)
    p = inclusion(energy.double().clamp_min(sampling.LOWEST) ** 0.65, counts)
    seen, sums = torch.zeros_like(p), torch.zeros_like(p)
    runs = 400
    for run in range(runs):
        monkeypatch.setattr(sampling, "GOLDEN", (run + 0.5) / runs)
        mask, weight = sample(energy[:1, :1], counts[:1, :1], 0.65)
        seen[:1, :1] += mask
        sums[:1, :1] += mask * weight
    assert (seen[0, 0] / runs - p[0, 0]).abs().max() < 0.01
    often = p[0, 0] > 0.05
    assert often.sum() > (p[0, 0] == 1).sum()
    assert (sums[0, 0] / runs - 1)[often].abs().max() < 0.1


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_blocks_of_text_are_certain(seed: int) -> None:
    energy, counts = draw(seed, 10)
    always = torch.zeros(10, dtype=torch.bool)
    always[-2:] = True
    counts = counts.clamp_min(2)
    mask, weight = sample(energy, counts, 0.65, always)
    assert mask[..., -2:].all()
    assert (weight[..., -2:] == 1).all()
    assert torch.equal(mask.sum(-1), counts)


def test_the_same_energies_give_the_same_sample() -> None:
    energy, counts = draw(5, 20)
    one, two = sample(energy, counts, 0.65), sample(energy.clone(), counts, 0.65)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
