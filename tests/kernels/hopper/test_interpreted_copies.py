"""Row-shared heads in the Hopper kernel, interpreted: few rows are computed, all are stored."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from calibatt_compiler.plan.copies import AnchorRows
from calibatt_compiler.plan.order import TokenOrder
from calibatt_compiler.plan.pattern import BlockPattern

pytest.importorskip("triton", reason="Gluon is part of triton")

from calibatt_compiler.kernels.hopper import attention as hopper
from calibatt_compiler.kernels.hopper.attention import HopperAttention

# Frames that fill no blocks; text before, behind and around; one row of all; all rows; a layout.
COPIED = [
    # query_length, copies, key_length, row-shared heads, head_dim, block_n, batch, dtype, softmax
    (429, AnchorRows((3, 13, 11), 2), 429, (1, 0, 1), 64, 128, 1, torch.bfloat16, "fixed"),
    (429, AnchorRows((3, 13, 11), 5), 333, (0, 1, 0), 128, 64, 2, torch.bfloat16, "fixed"),
    (
        700,
        AnchorRows((2, 12, 20), 3, first=77),
        700,
        (0, 0, 1),
        128,
        128,
        2,
        torch.float16,
        "exact",
    ),
    (509, AnchorRows((2, 12, 20), 6), 509, (1, 1, 1), 64, 64, 3, torch.bfloat16, "exact"),
    (600, AnchorRows((6, 10, 10), 1), 90, (0, 1, 1), 64, 128, 1, torch.bfloat16, "fixed"),
    (200, AnchorRows((1, 10, 20), 10), 700, (1, 0), 128, 128, 1, torch.float16, "exact"),
    (
        *(520, AnchorRows((4, 10, 12), 3, first=9, order=TokenOrder((1, 4, 4))), 520),
        *((1, 0, 0, 1), 128, 128, 1, torch.bfloat16, "fixed"),
    ),
]


@pytest.mark.parametrize(
    ("rows", "copies", "keys", "flags", "dim", "block_n", "batch", "dtype", "softmax"), COPIED
)
@pytest.mark.parametrize("programs", [1, 4])
def test_repetitive_heads_compute_few_rows_and_store_all(
    launches: Any,
    make: Callable[..., HopperAttention],
    operands: Callable[..., tuple[Tensor, ...]],
    random_pattern: Callable[..., BlockPattern],
    assert_attention: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    copies: AnchorRows,
    keys: int,
    flags: tuple[int, ...],
    dim: int,
    block_n: int,
    batch: int,
    dtype: torch.dtype,
    softmax: str,
    programs: int,
) -> None:
    pattern = random_pattern(
        heads=len(flags),
        query_length=rows,
        key_length=keys,
        block=(128, block_n),
        repetitive=tuple(map(bool, flags)),
        copies=copies,
    )
    q, k, v = operands(
        batch=batch,
        heads=len(flags),
        query_length=rows,
        key_length=keys,
        head_dim=dim,
        dtype=dtype,
    )
    monkeypatch.setattr(hopper, "empty_output", lambda q: hollow(q, math.nan))
    kernel = make(pattern, dtype, dim, softmax=softmax, programs=programs)
    out, lse = kernel.attend(q, k, v, return_lse=True)
    assert_attention(out, q, k, v, pattern)
    scores = q.double() @ k.double().mT / math.sqrt(dim)
    exact = scores.masked_fill(~pattern.token_mask(), -math.inf).logsumexp(-1)
    taken = copies.computed(rows)[copies.sources(rows)]
    for head in np.flatnonzero(flags):
        exact[:, head] = exact[:, head, taken]
    torch.testing.assert_close(lse.double(), exact, atol=2e-5, rtol=1e-5)
    assert launches.launches == (2 if softmax == "fixed" else 1)
    assert kernel.repairs == 0
    assert torch.equal(out, kernel(q, k, v))
    views = torch.stack([q, q.flip(1)], 3).unbind(3)
    assert torch.equal(out, kernel(views[0], k, v))


def hollow(q: Tensor, value: float) -> Tensor:
    """An output that holds `value` where nothing is stored."""
    batch, heads, length, head_dim = q.shape
    return torch.full((batch, length, heads, head_dim), value, dtype=q.dtype).transpose(1, 2)


def test_a_spike_in_a_repetitive_head_is_repaired(
    launches: Any,
    make: Callable[..., HopperAttention],
    spike: Callable[..., None],
    operands: Callable[..., tuple[Tensor, ...]],
    assert_attention: Callable[..., None],
) -> None:
    copies = AnchorRows((3, 13, 11), 2)
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    pattern = BlockPattern.from_mask(
        mask, query_length=429, key_length=429, repetitive=np.array([False, True]), copies=copies
    )
    copied, computed = copies.sources(429)[0], copies.computed(429)
    for row, repaired in ((0, False), (int(computed[copied]), True)):
        assert (row in computed) == repaired
        q, k, v = operands(query_length=429, dtype=torch.bfloat16)
        spike(q, k, row, 400, 200.0)  # of a row that is not computed it is not seen
        kernel = make(pattern, torch.bfloat16, 64)
        assert_attention(kernel(q, k, v), q, k, v, pattern)
        assert kernel.repairs == repaired


def test_repetitive_heads_with_key_lengths_and_weighted_blocks(
    launches: Any,
    make: Callable[..., HopperAttention],
    operands: Callable[..., tuple[Tensor, ...]],
    random_pattern: Callable[..., BlockPattern],
    assert_attention: Callable[..., None],
    accuracy: Callable[..., Any],
) -> None:
    copies = AnchorRows((3, 13, 11), 10)  # the keys of its last tile begin past those that count
    where: dict[str, Any] = {"query_length": 429, "key_length": 500}
    pattern = random_pattern(
        **where, block=(128, 128), density=0.6, repetitive=(True, False), copies=copies
    )
    q, k, v = operands(batch=4, **where, dtype=torch.bfloat16)
    lengths = torch.tensor([500, 256, 130, 0])
    valid = torch.arange(500)[None] < lengths[:, None]
    keep = pattern.token_mask()[None] & valid[:, None, None]
    taken = torch.from_numpy(copies.computed(429)[copies.sources(429)]).long()

    def by_rows(x: Tensor) -> Tensor:
        return torch.cat([x[:, :1, taken], x[:, 1:]], 1)

    scores = (q.double() @ k.double().mT / 8).masked_fill(~keep, -math.inf)
    exact = by_rows(scores.softmax(-1).nan_to_num() @ v.double())
    yardstick = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep)
    for softmax in ("exact", "fixed"):
        kernel = make(pattern, torch.bfloat16, 64, softmax=softmax)
        out, lse = kernel.attend(q, k, v, key_lengths=lengths, return_lse=True)
        accuracy(out, exact, by_rows(yardstick.nan_to_num())).check()
        expected = by_rows(scores.logsumexp(-1))
        torch.testing.assert_close(lse.double(), expected, atol=2e-5, rtol=1e-5)
        assert (out[3] == 0).all()
        assert kernel.repairs == 0
    mask = pattern.mask()
    pattern = BlockPattern.from_mask(
        mask,
        **where,
        weight=1 + 7 * torch.rand(mask.shape, generator=torch.Generator().manual_seed(7)),
        repetitive=np.array([True, False]),
        copies=copies,
    )
    assert pattern.weights is not None
    assert_attention(make(pattern, torch.bfloat16, 64)(q, k, v), q, k, v, pattern)
