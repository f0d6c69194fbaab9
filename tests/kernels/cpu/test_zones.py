"""Octave zones on a CPU, against the definition at each step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from zone_patterns import CASES, zone_pattern

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.cpu.zones import CpuZones
from calibatt_compiler.kernels.protocol import ReorderingKernel

STEPS = (0, 1, 6, 77, 127)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_step_is_attended(
    operands: Callable[..., tuple[Tensor, ...]],
    assert_attention: Callable[..., None],
    name: str,
    dtype: torch.dtype,
) -> None:
    zones = zone_pattern(name, block=(48, 32))
    sizes: dict[str, Any] = {"query_length": zones.query_length, "key_length": zones.key_length}
    batch = 2 if name == "ragged" else 1
    q, k, v = operands(batch=batch, heads=zones.heads, **sizes, dtype=dtype)
    kernel = CpuZones(zones, dtype=dtype, head_dim=64)
    for step in STEPS:
        drawn = zones.draw(step)
        out = kernel.at(step)(q, k, v)
        assert_attention(out, q, k, v, drawn)
        assert kernel.at(step).density == drawn.density
        assert torch.equal(kernel(q, k, v, step=step + 128), out)
    assert len(kernel._drawn) == len(STEPS)


def test_weights_are_powers_of_two_in_float64(operands: Callable[..., tuple[Tensor, ...]]) -> None:
    zones = zone_pattern("ragged", block=(48, 32))
    sizes: dict[str, Any] = {"query_length": zones.query_length, "key_length": zones.key_length}
    q, k, v = operands(heads=3, **sizes, dtype=torch.float64)
    octaves = torch.from_numpy(zones.map_octaves()).double()
    bias = (octaves * math.log(2)).masked_fill(~zones.draw(9).mask(), -math.inf)
    bias = bias.repeat_interleave(48, 1)[:, : zones.query_length]
    bias = bias.repeat_interleave(32, 2)[..., : zones.key_length]
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    out = CpuZones(zones, dtype=torch.float64, head_dim=64)(q, k, v, step=9)
    torch.testing.assert_close(out, exact, rtol=1e-12, atol=1e-13)


def test_all_phases_are_kept_and_small(operands: Callable[..., tuple[Tensor, ...]]) -> None:
    zones = zone_pattern("diagonal", block=(32, 32))
    sizes: dict[str, Any] = {"query_length": zones.query_length, "key_length": zones.key_length}
    q, k, v = operands(**sizes)
    q.zero_()
    block = torch.arange(zones.key_length) // 32
    v = torch.nn.functional.one_hot(block, 64).float().expand_as(v)
    kernel = CpuZones(zones, dtype=torch.float32, head_dim=64)
    for step in range(200):
        drawn = zones.draw(step)
        weight = torch.from_numpy(np.exp(drawn.log_weights())) * drawn.mask()
        weight = weight * block.bincount(minlength=zones.key_blocks)
        out = kernel(q, k, v, step=step)[0, :, ::32, : zones.key_blocks]
        torch.testing.assert_close(out, weight.div(weight.sum(-1, keepdim=True)).float())
    assert len(kernel._drawn) == 128
    assert kernel.table_bytes < 128 * 13 * zones.kept(0) * 2


def test_tokens_in_another_order_give_the_bits_of_copies(
    operands: Callable[..., tuple[Tensor, ...]],
) -> None:
    zones = zone_pattern("diagonal", block=(32, 32))
    length = zones.query_length
    q, k, v = operands(query_length=length)
    order = torch.randperm(length, generator=torch.Generator().manual_seed(1))
    kernel = CpuZones(zones, dtype=torch.float32, head_dim=64).at(3)
    assert isinstance(kernel, ReorderingKernel)
    tokens = order.to(torch.int32)
    out = kernel.reordered(q, k, v, tokens, tokens)
    copies = kernel(*(x[:, :, order] for x in (q, k, v)))
    assert torch.equal(out[:, :, order], copies)


def test_refuses_operands_of_another_kind(operands: Callable[..., tuple[Tensor, ...]]) -> None:
    zones = zone_pattern("plain", block=(32, 32))
    kernel = CpuZones(zones, dtype=torch.float32, head_dim=64)
    with pytest.raises(KernelError, match="plan of this size"):
        kernel(*operands(query_length=100), step=0)
    sizes: dict[str, Any] = {"query_length": zones.query_length, "key_length": zones.key_length}
    with pytest.raises(KernelError, match="compiled for"):
        kernel(*operands(**sizes, dtype=torch.float64), step=0)
