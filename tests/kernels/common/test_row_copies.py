"""Tables of copied rows: they invert the plan's sources, and are shared on a device."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from calibatt_compiler.kernels.common.row_copies import DeviceCopies, copy_tables
from calibatt_compiler.kernels.portable.attention import TableAttention
from calibatt_compiler.kernels.request import KernelRequest
from calibatt_compiler.plan.copies import AnchorRows
from calibatt_compiler.plan.order import TokenOrder
from calibatt_compiler.plan.pattern import BlockPattern

CPU = torch.device("cpu")
COPIES = [
    AnchorRows((3, 6, 11), 2),
    AnchorRows((3, 6, 11), 6),
    AnchorRows((1, 29, 6), 5, first=9),
    AnchorRows((2, 10, 9), 3, first=2, order=TokenOrder((1, 4, 4))),
    AnchorRows((200, 1, 1), 1),
]


@pytest.mark.parametrize("copies", COPIES, ids=str)
def test_each_position_is_the_target_of_its_source_and_of_no_other(
    random_pattern: Callable[..., BlockPattern], copies: AnchorRows
) -> None:
    tables = copy_tables(random_pattern(repetitive=(True, False), copies=copies))
    assert tables is not None
    assert np.array_equal(tables.computed, copies.computed(200))
    targets, sources = tables.targets, copies.sources(200)
    assert targets.dtype == np.int32
    slot, row = np.nonzero(targets >= 0)
    assert sorted(targets[slot, row]) == list(range(200))
    assert np.array_equal(sources[targets[slot, row]], row)
    # What kernels rest on: no gaps, increasing, its own position among them, no empty slot.
    for column, position in zip(targets.T, tables.computed, strict=True):
        filled = column[: int((column >= 0).sum())].tolist()
        assert (column[len(filled) :] == -1).all()
        assert filled == sorted(filled)
        assert position in filled
    assert (targets >= 0).any(1).all()
    with pytest.raises(ValueError, match="read-only"):
        targets[0, 0] = 0


def test_patterns_that_copy_alike_share_tables_on_a_device(
    random_pattern: Callable[..., BlockPattern],
) -> None:
    def upload(*flags: bool, seed: int = 0, copies: AnchorRows = COPIES[0]) -> DeviceCopies:
        pattern = random_pattern(repetitive=flags, copies=copies, seed=seed)
        found = DeviceCopies.upload(pattern, CPU)
        assert found is not None
        return found

    first, second = upload(True, False), upload(True, True, seed=1)
    assert first.shared is second.shared
    assert first.repetitive.tolist() == [1, 0]
    assert second.repetitive.tolist() == [1, 1]
    assert upload(True, True, copies=COPIES[2]).shared is not first.shared
    # 33 x 2 + 2 of 200 positions; a row stands for 3 rows at most, itself among them.
    rows = len(COPIES[0].computed(200))
    assert rows == 3 * 2 * 11 + 2
    assert first.nbytes == 2 + 4 * rows + 4 * rows * first.shared.targets.shape[0]


def test_tables_are_filled_up_to_whole_tiles(
    random_pattern: Callable[..., BlockPattern],
) -> None:
    pattern = random_pattern(repetitive=(True, False), copies=COPIES[0])
    plain, whole = (DeviceCopies.upload(pattern, CPU, whole=rows) for rows in (1, 64))
    assert plain is not None
    assert whole is not None
    rows = len(COPIES[0].computed(200))
    assert whole.shared.computed.shape == (-(-rows // 64) * 64,)
    assert torch.equal(whole.shared.computed[:rows], plain.shared.computed)
    assert (whole.shared.computed[rows:] == plain.shared.computed[-1]).all()
    assert torch.equal(whole.shared.targets[:, :rows], plain.shared.targets)
    assert (whole.shared.targets[:, rows:] == -1).all()


def test_nothing_is_uploaded_without_repetitive_heads(
    random_pattern: Callable[..., BlockPattern],
) -> None:
    pattern = random_pattern(repetitive=(False, False), copies=COPIES[0])
    assert copy_tables(pattern) is None
    assert DeviceCopies.upload(pattern, CPU) is None


def test_tables_count_among_those_of_a_kernel(
    random_pattern: Callable[..., BlockPattern],
) -> None:
    where = {"device": CPU, "dtype": torch.float32, "head_dim": 64}
    pattern = random_pattern(repetitive=(True, False), copies=COPIES[0])
    kernel = TableAttention(KernelRequest(pattern, **where))
    copies = DeviceCopies.upload(pattern, CPU)
    assert copies is not None
    assert kernel.table_bytes == kernel.tables.nbytes + copies.nbytes
    plain = TableAttention(KernelRequest(random_pattern(), **where))
    assert plain.table_bytes == plain.tables.nbytes
