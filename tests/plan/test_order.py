"""Orders of tokens: permutations that keep tiles together."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibatt_compiler.errors import PlanError
from calibatt_compiler.plan.order import TokenOrder

sizes = st.tuples(*[st.integers(1, 7)] * 3)


@given(sizes, sizes)
def test_tiles_are_contiguous_and_every_token_comes_once(grid, tile):
    order = TokenOrder(tile)
    tokens = order.tokens(grid)
    if tokens is None:
        tokens = np.arange(np.prod(grid))
    assert sorted(tokens) == list(range(int(np.prod(grid))))
    places = np.stack(np.unravel_index(tokens, grid), 1)
    tiles = [tuple(place // np.array(tile)) for place in places]
    runs = [one for one, other in zip(tiles, [None, *tiles], strict=False) if one != other]
    assert runs == sorted(set(tiles)), "a tile is not in one piece, or not in raster order"
    for one in set(tiles):
        within = [token for token, of in zip(tokens, tiles, strict=True) if of == one]
        assert within == sorted(within)


def test_known_order():
    assert TokenOrder((1, 2, 2)).tokens((1, 2, 5)).tolist() == [0, 1, 5, 6, 2, 3, 7, 8, 4, 9]


@given(sizes, sizes, st.integers(0, 2))
def test_strips_are_walked_like_a_ploughed_field(grid, tile, along):
    order = TokenOrder(tuple(None if axis == along else size for axis, size in enumerate(tile)))
    tokens = order.tokens(grid)
    if tokens is None:
        tokens = np.arange(np.prod(grid))
    assert sorted(tokens) == list(range(int(np.prod(grid))))
    # By definition, token by token.
    earlier, later = (axis for axis in range(3) if axis != along)
    count = {axis: max(1, math.floor(grid[axis] / tile[axis] + 0.5)) for axis in (earlier, later)}

    def key(token):
        place = np.unravel_index(token, grid)
        part = {axis: place[axis] * n // grid[axis] for axis, n in count.items()}
        forwards = part[earlier] % 2 == 0
        walked = part[later] if forwards else count[later] - 1 - part[later]
        strip = part[earlier] * count[later] + walked
        return strip, place[along] if strip % 2 == 0 else -place[along], token

    assert tokens.tolist() == sorted(range(int(np.prod(grid))), key=key)


@given(sizes, st.integers(0, 2))
def test_neighbours_in_strips_one_token_thick_touch(grid, along):
    """The walk never jumps: wherever it is cut, a piece is in one place."""
    tokens = TokenOrder(tuple(None if axis == along else 1 for axis in range(3))).tokens(grid)
    if tokens is None:
        tokens = np.arange(np.prod(grid))
    places = np.stack(np.unravel_index(tokens, grid), 1)
    assert (np.abs(np.diff(places, axis=0)).sum(1) == 1).all()


def test_known_strips():
    assert TokenOrder((1, 2, None)).tokens((1, 4, 3)).tolist() == [
        0, 3, 1, 4, 2, 5, 8, 11, 7, 10, 6, 9,
    ]  # fmt: skip
    # Five rows in parts of about two: the nearest whole number of parts is three, halves up.
    assert TokenOrder((1, 2, None)).tokens((1, 5, 3)).tolist() == [
        0, 3, 1, 4, 2, 5, 8, 11, 7, 10, 6, 9, 12, 13, 14,
    ]  # fmt: skip
    assert TokenOrder((2, 3, None)).tokens((2, 3, 1)) is None


def test_text_stays_where_it_is():
    assert TokenOrder((1, 2, 1)).tokens((1, 2, 2), length=7, first=1).tolist() == [
        0, 1, 3, 2, 4, 5, 6,
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["raster", "2x8x8", "1x16x8", "2x8xall", "allx4x4", "1xallx12"])
def test_names_are_read_back(name):
    assert str(TokenOrder.parse(name)) == name


@pytest.mark.parametrize(
    "name", ["", "2x8", "0x1x1", "2X8X8", "tile", "2x8x8x1", "auto", "allxallx2", "2x8xAll", "all"]
)
def test_bad_names_are_refused(name):
    with pytest.raises(PlanError, match="no such order"):
        TokenOrder.parse(name)


def test_an_order_that_changes_nothing_is_none():
    assert TokenOrder().tokens((3, 4, 5)) is None
    assert TokenOrder((1, 1, 5)).tokens((3, 4, 5)) is None
