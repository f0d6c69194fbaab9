"""Covering sets and agreement, against plain Python and by their defining properties."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibatt_compiler.calibration.select.selection import (
    UNITS,
    agreement,
    best_share,
    count_votes,
    covering_mask,
    pack,
    select,
    to_units,
)
from calibatt_compiler.plan import BlockPattern
from calibatt_compiler.plan.text import text_blocks

rows = st.lists(st.integers(0, 12), min_size=1, max_size=9).filter(any)
thresholds = st.floats(0.01, 1.0)


def cover(row: list[int], threshold: float) -> set[int]:
    """The smallest covering set by definition: of the smallest, the one of highest energy."""
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    kept: list[int] = []
    while not kept or Fraction(sum(row[i] for i in kept), sum(row)) < Fraction(threshold):
        kept.append(order[len(kept)])
    return set(kept)


def energies(row: list[int]) -> torch.Tensor:
    """A row whose energies are whole in units, so that exact arithmetic is a fair reference."""
    return torch.tensor(row, dtype=torch.float64) / 16


@given(rows, thresholds)
def test_covering_mask_is_the_definition(row: list[int], threshold: float) -> None:
    # Thresholds are rounded up to whole units of the row's energy, which the reference is not.
    threshold = round(threshold * 1024) / 1024
    mask, kept = covering_mask(energies(row), threshold)
    expected = cover(row, threshold)
    assert set(mask.nonzero().flatten().tolist()) == expected
    assert kept.item() == pytest.approx(sum(row[i] for i in expected) / sum(row))


@given(rows, thresholds)
@settings(max_examples=60)
def test_no_smaller_set_covers(row: list[int], threshold: float) -> None:
    mask, kept = covering_mask(energies(row), threshold)
    size = int(mask.sum())
    assert kept.item() >= threshold - 1e-12
    for smaller in itertools.combinations(row, size - 1):
        assert sum(smaller) / sum(row) < threshold or size == 1


@given(rows, thresholds, thresholds)
def test_a_higher_threshold_keeps_more(row: list[int], one: float, two: float) -> None:
    low, _ = covering_mask(energies(row), min(one, two))
    high, _ = covering_mask(energies(row), max(one, two))
    assert not (low & ~high).any()


def test_ties_go_to_the_lower_index() -> None:
    mask, _ = covering_mask(torch.tensor([0.1, 0.3, 0.3, 0.3]), 0.5)
    assert mask.tolist() == [False, True, True, False]


def test_everything_is_kept_at_threshold_one_but_zeros() -> None:
    mask, kept = covering_mask(torch.tensor([0.5, 0.0, 0.5, 0.0]), 1.0)
    assert mask.tolist() == [True, False, True, False]
    assert kept.item() == 1.0


def test_a_row_without_energy_keeps_one_block() -> None:
    mask, kept = covering_mask(torch.zeros(2, 5), 0.9)
    assert mask.sum(-1).tolist() == [1, 1]
    assert kept.tolist() == [0.0, 0.0]


def test_rows_need_not_sum_to_one() -> None:
    # As after rounding to bfloat16: the threshold is a share of what is there.
    row = torch.tensor([0.5, 0.3, 0.1, 0.05])
    assert covering_mask(row, 0.99)[0].tolist() == [True] * 4
    assert torch.equal(covering_mask(row, 0.8)[0], covering_mask(row / row.sum(), 0.8)[0])


def test_forced_blocks_are_kept_and_count() -> None:
    row = torch.tensor([0.02, 0.5, 0.28, 0.2])
    always = torch.tensor([True, False, False, True])
    mask, kept = covering_mask(row, 0.7, always)
    assert mask.tolist() == [True, True, False, True]
    assert kept.item() == pytest.approx(0.72)
    mask, kept = covering_mask(row, 0.2, always)
    assert mask.tolist() == [True, False, False, True]


def test_masks_do_not_depend_on_batching() -> None:
    energy = torch.rand(3, 4, 7, 11, generator=torch.Generator().manual_seed(0)).softmax(-1)
    whole, kept = covering_mask(energy, 0.6)
    for index in np.ndindex(3, 4, 7):
        mask, share = covering_mask(energy[index], 0.6)
        assert torch.equal(mask, whole[index])
        assert share == kept[index]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_gpu_and_cpu_select_the_same() -> None:
    energy = torch.rand(2, 8, 40, 591, generator=torch.Generator().manual_seed(0)).pow(4)
    energy = (energy / energy.sum(-1, keepdim=True)).round(decimals=4)  # with many ties
    for threshold in (0.3, 0.84, 0.99):
        cpu, kept = covering_mask(energy, threshold)
        gpu, same = covering_mask(energy.cuda(), threshold)
        assert torch.equal(cpu, gpu.cpu())
        assert torch.equal(kept, same.cpu())
        assert np.array_equal(pack(cpu), pack(gpu))


@pytest.mark.parametrize("fraction", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("blocks", [1, 5, 7, 16])
def test_best_share_of_uniform_energy_is_the_fraction(fraction: float, blocks: int) -> None:
    share = best_share(torch.full((2, blocks), 1 / blocks), fraction)
    assert share.tolist() == pytest.approx([fraction] * 2)


def test_best_share_takes_the_best() -> None:
    row = torch.tensor([0.05, 0.6, 0.1, 0.2, 0.05])
    assert best_share(row, 0.2).item() == pytest.approx(0.6)
    assert best_share(row, 0.3).item() == pytest.approx(0.6 + 0.5 * 0.2)


@given(st.lists(st.lists(st.booleans(), min_size=13, max_size=13), min_size=1, max_size=4))
def test_packed_bits_are_those_of_a_pattern(masks: list[list[bool]]) -> None:
    mask = torch.tensor(masks)
    assert np.array_equal(pack(mask), np.packbits(mask.numpy(), axis=-1, bitorder="little"))
    whole = mask[None] | torch.eye(1, 13, dtype=torch.bool)
    pattern = BlockPattern.from_mask(whole, block=(16, 16))
    assert np.array_equal(pack(whole), pattern.bits)


def agree(votes: list[list[int]], rho: Fraction) -> list[int]:
    """Agreement of one row by definition."""
    means = [Fraction(sum(column), len(votes)) for column in zip(*votes, strict=True)]
    kept = [i for i, mean in enumerate(means) if mean >= rho]
    return kept or [means.index(max(means))]


@given(
    st.lists(st.lists(st.integers(0, 1), min_size=6, max_size=6), min_size=1, max_size=7),
    st.integers(0, 20),
)
def test_agreement_is_the_definition(votes: list[list[int]], twentieths: int) -> None:
    counts = np.zeros((1, 1, 6), np.int32)
    masks = torch.tensor(votes, dtype=torch.bool)[:, None, None]
    for mask in masks:
        count_votes(counts, pack(mask[None]))
    assert counts.ravel().tolist() == np.sum(votes, 0).tolist()
    kept = agreement(counts, len(votes), twentieths / 20)
    assert kept.ravel().nonzero()[0].tolist() == agree(votes, Fraction(twentieths, 20))


@given(st.lists(st.integers(0, 10), min_size=1, max_size=8), st.floats(0.05, 1), st.floats(0.05, 1))
def test_agreement_falls_with_rho(counts: list[int], one: float, two: float) -> None:
    array = np.asarray(counts, np.int32)[None, None]
    low, high = agreement(array, 10, min(one, two)), agreement(array, 10, max(one, two))
    strict = (array / 10 >= max(one, two)).any()
    assert low.any()
    assert high.any()
    if strict:  # a row that falls back keeps its best block, which the lower rho keeps too
        assert not (high & ~low).any()
    assert high.sum() <= low.sum()


def test_an_empty_row_keeps_its_most_agreed_block() -> None:
    counts = np.asarray([[[1, 2, 2, 0], [4, 0, 1, 4]]], np.int32)
    assert agreement(counts, 8, 0.5).tolist() == [
        [[False, True, False, False], [True, False, False, True]]
    ]


def test_units_are_exact_to_far_below_a_threshold() -> None:
    assert to_units(torch.tensor([1.0, 0.5, 2.0**-20])).tolist() == [
        UNITS,
        UNITS // 2,
        UNITS >> 20,
    ]


@pytest.mark.parametrize("position", ["first", "last"])
@pytest.mark.parametrize(("length", "video"), [(230, 200), (256, 192), (201, 200), (65, 1)])
def test_text_blocks_hold_a_text_token(position: str, length: int, video: int) -> None:
    tokens = torch.zeros(length, dtype=torch.bool)
    tokens[slice(length - video) if position == "first" else slice(video, None)] = True
    blocks = math.ceil(length / 32)
    expected = [bool(tokens[b * 32 : (b + 1) * 32].any()) for b in range(blocks)]
    got = text_blocks(length, video, 32, position)  # type: ignore[arg-type]
    assert got is not None
    assert got.tolist() == expected


def test_video_alone_has_no_text_blocks() -> None:
    assert text_blocks(200, 200, 32, "first") is None
    assert text_blocks(230, 200, 32, None) is None


def test_text_stays_dense_on_both_sides() -> None:
    energy = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(1)).softmax(-1)
    mask, kept = select(energy, 0.1, lengths=(128, 128), video=100, block=(32, 32), text="last")
    assert mask[..., 3:, :].all()
    assert mask[..., 3].all()
    assert not mask[..., :3, :3].all()
    assert (kept[..., 3] == 1).all()
    none, _ = select(energy, 0.1, lengths=(128, 128), video=128, block=(32, 32), text="last")
    assert none.sum() < mask.sum()
