"""The FlexAttention kernel for CPUs: right everywhere, and compiled once a shape."""

import warnings

import pytest
import torch
from torch import nn

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.flex_cpu import FlexCpuAttention, flex_cpu_available

pytestmark = pytest.mark.skipif(not flex_cpu_available(), reason="needs an x86 CPU with AVX2")


@pytest.fixture
def compilations():
    """Count the frames that Dynamo compiles: `compilations()` -> number since the last question."""
    counters = torch._dynamo.utils.counters
    last = counters["stats"]["unique_graphs"]

    def since() -> int:
        nonlocal last
        now = counters["stats"]["unique_graphs"]
        new, last = now - last, now
        return new

    return since


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_dense_attention_under_the_mask(operands, random_pattern, assert_attention, dtype):
    q, k, v = operands(batch=2, heads=3, query_length=333, key_length=205, head_dim=64, dtype=dtype)
    pattern = random_pattern(heads=3, query_length=333, key_length=205, block=(128, 64))
    assert_attention(FlexCpuAttention(pattern)(q, k, v), q, k, v, pattern)


@pytest.mark.parametrize("length", [1, 50, 129])
def test_a_ragged_last_block_attends_no_padding(operands, random_pattern, assert_attention, length):
    q, k, v = operands(query_length=length)
    pattern = random_pattern(query_length=length, density=0.7)
    assert_attention(FlexCpuAttention(pattern)(q, k, v), q, k, v, pattern)


def test_nan_past_the_end_is_not_read(operands, random_pattern, assert_attention):
    q, k, v = operands(query_length=256)
    k[:, :, 200:] = torch.nan
    v[:, :, 200:] = torch.nan
    q, k, v = q[:, :, :200], k[:, :, :200], v[:, :, :200]
    pattern = random_pattern(query_length=200, density=0.9)
    assert_attention(FlexCpuAttention(pattern)(q, k, v), q, k, v, pattern)


def test_one_compilation_serves_all_patterns_of_a_shape(operands, random_pattern, compilations):
    FlexCpuAttention(random_pattern(query_length=140))(*operands(query_length=140))
    assert compilations() <= 1
    for seed in range(1, 12):
        pattern = random_pattern(query_length=140, seed=seed, density=seed / 12)
        FlexCpuAttention(pattern)(*operands(query_length=140, seed=seed))
    assert compilations() == 0


def test_call_state_is_no_reason_to_compile_again(
    operands, random_pattern, assert_attention, compilations
):
    pattern = random_pattern(query_length=141)
    kernel = FlexCpuAttention(pattern)
    q, k, v = operands(query_length=141)
    kernel(q, k, v)
    compilations()
    with torch.no_grad():
        kernel(q, k, v)
    with torch.inference_mode():
        out = kernel(q, k, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kernel(q, k, v).dtype == torch.float32
    kernel(q.requires_grad_(), k, v)
    assert_attention(kernel(q, q, q), q, q, q, pattern)
    odd_batch_stride = torch.empty_strided(q.shape, (7, *q.stride()[1:])).copy_(q.detach())
    assert_attention(kernel(odd_batch_stride, k, v), q.detach(), k, v, pattern)
    assert compilations() == 0
    assert_attention(out, q.detach(), k, v, pattern)


def test_more_shapes_than_the_recompile_limit_never_run_eagerly(
    operands, random_pattern, compilations
):
    shapes = range(20, 20 + torch._dynamo.config.recompile_limit + 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # eager FlexAttention warns
        for length in shapes:
            kernel = FlexCpuAttention(random_pattern(query_length=length, block=(16, 16)))
            kernel(*operands(query_length=length, head_dim=16))
    assert compilations() == len(shapes)


@pytest.mark.parametrize("permuted", [True, False])
def test_layouts(operands, random_pattern, assert_attention, permuted):
    q, k, v = operands(batch=2, permuted=permuted)
    pattern = random_pattern()
    assert_attention(FlexCpuAttention(pattern)(q, k, v), q, k, v, pattern)


def test_views_of_a_fused_projection(random_pattern, assert_attention):
    qkv = torch.randn(1, 200, 3, 2, 64, generator=torch.Generator().manual_seed(0))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    pattern = random_pattern()
    assert_attention(FlexCpuAttention(pattern)(q, k, v), q, k, v, pattern)
    transposed = k.transpose(2, 3).contiguous().transpose(2, 3)
    assert_attention(FlexCpuAttention(pattern)(q, transposed, v), q, k, v, pattern)


def test_scale(operands, random_pattern, assert_attention):
    q, k, v = operands()
    pattern = random_pattern()
    out = FlexCpuAttention(pattern)(q, k, v, scale=0.3)
    assert_attention(out, q, k, v, pattern, scale=0.3)


def test_compiles_inside_a_compiled_graph_that_must_not_recompile(operands, random_pattern):
    pattern = random_pattern(query_length=143)
    kernel = FlexCpuAttention(pattern)

    @torch.library.custom_op("calibatt_test_flex::attend", mutates_args=())
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return kernel(q, k, v)

    @attend.register_fake
    def _(q, k, v):
        return torch.empty_like(q.transpose(1, 2)).transpose(1, 2)

    class Layer(nn.Module):
        def forward(self, q, k, v):
            return attend(q * 2, k, v) + 1

    q, k, v = operands(query_length=143)
    layer = torch.compile(Layer(), fullgraph=True)
    expected = kernel.__call__(q * 2, k, v) + 1
    with torch.no_grad():
        torch.testing.assert_close(layer(q, k, v), expected)
        with torch.compiler.set_stance("fail_on_recompile"):
            # Another layout: the outer graph is compiled already, the kernel is not.
            new = FlexCpuAttention(random_pattern(query_length=143, block=(32, 32)))
            kernel = new
            torch.testing.assert_close(layer(q, k, v), new(q * 2, k, v) + 1)


def test_refuses_what_it_can_not_take(operands, random_pattern):
    kernel = FlexCpuAttention(random_pattern())
    with pytest.raises(KernelError, match="float64"):
        kernel(*operands(dtype=torch.float64))
    with pytest.raises(KernelError, match="plan of this size"):
        kernel(*operands(query_length=100))
