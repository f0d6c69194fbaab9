"""Masks over keys on a Hopper GPU: tails by its kernel, others by the portable one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from calibatt_compiler.kernels.common.padding import KeyPadding
from calibatt_compiler.kernels.hopper.padded import HopperTails
from calibatt_compiler.kernels.reference.attention import ReferenceAttention
from calibatt_compiler.kernels.request import KernelRequest

LENGTH = 333
BF16 = torch.bfloat16


def spans(*cut: tuple[int, int]) -> torch.Tensor:
    mask = torch.ones(len(cut), LENGTH, dtype=torch.bool)
    for row, (first, last) in zip(mask, cut, strict=True):
        row[first:last] = False
    return mask


@pytest.mark.parametrize("rows", [False, True])
def test_the_interpreted_kernel_serves_tails(
    launches: Any,
    operands: Callable[..., Any],
    random_pattern: Callable[..., Any],
    accuracy: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    rows: bool,
) -> None:
    """Which calls the portable kernel computes is looked at; GPU tests have it compute them."""
    pattern = random_pattern(query_length=LENGTH, block=(128, 128), density=0.6)
    request = KernelRequest(pattern, device=torch.device("cpu"), dtype=BF16, head_dim=64)
    monkeypatch.setattr(
        "calibatt_compiler.kernels.hopper.launch.multiprocessors", lambda _: 3, raising=False
    )
    monkeypatch.setattr("calibatt_compiler.kernels.hopper.attention.multiprocessors", lambda _: 3)
    kernel = HopperTails(request)
    flags = []

    def compute_if(flag: Any, call: Any, **more: Any) -> None:
        flags.append(int(flag))
        if flag:
            call[3].copy_(ReferenceAttention(pattern)(*call[:3], **more))

    monkeypatch.setattr(kernel.others, "compute_if", compute_if)
    q, k, v = operands(batch=2, query_length=LENGTH, dtype=BF16)
    for mask, other in (
        (spans((300, LENGTH), (77, LENGTH)), 0),
        (spans((LENGTH, LENGTH), (128, LENGTH)), 0),
        (spans((200, LENGTH)), 0),
        (spans((300, LENGTH), (5, 40)), 1),
    ):
        padding = KeyPadding.of(mask, rows=rows)
        pairs = pattern.token_mask()[None] & mask[:, None, None]
        cut = ~pairs.any(-1, keepdim=True) | (rows & ~mask[:, None, :, None])
        doubles = (x.double() for x in (q, k, v))
        exact = scaled_dot_product_attention(*doubles, attn_mask=pairs).masked_fill(cut, 0)
        yardstick = scaled_dot_product_attention(q, k, v, attn_mask=pairs).masked_fill(cut, 0)
        accuracy(kernel(q, k, v, padding=padding), exact, yardstick).check()
        assert flags.pop() == other


def test_what_serves_masks_over_keys(random_pattern: Callable[..., Any]) -> None:
    from calibatt_compiler.kernels.dispatch import DeviceFacts, choose

    facts = DeviceFacts("cuda", 90, name="a Hopper GPU")
    pattern = random_pattern(query_length=900, block=(128, 128))
    request = KernelRequest(
        pattern, device=torch.device("cuda"), dtype=BF16, head_dim=128, padded="tail"
    )
    assert choose(request, facts).kernel == "hopper-table"
    anywhere = choose(replace(request, padded="any"), facts)
    assert anywhere.kernel == "triton-table"
    assert anywhere.reason == "no Hopper kernel: of masks over keys it takes those that cut a tail"
    weighted = random_pattern(query_length=900, block=(128, 128), weighted=True)
    assert choose(replace(request, pattern=weighted), facts).kernel == "triton-table"
    ampere = choose(request, DeviceFacts("cuda", 80))
    assert ampere.kernel == "triton-table"
    assert ampere.reason == "generated source has no masks over keys yet"
    assert choose(request, DeviceFacts("cpu")).kernel == "native-cpu"
