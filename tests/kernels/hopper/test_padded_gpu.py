"""Masks over keys on a GPU: tails by the Hopper kernel, others by the portable one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from calibatt_compiler.kernels.attention import make_attention
from calibatt_compiler.kernels.common.padding import KeyPadding
from calibatt_compiler.kernels.reference.attention import ReferenceAttention
from calibatt_compiler.kernels.request import KernelRequest
from calibatt_compiler.kernels.zones import make_zones

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BF16 = torch.bfloat16


def spans(*cut: tuple[int, int], length: int) -> torch.Tensor:
    """Key masks of a batch: each cuts one span of keys."""
    mask = torch.ones(len(cut), length, dtype=torch.bool)
    for row, (first, last) in zip(mask, cut, strict=True):
        row[first:last] = False
    return mask.to("cuda")


@pytest.mark.parametrize("padded", ["tail", "any"])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_masks_over_keys_on_a_gpu(
    operands: Callable[..., Any],
    random_pattern: Callable[..., Any],
    accuracy: Callable[..., Any],
    dtype: torch.dtype,
    padded: Any,
) -> None:
    length = 9001
    pattern = random_pattern(query_length=length, block=(128, 128), density=0.4)
    request = KernelRequest(
        pattern, device=torch.device("cuda"), dtype=dtype, head_dim=128, padded=padded
    )
    kernel = make_attention(request)
    hopper = torch.cuda.get_device_capability() == (9, 0) and padded == "tail"
    q, k, v = operands(batch=2, query_length=length, head_dim=128, dtype=dtype, device="cuda")
    few = torch.arange(0, length, 37, device="cuda")
    for mask, tail in (
        (spans((8800, length), (length, length), length=length), True),
        (spans((8001, length), length=length), True),
        (spans((5, 509), (300, 640), length=length), False),
        (spans((0, 129), (0, 1), length=length), False),
    ):
        before = kernel.repairs
        padding = KeyPadding.of(mask, rows=True)
        out = kernel(q, k, v, padding=padding)
        assert out.isfinite().all()
        pairs = pattern.token_mask().to("cuda")[None, :, few] & mask[:, None, None]
        cut = ~mask[:, None, few, None]
        doubles = (x.double() for x in (q[:, :, few], k, v))
        exact = scaled_dot_product_attention(*doubles, attn_mask=pairs).masked_fill(cut, 0)
        yardstick = scaled_dot_product_attention(q[:, :, few], k, v, attn_mask=pairs)
        accuracy(out[:, :, few], exact, yardstick.masked_fill(cut, 0)).check()
        assert (out.masked_select(~mask[:, None, :, None]) == 0).all()
        # Computed again only where the Hopper kernel met another mask than a tail.
        assert kernel.repairs - before == (1 if hopper and not tail else 0)
    assert kernel.kind == ("hopper-table" if hopper else "triton-table")


def test_zones_with_masks_over_keys_on_a_gpu(
    operands: Callable[..., Any], accuracy: Callable[..., Any]
) -> None:
    from zone_patterns import zone_pattern

    for case in ("text last", "text first"):
        zones = zone_pattern(case)
        length = zones.key_length
        request = KernelRequest(
            zones, device=torch.device("cuda"), dtype=BF16, head_dim=64, padded="any"
        )
        kernel = make_zones(request)
        assert kernel.kind == "triton-zones"
        q, k, v = operands(
            batch=2, heads=zones.heads, query_length=length, dtype=BF16, device="cuda"
        )
        cut = ((length - 90, length), (length - 1, length))
        cut = cut if case == "text last" else ((7, 150), (100, 130))
        mask = spans(*cut, length=length)
        padding = KeyPadding.of(mask)
        exact, yardstick = (
            ReferenceAttention(zones.draw(3))(*(x.to(to) for x in (q, k, v)), padding=padding)
            for to in (torch.float64, BF16)
        )
        accuracy(kernel.at(3)(q, k, v, padding=padding), exact, yardstick, factor=3.0).check()
