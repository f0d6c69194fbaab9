"""The C++ kernel for CPUs: right everywhere, on any number of threads."""

import dataclasses
import threading

import numpy as np
import pytest
import torch

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.cpu import attention as native_cpu
from calibatt_compiler.kernels.cpu.attention import NativeCpuAttention, native_energy
from calibatt_compiler.plan.copies import AnchorRows
from calibatt_compiler.plan.order import TokenOrder
from calibatt_compiler.plan.pattern import BlockPattern

COPIES = [
    AnchorRows((3, 6, 11), 2, first=5),
    AnchorRows((3, 6, 11), 6),
    AnchorRows((1, 29, 7), 5),
    AnchorRows((2, 10, 10), 3, first=2, order=TokenOrder((1, 4, 4))),
    AnchorRows((203, 1, 1), 5),
]
SIZES = [(333, 205, (128, 64)), (1, 70, (16, 32)), (130, 130, (32, 48)), (97, 16, (64, 16))]


def make(pattern, dtype=torch.float32, head_dim=64):
    return NativeCpuAttention(pattern, dtype=dtype, head_dim=head_dim)


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_equals_dense_attention_under_the_mask(
    operands, random_pattern, assert_attention, threads, dtype, size
):
    query_length, key_length, block = size
    shape = {"heads": 3, "query_length": query_length, "key_length": key_length}
    q, k, v = operands(batch=2, dtype=dtype, **shape)
    pattern = random_pattern(block=block, **shape)
    assert_attention(make(pattern, dtype)(q, k, v), q, k, v, pattern)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("weighted", "pooled"), [(True, 0), (False, 1), (True, 4), (False, 16)])
def test_weights_and_pooled_keys(
    operands, random_pattern, assert_attention, dtype, size, weighted, pooled
):
    query_length, key_length, block = size
    shape = {"heads": 3, "query_length": query_length, "key_length": key_length}
    q, k, v = operands(batch=2, dtype=dtype, **shape)
    pattern = random_pattern(block=block, weighted=weighted, pooled=pooled, **shape)
    assert_attention(make(pattern, dtype)(q, k, v), q, k, v, pattern)


@pytest.mark.parametrize("pooled", [0, 2])
def test_tokens_in_another_order_give_the_bits_of_copies(operands, random_pattern, pooled):
    q, k, v = operands(batch=2, query_length=200, key_length=130)
    kernel = make(random_pattern(query_length=200, key_length=130, pooled=pooled))
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randperm(n, generator=generator) for n in (200, 130))
    expected = torch.empty_like(q)
    expected[:, :, queries] = kernel(q[:, :, queries], k[:, :, keys], v[:, :, keys])
    out = kernel.reordered(q, k, v, queries.int(), keys.int())
    assert torch.equal(out, expected)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("weighted", "pooled"), [(False, 0), (True, 0), (True, 4)])
@pytest.mark.parametrize("copies", COPIES, ids=str)
def test_repetitive_heads(
    operands, random_pattern, assert_attention, threads, dtype, weighted, pooled, copies
):
    shape = {"heads": 3, "query_length": 203, "key_length": 130}
    q, k, v = operands(batch=2, dtype=dtype, **shape)
    pattern = random_pattern(
        block=(48, 32),
        weighted=weighted,
        pooled=pooled,
        repetitive=(True, False, True),
        copies=copies,
        **shape,
    )
    assert_attention(make(pattern, dtype)(q, k, v), q, k, v, pattern)


def test_rows_that_are_copied_are_neither_read_nor_computed(operands, random_pattern):
    copies = AnchorRows((2, 12, 8), 3, first=4)
    kernel = make(random_pattern(heads=1, repetitive=(True,), copies=copies))
    q, k, v = operands(heads=1)
    expected = kernel(q, k, v)
    rest = torch.ones(200, dtype=torch.bool)
    rest[copies.computed(200).tolist()] = False
    assert rest.sum() == 2 * 9 * 8
    q[:, :, rest] = torch.nan
    assert torch.equal(kernel(q, k, v), expected)


@pytest.mark.parametrize("tile", [None, (1, 4, 8)])
def test_repetitive_heads_in_another_order_give_the_bits_of_copies(operands, random_pattern, tile):
    order = TokenOrder(tile)
    copies = AnchorRows((2, 12, 8), 5, first=3, order=order)
    pattern = random_pattern(repetitive=(False, True), copies=copies)
    q, k, v = operands(batch=2)
    tokens = order.tokens(copies.grid, length=200, first=3)
    tokens = torch.arange(200) if tokens is None else torch.from_numpy(tokens)
    kernel = make(pattern)
    expected = torch.empty_like(q)
    expected[:, :, tokens] = kernel(q[:, :, tokens], k[:, :, tokens], v[:, :, tokens])
    out = kernel.reordered(q, k, v, tokens.int(), tokens.int())
    assert torch.equal(out, expected)
    raster = AnchorRows((2, 12, 8), 5, first=3)
    taken = raster.computed(200)[raster.sources(200)].tolist()
    assert torch.equal(out[:, 1], out[:, 1, taken])


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [1, 40, 128, 200])
def test_any_head_dim(operands, random_pattern, assert_attention, head_dim):
    q, k, v = operands(head_dim=head_dim)
    pattern = random_pattern()
    assert_attention(make(pattern, head_dim=head_dim)(q, k, v), q, k, v, pattern)


@pytest.mark.parametrize("permuted", [True, False])
def test_layouts_and_scale(operands, random_pattern, assert_attention, permuted):
    q, k, v = operands(batch=2, permuted=permuted)
    k = k.transpose(2, 3).contiguous().transpose(2, 3)
    pattern = random_pattern()
    assert_attention(make(pattern)(q, k, v, scale=0.3), q, k, v, pattern, scale=0.3)


def test_views_of_a_fused_projection(random_pattern, assert_attention):
    qkv = torch.randn(1, 200, 3, 2, 64, generator=torch.Generator().manual_seed(0))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    pattern = random_pattern()
    assert_attention(make(pattern)(q, k, v), q, k, v, pattern)


@pytest.mark.parametrize("growing", [True, False], ids=["growing", "falling"])
def test_scores_of_very_different_size(operands, random_pattern, assert_attention, growing):
    """The running maximum moves at every step, by more than an exponential can hold."""
    q, k, v = operands(query_length=300)
    ramp = torch.linspace(0, 60, 300) if growing else torch.linspace(60, 0, 300)
    k = k + ramp[:, None] * torch.sign(q.mean(2, keepdim=True))
    pattern = random_pattern(query_length=300, block=(64, 32))
    assert_attention(make(pattern)(q, k, v), q, k, v, pattern)


def test_dropped_blocks_and_what_lies_past_the_end_are_not_read(operands):
    q, k, v = operands(heads=1, query_length=200)
    mask = torch.tensor([[[True, False, True], [True, False, False]]])
    pattern = BlockPattern.from_mask(mask, query_length=100, key_length=140, block=(64, 64))
    kernel = make(pattern)
    kept = kernel(q[:, :, :100], k[:, :, :140], v[:, :, :140])
    for x in (k, v):
        x[:, :, 64:128], x[:, :, 140:] = torch.nan, torch.inf
    q[:, :, 100:] = torch.nan
    assert torch.equal(kernel(q[:, :, :100], k[:, :, :140], v[:, :, :140]), kept)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_what_is_not_finite_spreads_as_in_dense_attention(operands, bad, where):
    q, k, v = operands(heads=1, query_length=100)
    {"q": q, "k": k, "v": v}[where][0, 0, 70, 3] = bad
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    out = make(BlockPattern.dense(1, 100, 100, (32, 32)))(q, k, v)
    assert torch.equal(out.isfinite(), dense.isfinite())
    torch.testing.assert_close(out, dense, equal_nan=True)


def test_neither_threads_nor_repetition_change_a_bit(operands, random_pattern):
    q, k, v = operands(heads=3, query_length=500)
    kernel = make(random_pattern(heads=3, query_length=500))
    before = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            results.append(kernel(q, k, v))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_runs_in_every_gradient_mode(operands, random_pattern, assert_attention, mode):
    pattern = random_pattern()
    kernel = make(pattern)
    with mode():
        q, k, v = operands()
        if mode is torch.enable_grad:
            q.requires_grad_()
        out = kernel(q, k, v)
        assert not out.requires_grad
        assert_attention(out, q.detach(), k, v, pattern)


def test_calls_from_several_threads_at_once(operands, random_pattern):
    kernel = make(random_pattern())
    inputs = [operands(seed=seed) for seed in range(4)]
    expected = [kernel(*x) for x in inputs]
    results = {}
    callers = [
        threading.Thread(target=lambda i=i: results.setdefault(i, kernel(*inputs[i])))
        for i in range(4)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert all(torch.equal(results[i], expected[i]) for i in range(4))


def test_the_longest_rows_go_first():
    mask = torch.ones(1, 3, 4, dtype=torch.bool)
    mask[0, 0, 1:] = False
    pattern = BlockPattern.from_mask(mask, query_length=144, key_length=256, block=(64, 64))
    assert native_cpu._longest_first(pattern).tolist() == [1, 0, 2]  # 256, 64 and 16 x 4 blocks


def test_rows_that_are_not_computed_go_last(random_pattern):
    copies = AnchorRows((1, 18, 8), 9)  # 72 of 144 queries: a block of 64 and one of 8
    both = random_pattern(query_length=144, density=1, repetitive=(True, False), copies=copies)
    assert native_cpu._longest_first(both).tolist() == [0, 3, 4, 5, 1, 2]


def test_energies_are_the_same_with_and_without_the_output(operands):
    q, k, v = operands(query_length=200, key_length=150)
    out, energy = native_energy(q, k, v, (64, 32), 0.125, None)
    assert torch.equal(energy, native_energy(q, k, None, (64, 32), 0.125, None)[1])
    pattern = BlockPattern.dense(2, 200, 150, (64, 32))
    torch.testing.assert_close(out, make(pattern)(q, k, v, scale=0.125))


def test_refuses_operands_of_another_kind(operands, random_pattern):
    kernel = make(random_pattern())
    with pytest.raises(KernelError, match="plan of this size"):
        kernel(*operands(query_length=100))
    with pytest.raises(KernelError, match="compiled for"):
        kernel(*operands(dtype=torch.float64))
    with pytest.raises(KernelError, match="compiled for"):
        kernel(*operands(head_dim=32))
    with pytest.raises(KernelError, match="float8"):
        make(random_pattern(), dtype=torch.float8_e4m3fn)


def test_strided_tables_are_read_as_what_they_hold(operands, random_pattern, assert_attention):
    q, k, v = operands(query_length=200, key_length=700)
    for change in (np.asfortranarray, lambda x: np.repeat(x, 2, axis=-1)[..., ::2]):
        for pooled in (0, 2):
            pattern = random_pattern(query_length=200, key_length=700, pooled=pooled)
            bits = change(pattern.bits)
            assert not bits.flags.c_contiguous
            strided = dataclasses.replace(pattern, bits=bits)
            assert strided.digest == pattern.digest
            assert torch.equal(make(strided)(q, k, v), make(pattern)(q, k, v))
            assert_attention(make(strided)(q, k, v), q, k, v, pattern)


def test_refuses_orders_that_are_none(operands, random_pattern):
    q, k, v = operands(query_length=200, key_length=130)
    kernel = make(random_pattern(query_length=200, key_length=130))
    queries, keys = torch.arange(200).int(), torch.arange(130).int()
    too_far, twice, negative = queries.clone(), queries.clone(), queries.clone()
    too_far[3], twice[3], negative[3] = 10**9, 4, -(10**9)
    for wrong in (
        queries.long(),
        queries[:-1],
        queries[:, None],
        torch.arange(400).int()[::2],
        too_far,
        twice,
        negative,
        queries.to("meta"),
        queries.numpy(),
        None,
    ):
        with pytest.raises(KernelError, match="query_tokens is no order"):
            kernel.reordered(q, k, v, wrong, keys)
        with pytest.raises(KernelError, match="key_tokens is no order"):
            kernel.reordered(q, k, v, queries, wrong)


def test_energies_refuse_what_does_not_fit(operands):
    q, k, v = operands(query_length=100, key_length=70)
    block = (32, 32)
    lse = torch.zeros(q.shape[:3])
    wrong = {
        "fewer heads": (q, k[:, :1], v[:, :1], block, lse),
        "another batch": (q, k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1), block, lse),
        "head dim": (q, k[..., :16], v[..., :16], block, lse),
        "dtype": (q, k.double(), v.double(), block, lse),
        "dtype of v": (q, k, v.double(), block, lse),
        "shorter v": (q, k, v[:, :, :10], block, lse),
        "dimensions": (q[0], k[0], v[0], block, lse),
        "empty": (q[:, :, :0], k, v, block, lse),
        "no keys": (q, k[:, :, :0], v[:, :, :0], block, lse),
        "device": (q, k.to("meta"), v, block, lse),
        "block": (q, k, v, (0, 32), lse),
        "ragged block": (q, k, v, (32, 24), lse),
        "negative block": (q, k, v, (32, -32), lse),
        "lse": (q, k, v, block, lse[..., :10]),
    }
    for arguments in wrong.values():
        with pytest.raises(KernelError):
            native_energy(*arguments[:4], 0.125, arguments[4])


def test_without_a_compiler_the_error_says_what_to_do(random_pattern, monkeypatch):
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.exc import InvalidCxxCompiler

    def fail(source):
        raise InvalidCxxCompiler

    monkeypatch.setattr(CppCodeCache, "load", fail)
    with pytest.raises(KernelError, match=r"install g\+\+"):
        make(random_pattern(), head_dim=23)
