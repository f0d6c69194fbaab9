"""The reference kernel against dense attention in float64."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.reference.attention import ReferenceAttention, masked_dense_attention
from calibatt_compiler.plan.copies import AnchorRows
from calibatt_compiler.plan.order import TokenOrder
from calibatt_compiler.plan.pattern import BlockPattern


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("query_length", "key_length"), [(256, 256), (200, 333), (65, 17)])
def test_equals_dense_attention_under_the_mask(
    operands, random_pattern, assert_attention, dtype, query_length, key_length
):
    q, k, v = operands(
        batch=2, heads=3, query_length=query_length, key_length=key_length, head_dim=32, dtype=dtype
    )
    pattern = random_pattern(
        heads=3, query_length=query_length, key_length=key_length, block=(32, 64)
    )
    assert_attention(ReferenceAttention(pattern)(q, k, v), q, k, v, pattern)


def test_scale_is_applied(operands, random_pattern, assert_attention):
    q, k, v = operands()
    pattern = random_pattern()
    out = ReferenceAttention(pattern)(q, k, v, scale=0.7)
    assert_attention(out, q, k, v, pattern, scale=0.7)
    assert not torch.allclose(out, ReferenceAttention(pattern)(q, k, v), atol=1e-3)


def test_density_is_the_patterns(random_pattern):
    pattern = random_pattern(density=0.3)
    assert ReferenceAttention(pattern).density == pattern.density < 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("operand", "token"), [(0, 3), (1, 70), (2, 130)])
def test_kept_nonfinite_values_act_as_in_dense_attention(
    operands, random_pattern, value, operand, token
):
    broken = [x.clone() for x in operands(query_length=200)]
    broken[operand][0, 1, token] = value
    q, k, v = broken
    pattern = random_pattern(density=0.5)
    kept = pattern.token_mask()
    out = ReferenceAttention(pattern)(q, k, v)
    assert not out.isfinite().all()
    for head in range(2):
        for row in range(3, 200, 50):
            keys = kept[head, row]
            scores = q[0, head, row] @ k[0, head, keys].T / 8
            expected = scores.softmax(-1) @ v[0, head, keys]
            torch.testing.assert_close(out[0, head, row], expected, equal_nan=True)


def test_dropped_blocks_take_no_part(operands):
    q, k, v = operands(heads=1, query_length=128)
    pattern = BlockPattern.from_mask(torch.tensor([[[True, False], [True, False]]]), block=(64, 64))
    clean = ReferenceAttention(pattern)(q, k, v)
    k, v = k.clone(), v.clone()
    k[:, :, 64:] = math.nan
    v[:, :, 64:] = math.inf
    assert torch.equal(ReferenceAttention(pattern)(q, k, v), clean)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda q, k, v: (q[0], k, v), "four dimensions"),
        (lambda q, k, v: (q[:, :1], k, v), r"q \(1, 2, 200, 64\)"),
        (lambda q, k, v: (q, k[:, :, 1:], v[:, :, 1:]), "plan of this size"),
        (lambda q, k, v: (q, k.double(), v), "torch.float64"),
        (lambda q, k, v: (q.int(), k.int(), v.int()), "floating-point"),
        (lambda q, k, v: (q, k.to("meta"), v), "meta"),
    ],
)
def test_operands_that_do_not_fit_are_refused(operands, random_pattern, change, named):
    with pytest.raises(KernelError, match=named):
        ReferenceAttention(random_pattern())(*change(*operands()))


def test_oracle_is_dense_attention_for_a_full_pattern(operands):
    q, k, v = operands(dtype=torch.float64)
    expected = torch.softmax(q @ k.mT / 8, -1) @ v
    got = masked_dense_attention(q, k, v, BlockPattern.dense(2, 200, 200))
    torch.testing.assert_close(got, expected)


def test_a_weight_counts_a_block_so_many_times(operands):
    """Keys of a block with weight 4 act as if they stood there four times."""
    q, k, v = operands(heads=1, query_length=64, key_length=96, dtype=torch.float64)
    pattern = BlockPattern.from_mask(
        torch.tensor([[[True, True, False]]]),
        query_length=64,
        key_length=96,
        block=(64, 32),
        weight=torch.tensor([[[1.0, 4.0, 1.0]]]),
    )
    again = [torch.cat([x[:, :, :32], *[x[:, :, 32:64]] * 4], 2) for x in (k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(q, *again)
    close = {"rtol": 1e-6, "atol": 1e-6}  # the logarithm is a float32
    torch.testing.assert_close(ReferenceAttention(pattern)(q, k, v), expected, **close)
    torch.testing.assert_close(masked_dense_attention(q, k, v, pattern), expected, **close)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("weighted", "pooled"), [(True, 0), (False, 1), (True, 4)])
def test_weights_and_pooled_keys_equal_dense_attention_with_its_bias(
    operands, random_pattern, assert_attention, dtype, weighted, pooled
):
    q, k, v = operands(batch=2, heads=3, query_length=201, key_length=150, dtype=dtype)
    pattern = random_pattern(
        heads=3, query_length=201, key_length=150, weighted=weighted, pooled=pooled
    )
    assert_attention(ReferenceAttention(pattern)(q, k, v), q, k, v, pattern)


@pytest.mark.parametrize("order", ["raster", "1x2x3"])
def test_repetitive_heads_by_their_words(operands, order):
    """Row y of a frame has what its nearest anchor row has in dense attention."""
    q, k, v = operands(batch=2, heads=3, query_length=71, head_dim=16, dtype=torch.float64)
    dense = torch.softmax(q @ k.mT / 4, -1) @ v
    expected = dense.clone()
    nearest = [1, 1, 1, 1, 5, 5, 5]  # of 7 rows 1 and 5 are computed, row 3 is as near to both
    for frame in range(2):
        for row in range(7):
            there, here = (3 + frame * 28 + y * 4 for y in (nearest[row], row))
            expected[:, 1, here : here + 4] = dense[:, 1, there : there + 4]
    order = TokenOrder.parse(order)
    pattern = BlockPattern.from_mask(
        torch.ones(3, 5, 5, dtype=torch.bool),
        query_length=71,
        key_length=71,
        block=(16, 16),
        repetitive=np.array([False, True, False]),
        copies=AnchorRows((2, 7, 4), 2, first=3, order=order),
    )
    tokens = order.tokens((2, 7, 4), length=71, first=3)
    tokens = np.arange(71) if tokens is None else tokens
    q, k, v, expected = (x[:, :, tokens] for x in (q, k, v, expected))
    torch.testing.assert_close(ReferenceAttention(pattern)(q, k, v), expected)
    torch.testing.assert_close(masked_dense_attention(q, k, v, pattern), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("weighted", "pooled"), [(False, 0), (True, 4)])
def test_repetitive_heads_equal_dense_attention_and_copies(
    operands, random_pattern, assert_attention, dtype, weighted, pooled
):
    q, k, v = operands(batch=2, heads=3, query_length=201, key_length=150, dtype=dtype)
    pattern = random_pattern(
        heads=3,
        query_length=201,
        key_length=150,
        weighted=weighted,
        pooled=pooled,
        repetitive=(True, False, True),
        copies=AnchorRows((2, 10, 9), 3, first=8),
    )
    # A computed row that keeps only some keys.
    bits = pattern.bits.copy()
    bits[0, 1] = 0b101
    pattern = replace(pattern, bits=bits)
    assert_attention(ReferenceAttention(pattern)(q, k, v), q, k, v, pattern)


def test_pooled_to_single_tokens_it_is_dense_attention(operands, random_pattern):
    q, k, v = operands(dtype=torch.float64, query_length=120, key_length=75)
    pattern = random_pattern(query_length=120, key_length=75, block=(32, 16), pooled=16)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(ReferenceAttention(pattern)(q, k, v), expected)


def test_keys_that_are_alike_are_pooled_without_loss(operands, random_pattern):
    """Blocks whose keys are all equal, and values too: pooling is exact, dropping is not."""
    q, k, v = operands(dtype=torch.float64, query_length=64, key_length=90)
    k, v = (x[:, :, ::16].repeat_interleave(16, 2)[:, :, :90] for x in (k, v))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    shape = {"query_length": 64, "key_length": 90, "block": (32, 16)}
    pooled, dropped = (ReferenceAttention(random_pattern(**shape, pooled=p)) for p in (1, 0))
    torch.testing.assert_close(pooled(q, k, v), dense)
    assert (dropped(q, k, v) - dense).abs().max() > 0.01
