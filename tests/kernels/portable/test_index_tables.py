"""The table kernel's key blocks: order, reference blocks, weights, sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from calibatt_compiler.kernels.portable.index_tables import IndexTables, index_tables
from calibatt_compiler.plan.copies import AnchorRows
from calibatt_compiler.plan.pattern import BlockPattern
from calibatt_compiler.plan.weights import STEPS

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("rows", "keys", "block"),
    [
        (700, 700, (64, 64)),
        (700, 333, (64, 64)),  # queries past the last key
        (700, 333, (64, 32)),
        (333, 1500, (32, 64)),
        (129, 129, (128, 128)),
    ],
)
def test_each_row_has_its_reference_then_its_blocks_upwards(
    random_pattern: Callable[..., BlockPattern], rows: int, keys: int, block: tuple[int, int]
) -> None:
    pattern = random_pattern(
        heads=3, query_length=rows, key_length=keys, block=block, density=0.2, weighted=True
    )
    tables = IndexTables.upload(pattern, CPU)
    offsets, blocks = tables.offsets.tolist(), tables.blocks.tolist()
    assert pattern.weights is not None
    for row, kept in enumerate(pattern.mask().flatten(0, 1)):
        first, *others = blocks[offsets[row] : offsets[row + 1]]
        expected = kept.nonzero()[:, 0].tolist()
        assert others == expected
        diagonal = row % pattern.query_blocks * block[0] // block[1]
        assert first == next((at for at in expected if at >= diagonal), expected[-1])
        log2_weights = tables.weights[offsets[row] + 1 : offsets[row + 1]].tolist()
        head, line = divmod(row, pattern.query_blocks)
        assert log2_weights == (pattern.weights[head, line, expected] / STEPS).tolist()
    assert len(blocks) == offsets[-1] + 1
    assert len(tables.weights) == offsets[-1]


def test_rows_that_are_not_computed_have_no_entry(
    random_pattern: Callable[..., BlockPattern],
) -> None:
    pattern = random_pattern(
        heads=2, query_length=300, repetitive=(False, True), copies=AnchorRows((1, 14, 20), 3)
    )
    tables = IndexTables.upload(pattern, CPU)
    entries = tables.offsets.diff().reshape(2, -1)
    kept = pattern.mask().sum(-1)
    assert torch.equal(entries, torch.where(kept > 0, kept + 1, 0))
    assert (kept == 0).any()


def test_sizes(random_pattern: Callable[..., BlockPattern]) -> None:
    pattern = random_pattern(heads=2, query_length=700)
    rows = 2 * 11
    tables = IndexTables.upload(pattern, CPU)
    assert tables.blocks.dtype == torch.int16
    assert tables.nbytes == 4 * (rows + 1) + 2 * (pattern.kept + rows + 1)
    pooled = IndexTables.upload(replace(pattern, pooled=2), CPU)
    assert pooled.nbytes == tables.nbytes + pattern.bits.nbytes
    wide = np.zeros((1, 1, (2**15 + 8) // 8), np.uint8)
    wide[..., -1] = 1
    far = BlockPattern(1, 16, 16 * (2**15 + 1), 16, 16, wide)
    assert IndexTables.upload(far, CPU).blocks.tolist() == [2**15, 2**15, 0]


def test_equal_patterns_share_a_tables(random_pattern: Callable[..., BlockPattern]) -> None:
    tables = index_tables(random_pattern(), CPU)
    assert index_tables(random_pattern(), CPU) is tables
    assert index_tables(random_pattern(seed=1), CPU) is not tables
