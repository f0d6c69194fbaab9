"""Keys that a mask cuts, by every kernel that runs here, against stock SDPA in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.common.padding import KeyPadding
from calibatt_compiler.kernels.cpu.attention import NativeCpuAttention
from calibatt_compiler.kernels.energy import attention_with_energy, block_energy
from calibatt_compiler.kernels.gradients import attention_gradients
from calibatt_compiler.kernels.reference.attention import ReferenceAttention
from calibatt_compiler.plan.copies import AnchorRows

LENGTH = 203


def holes(*spans):
    """Key masks of a batch: each cuts one span of keys."""
    mask = torch.ones(len(spans), LENGTH, dtype=torch.bool)
    for row, (first, last) in zip(mask, spans, strict=True):
        row[first:last] = False
    return mask


MASKS = {
    "tails": holes((190, LENGTH), (77, LENGTH)),
    "one key": holes((1, LENGTH), (LENGTH, LENGTH)),
    "first keys": holes((0, 40), (0, 129)),
    "in the midst": holes((5, 64), (17, 131)),
    "no padding": holes((0, 0), (0, 0)),
    "one for all": holes((150, LENGTH)),
    "scattered": torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(3)) < 0.6,
}


def exact(q, k, v, pattern, mask, rows):
    """Stock SDPA under the pattern and the mask, a bool for each pair of tokens."""
    pairs = pattern.token_mask()[None] & mask[:, None, None]
    out = scaled_dot_product_attention(q, k, v, attn_mask=pairs)
    out = out.masked_fill(~pairs.any(-1, keepdim=True), 0)
    return out.masked_fill(~mask[:, None, :, None], 0) if rows else out


def kernels(pattern, dtype, head_dim):
    yield ReferenceAttention(pattern)
    yield NativeCpuAttention(pattern, dtype=dtype, head_dim=head_dim)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_keys_that_are_cut_take_no_part(name, rows, operands, random_pattern, accuracy):
    mask = MASKS[name]
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = operands(batch=2, query_length=LENGTH, head_dim=24, dtype=dtype)
        pattern = random_pattern(query_length=LENGTH, block=(32, 64))
        want = exact(q.double(), k.double(), v.double(), pattern, mask, rows)
        yardstick = exact(q, k, v, pattern, mask, rows)
        for kernel in kernels(pattern, dtype, 24):
            out = kernel(q, k, v, padding=KeyPadding.of(mask, rows=rows))
            accuracy(out, want, yardstick).check()
            assert out.transpose(1, 2).is_contiguous()


def test_what_is_cut_may_hold_anything_finite(operands, random_pattern):
    q, k, v = operands(batch=2, query_length=LENGTH)
    pattern, mask = random_pattern(query_length=LENGTH), MASKS["in the midst"]
    others = [x.masked_fill(~mask[:, None, :, None], 1e30) for x in (k, v)]
    for kernel in kernels(pattern, torch.float32, 64):
        outs = [kernel(q, *kv, padding=KeyPadding.of(mask)) for kv in ((k, v), others)]
        assert torch.equal(*outs)


@pytest.mark.parametrize("low", [-math.inf, torch.finfo(torch.float32).min, -10000.0, -0.7])
def test_a_float_mask_is_added_to_the_scores(low, operands, random_pattern, accuracy):
    q, k, v = operands(batch=2, query_length=LENGTH)
    pattern = random_pattern(query_length=LENGTH, weighted=True)
    bias = torch.zeros(2, LENGTH).masked_fill_(~MASKS["tails"], low)
    weights = torch.from_numpy(pattern.log_weights()).double()
    pairs = torch.where(pattern.mask(), weights, -torch.inf).repeat_interleave(64, -1)
    pairs = pattern.rows_to_tokens(pairs[..., :LENGTH]) + bias[:, None, None]
    want, yardstick = (
        scaled_dot_product_attention(*(x.to(dtype) for x in (q, k, v)), attn_mask=pairs.to(dtype))
        for dtype in (torch.float64, torch.float32)
    )
    alive = (pairs > -1e30).any(-1)
    for kernel in kernels(pattern, torch.float32, 64):
        out = kernel(q, k, v, padding=KeyPadding.of(bias))
        accuracy(out[alive], want[alive], yardstick[alive]).check()
        assert out.isfinite().all()


def test_row_shared_heads_honour_it(operands, random_pattern, accuracy):
    copies = AnchorRows((1, 9, 20), 3, 0)
    pattern = random_pattern(
        query_length=LENGTH, block=(32, 32), repetitive=(True, False), copies=copies
    )
    q, k, v = operands(batch=2, query_length=LENGTH)
    padding = KeyPadding.of(MASKS["tails"], rows=True)
    want = ReferenceAttention(pattern)(q.double(), k.double(), v.double(), padding=padding)
    yardstick = ReferenceAttention(pattern)(q, k, v, padding=padding)
    kernel = NativeCpuAttention(pattern, dtype=torch.float32, head_dim=64)
    accuracy(kernel(q, k, v, padding=padding), want, yardstick).check()


def test_tokens_in_another_order(operands, random_pattern):
    q, k, v = operands(batch=2, query_length=LENGTH)
    tokens = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(1)).int()
    pattern, mask = random_pattern(query_length=LENGTH), MASKS["tails"]
    padding = KeyPadding.of(mask, rows=True).ordered(tokens)
    kernel = NativeCpuAttention(pattern, dtype=torch.float32, head_dim=64)
    out = kernel.reordered(q, k, v, tokens, tokens, padding=padding)
    laid = (x[:, :, tokens.long()] for x in (q, k, v))
    want = ReferenceAttention(pattern)(*laid, padding=padding)
    torch.testing.assert_close(out[:, :, tokens.long()], want)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("name", ["tails", "in the midst", "one for all"])
def test_gradients_are_those_of_the_masked_definition(name, rows, operands, random_pattern):
    operands_ = [x.double() for x in operands(batch=2, query_length=LENGTH, head_dim=16)]
    pattern, mask = random_pattern(query_length=LENGTH, block=(32, 32)), MASKS[name]
    grad = torch.randn_like(operands_[0])
    for by, pairs in ((pattern, pattern.token_mask()), (None, torch.ones(LENGTH, LENGTH).bool())):
        leaves = [x.clone().requires_grad_() for x in operands_]
        kept = pairs & mask[:, None, None]
        out = scaled_dot_product_attention(*leaves, attn_mask=kept.expand(2, 2, -1, -1))
        dead = ~kept.any(-1, keepdim=True)
        out = out.masked_fill(dead | (~mask[:, None, :, None] & rows), 0)
        want = torch.autograd.grad(out, leaves, grad)
        padding = KeyPadding.of(mask, rows=rows)
        got = attention_gradients(grad, *operands_, by, 16**-0.5, padding)
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other.nan_to_num())


def test_bounds_say_where_the_hole_is():
    scattered = torch.tensor([[True, False, True, False, True]])
    for mask, want in (
        (holes((190, LENGTH)), [190, LENGTH, 1, 190]),
        (holes((5, 64)), [5, 64, 1, -1]),
        (holes((0, 0)), [0, 0, 1, LENGTH]),
        (holes((0, LENGTH)), [0, LENGTH, 1, 0]),
        (scattered, [1, 4, 0, -1]),
        (torch.tensor([[0.0, 0.0, -1.0]]), [2, 3, 0, -1]),
    ):
        assert KeyPadding.of(mask).bounds.tolist() == [want]


def test_what_does_not_fit_is_refused(operands, random_pattern):
    q, k, v = operands(batch=2, query_length=LENGTH)
    pattern = random_pattern(query_length=LENGTH)
    for mask in (torch.ones(3, LENGTH).bool(), torch.ones(2, LENGTH - 1).bool()):
        with pytest.raises(KernelError, match="doesn't fit the keys"):
            ReferenceAttention(pattern)(q, k, v, padding=KeyPadding.of(mask))
    with pytest.raises(KernelError, match="pooled keys"):
        ReferenceAttention(random_pattern(query_length=LENGTH, pooled=1))(
            q, k, v, padding=KeyPadding.of(MASKS["tails"])
        )


@pytest.mark.parametrize("queries", [1.0, 0.25])
@pytest.mark.parametrize("name", MASKS)
def test_padded_keys_have_no_energy(name, queries, operands, accuracy):
    mask, block = MASKS[name], (32, 64)
    q, k, v = operands(batch=2, query_length=LENGTH, head_dim=24)
    padding = KeyPadding.of(mask, rows=True)
    out, energy = attention_with_energy(q, k, v, block=block, queries=queries, padding=padding)
    scores = q.double() @ k.double().mT * 24**-0.5
    p = scores.masked_fill(~mask[:, None, None], -math.inf).softmax(-1)
    every = round(1 / queries)
    rows = [part.mean(2) for part in torch.split(p[:, :, ::every], block[0] // every, 2)]
    want = torch.stack([c.sum(-1) for c in torch.split(torch.stack(rows, 2), block[1], -1)], -1)
    assert (energy - want).abs().max() < 1e-6
    dense = (p @ v.double()).masked_fill(~mask[:, None, :, None], 0)
    assert (out - dense).abs().max() < 1e-5
    alone = block_energy(q, k, block=block, queries=queries, padding=padding)
    assert (alone - want).abs().max() < 1e-6
