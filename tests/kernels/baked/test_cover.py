"""Covers: exact within their limits, compact for what masks look like, or refused."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibatt_compiler.errors import PlanFormatError
from calibatt_compiler.kernels.baked.cover import CoverError, CoverLimits, cover_pattern
from calibatt_compiler.kernels.baked.cover_template import ROW, Cover
from calibatt_compiler.plan.pattern import BlockPattern

Mask = npt.NDArray[np.bool_]


def pattern_of(mask: Mask, block: tuple[int, int] = (64, 64)) -> BlockPattern:
    return BlockPattern.from_mask(torch.from_numpy(mask), block=block)


def banded(heads: int, blocks: int, *, stride: int, width: int, columns: int) -> Mask:
    """Diagonals one frame apart, and the first `columns` key blocks for every row."""
    row, column = np.indices((blocks, blocks))
    mask = np.zeros((heads, blocks, blocks), bool)
    for head in range(heads):
        for frame in range(-3, 4):
            mask[head] |= abs(column - row - frame * (stride + head)) <= width
    mask[:, :, :columns] = True
    return mask


def frame_local(heads: int, blocks: int, frame: int) -> Mask:
    row, column = np.indices((blocks, blocks)) // frame
    return np.broadcast_to(row == column, (heads, blocks, blocks)).copy()


def ragged(mask: Mask, seed: int = 0) -> Mask:
    """The mask with uneven edges and a few holes, as calibration gives it."""
    draw = np.random.default_rng(seed)
    edge = (np.roll(mask, 1, 2) | np.roll(mask, -1, 2)) & ~mask
    mask = (mask | (edge & (draw.random(mask.shape) < 0.3))) & (draw.random(mask.shape) > 0.03)
    mask[:, np.arange(mask.shape[1]), np.minimum(np.arange(mask.shape[1]), mask.shape[2] - 1)] = 1
    return mask


def evaluate(cover: Cover) -> Mask:
    """The mask by way of the sympy expressions that source is printed from."""
    mask = np.zeros((len(cover.head_forms), cover.query_blocks, cover.key_blocks), bool)
    for head, form in enumerate(cover.head_forms):
        for segment in cover.forms[form]:
            for start, end in segment.expressions(cover.key_blocks):
                for row in range(segment.first, segment.last):
                    first, last = (int(sympy.sympify(x).subs(ROW, row)) for x in (start, end))
                    assert 0 <= first <= last <= cover.key_blocks
                    assert not mask[head, row, first:last].any(), "intervals overlap"
                    mask[head, row, first:last] = True
    return mask


@st.composite
def masks(draw: st.DrawFn) -> Mask:
    shape = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 12)),
        draw(st.integers(1, 14)),
    )
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mask = random.random(shape) < draw(st.sampled_from([0.1, 0.4, 0.8]))
    if draw(st.booleans()):  # structure: a band, and columns on either side
        row, column = np.indices(shape[1:])
        mask &= random.random(shape) < 0.1
        mask |= abs(column - row - draw(st.integers(-8, 8))) <= draw(st.integers(0, 2))
        mask[:, :, : draw(st.integers(0, 3))] = True
        mask[:, :, shape[2] - draw(st.integers(0, 3)) :] = True
    mask[:, :, draw(st.integers(0, shape[2] - 1))] |= ~mask.any(-1)
    return mask


@given(masks(), st.sampled_from([9, 20, 60, 10_000]), st.sampled_from([3, 4, 16]))
@settings(max_examples=150, deadline=None)
def test_a_cover_is_exact_within_its_limits_or_refused(
    mask: Mask, budget: int, intervals: int
) -> None:
    try:
        cover = cover_pattern(pattern_of(mask), CoverLimits(budget, intervals))
    except CoverError:
        assert budget < 10_000 or intervals < 16
        return
    assert np.array_equal(cover.mask(), mask)
    assert np.array_equal(evaluate(cover), mask)
    assert cover.literals <= budget
    assert cover.max_intervals <= intervals
    assert Cover.from_json(cover.to_json()) == cover


@pytest.mark.parametrize("limits", [CoverLimits(100, 16), CoverLimits(10_000, 3)])
def test_a_mask_beyond_a_limit_is_refused(limits: CoverLimits) -> None:
    draw = torch.rand(2, 40, 40, generator=torch.Generator().manual_seed(0))
    pattern = pattern_of(((draw < 0.4) | torch.eye(40).bool()).numpy())
    with pytest.raises(CoverError, match=f"{limits.literals} literals and {limits.intervals}"):
        cover_pattern(pattern, limits)


@given(masks())
@settings(max_examples=40, deadline=None)
def test_query_blocks_of_two_key_blocks_make_diagonals_of_slope_two(mask: Mask) -> None:
    cover = cover_pattern(pattern_of(mask, (128, 64)))
    assert np.array_equal(cover.mask(), mask)
    assert np.array_equal(evaluate(cover), mask)


def test_diagonals_and_global_columns_take_one_segment_a_head() -> None:
    mask = banded(4, 64, stride=6, width=1, columns=2)
    mask[:, :, -3:] = True
    cover = cover_pattern(pattern_of(mask))
    assert [len(form) for form in cover.forms] == [1, 1, 1, 1]
    assert cover.literals <= 4 * (1 + 2 * 9)
    assert np.array_equal(cover.mask(), mask)


def test_a_diagonal_of_slope_two_takes_one_segment() -> None:
    row, column = np.indices((20, 40))
    mask = (abs(column - 2 * row) <= 3)[None]
    cover = cover_pattern(pattern_of(mask, (128, 64)))
    assert cover.literals == 3


def test_frame_local_rectangles_take_a_segment_a_frame_and_equal_heads_share_it() -> None:
    cover = cover_pattern(pattern_of(frame_local(12, 60, 10)))
    assert cover.literals == 6 * 3
    assert cover.head_forms == (0,) * 12


def test_a_demo_sized_mask_takes_little_time() -> None:
    mask = ragged(banded(4, 34, stride=6, width=1, columns=2))
    start = time.process_time()
    cover_pattern(pattern_of(mask))
    assert time.process_time() - start < 1


@pytest.mark.slow
def test_a_mask_of_wan_720p_takes_seconds() -> None:
    mask = ragged(banded(40, 591, stride=28, width=6, columns=28))
    start = time.process_time()
    with pytest.raises(CoverError):
        cover_pattern(pattern_of(mask))
    assert time.process_time() - start < 60


def test_a_damaged_cover_is_refused() -> None:
    with pytest.raises(PlanFormatError, match="damaged"):
        Cover.from_json({"query_blocks": 3, "key_blocks": 3, "forms": [[[0]]], "head_forms": [0]})
