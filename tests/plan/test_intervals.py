"""Runs of kept blocks: from packed bits as from the mask."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibatt_compiler.plan.intervals import Intervals, runs_of, runs_of_bits


def same(mask: np.ndarray) -> Intervals:
    """Check the runs of a boolean matrix against those of the plain way, and return them."""
    expected, _ = runs_of(mask.astype(np.int16) - 1)
    got = runs_of_bits(np.packbits(mask, axis=-1, bitorder="little"))
    for name in ("offsets", "starts", "ends"):
        assert np.array_equal(getattr(got, name), getattr(expected, name)), name
        assert getattr(got, name).dtype == np.int32
    assert got.log_weights is None
    return got


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 16, 63, 591])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 0.95, 1.0])
def test_packed_bits_give_the_same_runs(columns: int, density: float):
    same(np.random.default_rng(columns).random((13, columns)) < density)


def test_runs_end_with_their_row():
    mask = np.ones((3, 16), np.bool_)
    mask[1, 3:12] = False
    runs = same(mask)
    assert list(zip(runs.starts, runs.ends, strict=True)) == [(0, 16), (0, 3), (12, 16), (0, 16)]
    heads = runs_of_bits(np.packbits(mask, axis=-1, bitorder="little").reshape(3, 1, 2))
    assert np.array_equal(heads.offsets, runs.offsets)


@given(st.lists(st.lists(st.booleans(), min_size=11, max_size=11), min_size=1, max_size=6))
@settings(deadline=None, max_examples=200)
def test_any_mask(rows: list[list[bool]]):
    same(np.array(rows))
