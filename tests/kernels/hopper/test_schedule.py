"""Schedule and tables of the Hopper kernel: every row once, every key once, in the right order."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.hopper.schedule import (
    TILE_COST,
    Schedule,
    assign,
    block_codes,
    key_runs,
    make_schedule,
)
from calibatt_compiler.plan.copies import AnchorRows
from calibatt_compiler.plan.pattern import BlockPattern


def keys_of(made: Schedule, index: int) -> list[int]:
    """Key blocks of a tile in the order in which they are taken."""
    _, _, intervals, first = made.tiles[index].tolist()
    first &= 0x7FFFFFFF
    taken: list[int] = []
    for run in made.runs[first : first + intervals].tolist():
        taken += range(run & 0xFFFF, (run & 0xFFFF) + (run >> 16))
    return taken


def check(pattern: BlockPattern, programs: int, first: npt.NDArray[np.int64] | None = None) -> None:
    made = make_schedule(pattern, key_runs(pattern, first), programs)
    mask = pattern.numpy_mask()
    assert made.starts[0] == 0
    assert len(made.starts) == programs + 1
    assert (np.diff(made.starts) >= 0).all()
    computed = pattern.computed_rows()
    assert made.starts[-1] == len(made.tiles) - 1 == computed.sum()
    rows = [divmod(int(word), 1 << 16) for word in made.tiles[:-1, 0]]
    assert sorted(rows) == list(zip(*np.nonzero(computed), strict=True))
    repetitive = [pattern.repetitive is not None and pattern.repetitive[head] for head, _ in rows]
    assert (made.tiles[:-1, 3] < 0).tolist() == repetitive
    ragged = pattern.key_length % pattern.block_n != 0
    last = pattern.key_blocks - 1
    for index, (head, row) in enumerate(rows):
        token = row * pattern.block_m
        if repetitive[index]:
            assert pattern.copies is not None
            token = pattern.copies.computed(pattern.query_length)[token]
        diagonal = min(token // pattern.block_n, last)
        start = diagonal if first is None else first[head, row]
        kept = np.flatnonzero(mask[head, row])
        lead = kept[kept >= start][0] if kept[-1] >= start else kept[0]
        expected = [lead, *kept[kept != lead]]
        assert keys_of(made, index) == expected
        blocks, masked = made.tiles[index, 1] & 0xFFFF, (made.tiles[index, 1] >> 16) - 1
        assert blocks == len(expected)
        assert masked == (expected.index(last) if ragged and last in expected else -1)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 40),
    st.integers(1, 9),
    st.booleans(),
    st.sampled_from([64, 128]),
    st.floats(0, 1),
    st.integers(0, 1000),
)
def test_tables_reproduce_any_mask(
    heads: int,
    rows: int,
    columns: int,
    programs: int,
    ragged: bool,
    block_n: int,
    density: float,
    seed: int,
) -> None:
    generator = np.random.default_rng(seed)
    mask = generator.random((heads, rows, columns)) < density
    mask[..., generator.integers(columns)] |= ~mask.any(-1)
    pattern = BlockPattern.from_mask(
        torch.from_numpy(mask),
        query_length=rows * 128 - 5,
        key_length=columns * block_n - (17 if ragged else 0),
        block=(128, block_n),
    )
    check(pattern, programs)
    check(pattern, programs, generator.integers(0, columns, (heads, rows)))


@pytest.mark.parametrize("anchors", [1, 3, 12])
@pytest.mark.parametrize("flags", [(True, False, True), (True, True, True)])
def test_repetitive_heads_have_tiles_of_the_rows_that_they_compute(
    random_pattern: Callable[..., BlockPattern], anchors: int, flags: tuple[bool, ...]
) -> None:
    pattern = random_pattern(
        heads=3,
        query_length=700,
        key_length=777,
        block=(128, 128),
        repetitive=flags,
        copies=AnchorRows((2, 12, 20), anchors, first=77),
    )
    for programs in (1, 7, 40):
        check(pattern, programs)
    first = np.random.default_rng(0).integers(0, pattern.key_blocks, (3, pattern.query_blocks))
    check(pattern, 2, first)
    literal = make_schedule(pattern, key_runs(pattern), 2, literals=True).tiles[:-1, 3]
    below = key_runs(pattern).below.reshape(3, -1)
    rows = make_schedule(pattern, key_runs(pattern), 2).tiles[:-1, 0]
    assert np.array_equal(literal & 0x7FFFFFFF, below[rows >> 16, rows & 0xFFFF])


@pytest.mark.parametrize("kind", ["diagonal", "last column", "checkerboard", "dense"])
def test_tables_reproduce_adversarial_masks(kind: str) -> None:
    row, column = np.indices((9, 9))
    mask = {
        "diagonal": row == column,
        "last column": column == 8,
        "checkerboard": (row + column) % 2 == 0,
        "dense": row >= 0,
    }[kind]
    for length in (9 * 128, 9 * 128 - 127):
        made = BlockPattern.from_mask(
            torch.from_numpy(np.stack([mask, mask.T | (row == column)])),
            query_length=length,
            key_length=length,
        )
        for programs in (1, 7, 40):
            check(made, programs)


def test_weights_stand_in_the_order_in_which_blocks_are_taken() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(2, 4, 8, generator=generator) < 0.6
    mask[:, :, 3] = True
    weight = 2.0 ** (torch.rand(mask.shape, generator=generator) * 5).floor()
    pattern = BlockPattern.from_mask(mask, query_length=500, key_length=1000, weight=weight)
    runs = key_runs(pattern)
    made = make_schedule(pattern, runs, 5)
    codes, starts = block_codes(pattern, runs, made)
    assert codes is not None
    assert starts is not None
    assert len(codes) == pattern.kept + 1
    for index in range(len(made.tiles) - 1):
        head, row = divmod(int(made.tiles[index, 0]), 1 << 16)
        taken = keys_of(made, index)
        found = codes[starts[index] : starts[index] + len(taken)]
        np.testing.assert_array_equal(2.0 ** (found / 16), weight[head, row, taken])
    dense = BlockPattern.dense(1, 128, 128)
    found = block_codes(dense, key_runs(dense), make_schedule(dense, key_runs(dense), 1))
    assert found == (None, None)


def test_programs_end_together() -> None:
    """Within one per cent of even work, for the masks that are hardest to balance."""
    generator = np.random.default_rng(0)
    sparse = generator.integers(10, 40, (26, 256))
    mixed = np.concatenate([np.full((14, 256), 256), sparse])  # a third of the heads dense
    heavy_last = sparse.copy()
    heavy_last[-1] = 256
    for blocks in (mixed, heavy_last, np.full((12, 591), 591)):
        lists = assign(blocks.reshape(-1).astype(np.int64), len(blocks), 132)
        work = [int((blocks.reshape(-1)[rows] + TILE_COST).sum()) for rows in lists]
        even = sum(work) / 132
        longest = blocks.max()
        assert max(work) <= 1.01 * even + (longest if len(np.unique(blocks)) == 1 else 0)
        assert sorted(np.concatenate(lists).tolist()) == list(range(blocks.size))


def test_long_heads_come_first_and_long_rows_before_short_ones_at_the_end() -> None:
    blocks = np.array([[1, 2, 3, 4], [9, 8, 7, 6]], np.int64).reshape(-1)
    (rows,) = assign(blocks, 2, 1)
    assert rows.tolist() == [4, 5, 6, 7, 3, 2, 1, 0]


def test_first_blocks_that_do_not_fit_are_refused(
    random_pattern: Callable[..., BlockPattern],
) -> None:
    pattern = random_pattern(block=(128, 128), query_length=300)
    for first in (np.zeros((2, 2), int), np.full((2, 3), 3), np.zeros((2, 3))):
        with pytest.raises(KernelError, match="first key blocks"):
            key_runs(pattern, first)
