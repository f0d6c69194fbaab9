"""Row-shared heads in the Hopper kernel on a Hopper GPU: whoever takes an output has its bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hopper_gpu import BF16, CUDA, FP16, MARKS, Operands, error
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from calibatt_compiler.kernels.hopper.attention import HopperAttention
from calibatt_compiler.kernels.request import KernelRequest
from calibatt_compiler.plan.copies import AnchorRows
from calibatt_compiler.plan.order import TokenOrder
from calibatt_compiler.plan.pattern import BlockPattern

pytestmark = MARKS


def sources(pattern: BlockPattern, head: int) -> Tensor:
    """The token whose output each token of a head takes."""
    if pattern.copies is None or pattern.repetitive is None or not pattern.repetitive[head]:
        return torch.arange(pattern.query_length)
    length = pattern.query_length
    taken = pattern.copies.computed(length)[pattern.copies.sources(length)]
    return torch.from_numpy(taken).long()


@pytest.mark.parametrize(
    ("copies", "length", "keys", "heads", "head_dim", "block_n", "batch"),
    [
        (AnchorRows((1, 8, 16), 1), 128, 128, 1, 128, 128, 1),
        (AnchorRows((3, 13, 11), 2), 429, 90, 2, 128, 128, 1),
        (AnchorRows((2, 12, 20), 3, first=77), 700, 700, 3, 64, 128, 2),
        (AnchorRows((5, 16, 18), 5, order=TokenOrder((1, 8, 8))), 1441, 1441, 4, 128, 64, 3),
        (AnchorRows((4, 30, 52), 5), 6300, 6300, 12, 128, 128, 2),
        (AnchorRows((21, 30, 52), 5), 32760, 32760, 3, 128, 128, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize(("dtype", "softmax"), [(BF16, "exact"), (BF16, "fixed"), (FP16, "exact")])
def test_repetitive_heads(
    operands: Callable[..., Operands],
    random_pattern: Callable[..., BlockPattern],
    copies: AnchorRows,
    length: int,
    keys: int,
    heads: int,
    head_dim: int,
    block_n: int,
    batch: int,
    dtype: torch.dtype,
    softmax: str,
) -> None:
    where: dict[str, Any] = {"heads": heads, "query_length": length, "key_length": keys}
    pattern = random_pattern(
        **where,
        block=(128, block_n),
        repetitive=tuple(head % 3 == 0 for head in range(heads)),
        copies=copies,
    )
    q, k, v = operands(batch=batch, **where, head_dim=head_dim, dtype=dtype, device=CUDA)
    kernel = HopperAttention(
        KernelRequest(pattern, device=CUDA, dtype=dtype, head_dim=head_dim, softmax=softmax)
    )
    out, lse = kernel.attend(q, k, v, return_lse=True)
    assert lse is not None
    mask = pattern.mask().to(CUDA)
    sample = torch.arange(length) if length < 1000 else torch.randperm(length)[:400].sort().values
    found, exact, yardstick, exact_lse = [], [], [], []
    for head in range(heads):
        taken = sources(pattern, head)[sample]
        # All rows of a row-shared head keep all keys: the first stands for them.
        repeats = pattern.repetitive is not None and pattern.repetitive[head]
        rows = torch.zeros_like(taken) if repeats else taken // 128
        keep = mask[head, rows.to(CUDA)].repeat_interleave(block_n, 1)[:, :keys]
        one = slice(head, head + 1)
        few = q[:, one, taken.to(CUDA)]
        scores = few.double() @ k[:, one].double().mT / math.sqrt(head_dim)
        scores = scores.masked_fill(~keep, -math.inf)
        exact.append(scores.softmax(-1) @ v[:, one].double())
        exact_lse.append(scores.logsumexp(-1))
        yardstick.append(scaled_dot_product_attention(few, k[:, one], v[:, one], attn_mask=keep))
        found.append(out[:, one, sample.to(CUDA)])
        # Whoever takes an output has its bits.
        everywhere = sources(pattern, head).to(CUDA)
        assert torch.equal(out[:, head], out[:, head, everywhere])
        assert torch.equal(lse[:, head], lse[:, head, everywhere])
    both = torch.cat(exact, 1)
    assert error(torch.cat(found, 1), both) <= 1.1 * error(torch.cat(yardstick, 1), both)
    lse_found = lse[:, :, sample.to(CUDA)].double()
    torch.testing.assert_close(lse_found, torch.cat(exact_lse, 1), atol=1e-3, rtol=1e-5)
    assert kernel.repairs == 0
    for _ in range(20):
        assert torch.equal(out, kernel(q, k, v))
    spread = torch.stack([q, q], 3)[:, :, :, 0]
    assert torch.equal(out, kernel(spread, k, v))


def test_repetitive_heads_repaired_and_with_key_lengths(operands: Callable[..., Operands]) -> None:
    copies = AnchorRows((3, 24, 20), 4)
    pattern = BlockPattern.from_mask(
        torch.ones(2, 12, 12, dtype=torch.bool),
        query_length=1440,
        key_length=1440,
        repetitive=np.array([False, True]),
        copies=copies,
    )
    q, k, v = operands(batch=3, query_length=1440, head_dim=128, dtype=BF16, device=CUDA)
    kernel = HopperAttention(KernelRequest(pattern, device=CUDA, dtype=BF16, head_dim=128))
    lengths = torch.tensor([1440, 700, 0], device=CUDA)
    out, _ = kernel.attend(q, k, v, key_lengths=lengths)
    for item, valid in enumerate(lengths.tolist()):
        one = slice(item, item + 1)
        exact = attended(pattern, q[one].double(), k[one, :, :valid], v[one, :, :valid])
        yardstick = attended(pattern, q[one], k[one, :, :valid], v[one, :, :valid])
        if valid:
            assert error(out[one], exact) <= 1.1 * error(yardstick, exact)
        else:
            assert (out[one] == 0).all()
    assert kernel.repairs == 0
    row = int(copies.computed(1440)[100])
    q[0, 1, row], k[0, 1, :, 0] = 0, 0
    q[0, 1, row, 0] = k[0, 1, 1400, 0] = math.sqrt(250.0 * math.sqrt(128))
    out = kernel(q, k, v)
    exact, yardstick = attended(pattern, q.double(), k, v), attended(pattern, q, k, v)
    assert error(out, exact) <= 1.1 * error(yardstick, exact)
    assert kernel.repairs == 1


def attended(pattern: BlockPattern, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention in the dtype of q, its rows copied as the pattern copies them."""
    out = scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype))
    rows = [out[:, head, sources(pattern, head).to(q.device)] for head in range(q.shape[1])]
    return torch.stack(rows, 1)
