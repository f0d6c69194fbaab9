"""The matrix-product kernel for CPUs, and the workers under it."""

import threading

import pytest
import torch

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels import gemm_cpu
from calibatt_compiler.kernels.cpu_workers import balanced, run_shares
from calibatt_compiler.kernels.gemm_cpu import GemmCpuAttention, tiles
from calibatt_compiler.plan.pattern import BlockPattern


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param, "a kernel left its own number of threads"
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(333, 205, (128, 64)), (1, 70, (16, 32)), (130, 130, (32, 32))])
def test_equals_dense_attention_under_the_mask(
    operands, random_pattern, assert_attention, threads, dtype, size
):
    query_length, key_length, block = size
    shape = {"heads": 3, "query_length": query_length, "key_length": key_length}
    q, k, v = operands(batch=2, dtype=dtype, **shape)
    pattern = random_pattern(block=block, **shape)
    assert_attention(GemmCpuAttention(pattern)(q, k, v), q, k, v, pattern)


@pytest.mark.parametrize("permuted", [True, False])
def test_layouts_and_scale(operands, random_pattern, assert_attention, permuted):
    q, k, v = operands(batch=2, permuted=permuted)
    k = k.transpose(2, 3).contiguous().transpose(2, 3)
    pattern = random_pattern()
    out = GemmCpuAttention(pattern)(q, k, v, scale=0.3)
    assert_attention(out, q, k, v, pattern, scale=0.3)


def test_few_scores_at_a_time_give_the_same(
    operands, random_pattern, assert_attention, monkeypatch
):
    monkeypatch.setattr(gemm_cpu, "SCORES", 1000)
    q, k, v = operands()
    pattern = random_pattern(density=0.8)
    assert_attention(GemmCpuAttention(pattern)(q, k, v), q, k, v, pattern)


def test_dropped_blocks_are_not_read(operands):
    q, k, v = operands(heads=1, query_length=128)
    pattern = BlockPattern.from_mask(torch.tensor([[[True, False], [True, False]]]), block=(64, 64))
    clean = GemmCpuAttention(pattern)(q, k, v)
    k[:, :, 64:], v[:, :, 64:] = torch.nan, torch.inf
    assert torch.equal(GemmCpuAttention(pattern)(q, k, v), clean)


def test_tiles_cover_each_query_once_and_merge_equal_rows(random_pattern):
    pattern = random_pattern(heads=3, query_length=333, block=(32, 64))
    kept = pattern.token_mask()
    covered = torch.zeros(3, 333, dtype=torch.int)
    for tile in tiles(pattern):
        covered[tile.head, tile.start : tile.stop] += 1
        keys = torch.arange(333) if tile.keys is None else tile.keys
        assert tile.count == len(keys)
        for token in (tile.start, tile.stop - 1):
            assert torch.equal(kept[tile.head, token].nonzero().squeeze(1), keys.long())
    assert (covered == 1).all()
    merged = list(tiles(BlockPattern.dense(1, 600, 600, (64, 64))))
    assert [(tile.start, tile.stop) for tile in merged] == [(0, 256), (256, 512), (512, 600)]
    assert merged[0].keys is None


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_runs_in_every_gradient_mode(operands, random_pattern, assert_attention, mode):
    pattern = random_pattern()
    kernel = GemmCpuAttention(pattern)
    with mode():
        q, k, v = operands()
        if mode is torch.enable_grad:
            q.requires_grad_()
        out = kernel(q, k, v)
        assert not out.requires_grad
        assert_attention(out, q.detach(), k, v, pattern)


def test_autocast_does_not_round(operands, random_pattern):
    kernel = GemmCpuAttention(random_pattern())
    q, k, v = operands()
    expected = kernel(q, k, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(kernel(q, k, v), expected)


def test_calls_from_several_threads_at_once(operands, random_pattern):
    kernel = GemmCpuAttention(random_pattern())
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


def test_workers_are_single_threaded_and_errors_come_out(threads):
    seen = []
    run_shares([lambda: seen.append(torch.get_num_threads())] * 3)
    assert seen == [1, 1, 1]

    def fail():
        raise KernelError("a share failed")

    with pytest.raises(KernelError, match="a share failed"):
        run_shares([lambda: None, fail, lambda: None])


def test_balanced_shares_keep_order_and_differ_little():
    costs = [9.0, 1.0, 1.0, 1.0, 5.0, 2.0, 3.0, 2.0]
    shares = balanced(list(enumerate(costs)), lambda item: item[1], 3)
    assert sorted(item for share in shares for item in share) == list(enumerate(costs))
    assert all(share == sorted(share) for share in shares)
    totals = [sum(cost for _, cost in share) for share in shares]
    assert max(totals) == 9
    assert balanced([1], float, 4) == [[1]]


def test_refuses_operands_of_another_size(operands, random_pattern):
    with pytest.raises(KernelError, match="plan of this size"):
        GemmCpuAttention(random_pattern())(*operands(query_length=100))
