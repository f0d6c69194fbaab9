"""Masks of joint attention carried over to other text lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calibatt_compiler.plan import BlockPattern
from calibatt_compiler.plan.text import fit_mask, fit_pattern, other_text

BLOCK = (32, 16)


def tokens_of(block: int, size: int, length: int, video: int, position: str) -> list[int | None]:
    """The video token, or None for text, of each place of a block."""
    offset = length - video if position == "first" else 0
    places = range(block * size, min((block + 1) * size, length))
    return [place - offset if 0 <= place - offset < video else None for place in places]


def fitted(mask: Tensor, old: int, new: int, video: int, position: str) -> Tensor:
    """The rule by its words, block by block."""
    counts = [-(-new // size) for size in BLOCK]
    result = torch.zeros(mask.shape[0], *counts, dtype=torch.bool)
    holders = []
    for size, count in zip(BLOCK, counts, strict=True):
        side = []
        olds = [set(tokens_of(b, size, old, video, position)) for b in range(-(-old // size))]
        for block in range(count):
            tokens = set(tokens_of(block, size, new, video, position))
            side.append(None if None in tokens else [b for b, o in enumerate(olds) if o & tokens])
        holders.append(side)
    for r, rows in enumerate(holders[0]):
        for c, columns in enumerate(holders[1]):
            if rows is None or columns is None:
                result[:, r, c] = True
            else:
                result[:, r, c] = mask[:, rows][:, :, columns].any(2).any(1)
    return result


def dense_text(mask: Tensor, length: int, video: int, position: str) -> Tensor:
    for axis, size in enumerate(BLOCK):
        for block in range(mask.shape[axis + 1]):
            if None in tokens_of(block, size, length, video, position):
                mask.select(axis + 1, block)[:] = True
    return mask


cases = st.tuples(
    st.integers(1, 150), st.integers(1, 70), st.integers(1, 70), st.sampled_from(["first", "last"])
)


def random_mask(length: int, video: int, position: str, seed: int) -> Tensor:
    shape = [-(-length // size) for size in BLOCK]
    mask = torch.rand(2, *shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    return dense_text(mask, length, video, position)


@given(cases, st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_fitting_follows_its_rule(case: tuple[int, int, int, Any], seed: int) -> None:
    video, text, other, position = case
    old, new = video + text, video + other
    mask = random_mask(old, video, position, seed)
    got = fit_mask(mask, (old, old), (new, new), video=video, block=BLOCK, position=position)
    assert torch.equal(got, fitted(mask, old, new, video, position))
    pattern = BlockPattern.from_mask(mask, query_length=old, key_length=old, block=BLOCK)
    carried = fit_pattern(pattern, (new, new), video=video, position=position)
    assert torch.equal(carried.mask(), got)
    assert (carried.query_length, carried.key_length) == (new, new)
    # Pairs of video tokens that were kept stay kept.
    start, begin = (text, other) if position == "first" else (0, 0)
    before = pattern.token_mask()[:, start : start + video, start : start + video]
    after = carried.token_mask()[:, begin : begin + video, begin : begin + video]
    assert not (before & ~after).any()


@given(cases, st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_nothing_is_lost_where_blocks_cut_the_video_alike(
    case: tuple[int, int, int, Any], seed: int
) -> None:
    video, text, other, position = case
    if position == "first":
        other = text + 32 * (other % 3)
    old, new = video + text, video + other
    mask = random_mask(old, video, position, seed)
    there = fit_mask(mask, (old, old), (new, new), video=video, block=BLOCK, position=position)
    back = fit_mask(there, (new, new), (old, old), video=video, block=BLOCK, position=position)
    assert torch.equal(back, mask)


@pytest.mark.parametrize(
    ("lengths", "to", "expected"),
    [
        ((110, 110), (120, 120), True),
        ((110, 110), (110, 110), True),
        ((110, 110), (100, 100), False),
        ((100, 100), (110, 110), False),
        ((110, 110), (120, 110), False),
        ((110, 115), (110, 115), False),
    ],
)
def test_only_the_text_may_differ(
    lengths: tuple[int, int], to: tuple[int, int], expected: bool
) -> None:
    assert other_text(lengths, to, 100) is expected
