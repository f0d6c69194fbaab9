"""Gradients of attention against autograd through the pattern expanded to tokens, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels import gradients
from calibatt_compiler.kernels.gradients import attention_gradients
from calibatt_compiler.kernels.reference.attention import masked_dense_attention
from calibatt_compiler.plan.copies import AnchorRows
from calibatt_compiler.plan.pattern import BlockPattern

Operands = tuple[Tensor, Tensor, Tensor, Tensor]


def made(pattern: BlockPattern, dtype: torch.dtype = torch.float64, head_dim: int = 5) -> Operands:
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (2, length, pattern.heads, head_dim)
        for length in (pattern.query_length,) * 2 + (pattern.key_length,) * 2
    ]
    grad, q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return tuple(x.to(dtype).transpose(1, 2) for x in (grad, q, k, v))


def expected(pattern: BlockPattern | None, operands: Operands, scale: float) -> list[Tensor]:
    grad, *inputs = (x.detach().double() for x in operands)
    q, k, v = (x.requires_grad_() for x in inputs)
    if pattern is None:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
    elif pattern.repetitive is not None:
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=pattern.token_mask(), scale=scale
        )
        taken = pattern.copies.computed(pattern.query_length)
        taken = torch.from_numpy(taken[pattern.copies.sources(pattern.query_length)].astype(int))
        copied = torch.from_numpy(pattern.repetitive)[:, None, None]
        out = out.where(~copied, out[:, :, taken])
    else:
        out = masked_dense_attention(q, k, v, pattern, scale=scale)
    return list(torch.autograd.grad(out, (q, k, v), grad))


def patterns() -> dict[str, BlockPattern]:
    generator = torch.Generator().manual_seed(3)

    def mask(heads: int, rows: int, columns: int) -> Tensor:
        found = torch.rand(heads, rows, columns, generator=generator) < 0.4
        found[..., 0] |= ~found.any(-1)
        return found

    square = {"query_length": 75, "key_length": 75, "block": (16, 16)}
    weight = 2.0 ** torch.randint(0, 4, (3, 5, 5), generator=generator)
    copies = AnchorRows((3, 5, 5), 2)
    computed = -(-len(copies.computed(75)) // 16)
    shared = mask(3, 5, 5)
    shared[1, computed:] = False
    repetitive = np.array([False, True, False])
    return {
        "square": BlockPattern.from_mask(mask(3, 5, 5), **square),
        "rectangular": BlockPattern.from_mask(
            mask(2, 3, 4), query_length=41, key_length=103, block=(16, 32)
        ),
        "weighted": BlockPattern.from_mask(mask(3, 5, 5), **square, weight=weight),
        "pooled": BlockPattern.from_mask(mask(3, 5, 5), **square, pooled=2),
        "repetitive": BlockPattern.from_mask(
            shared, **square, repetitive=repetitive, copies=copies
        ),
    }


@pytest.mark.parametrize("at_a_time", [1, 1 << 25])
@pytest.mark.parametrize("name", [*patterns(), "dense"])
def test_gradients_are_those_of_the_definition(
    name: str, at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "AT_A_TIME", at_a_time)
    pattern = patterns().get(name)
    operands = made(pattern or patterns()["rectangular"])
    found = attention_gradients(*operands, pattern, 0.4)
    for got, want in zip(found, expected(pattern, operands, 0.4), strict=True):
        assert torch.allclose(got, want, atol=1e-12)
        assert got.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_is_rounded_once(dtype: torch.dtype) -> None:
    pattern = patterns()["square"]
    operands = made(pattern, dtype)
    for got, want in zip(
        attention_gradients(*operands, pattern, 0.4), expected(pattern, operands, 0.4), strict=True
    ):
        assert got.dtype == dtype
        eps = torch.finfo(dtype).eps
        assert (got.double() - want).abs().max() < 4 * eps * want.abs().max()


def test_what_is_dropped_has_no_part() -> None:
    mask = torch.ones(1, 5, 5, dtype=torch.bool)
    mask[..., 2] = False
    pattern = BlockPattern.from_mask(mask, query_length=75, key_length=75, block=(16, 16))
    operands = made(pattern)
    clean = attention_gradients(*operands, pattern, 0.4)
    operands[2][:, :, 32:48] = torch.nan
    operands[3][:, :, 32:48] = torch.inf
    for got, want in zip(attention_gradients(*operands, pattern, 0.4), clean, strict=True):
        assert torch.equal(got, want)
    assert not clean[1][:, :, 32:48].any()


def test_operands_are_checked() -> None:
    grad, q, k, v = made(patterns()["square"])
    with pytest.raises(KernelError, match="don't fit the pattern"):
        attention_gradients(grad, q[:, :, 1:], k, v, patterns()["square"], 1.0)
