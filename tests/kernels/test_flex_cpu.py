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


# Each shape, dtype and layout costs a run of the C++ compiler: tests share them where they can.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_dense_attention_under_the_mask(operands, random_pattern, assert_attention, dtype):
    shape = {"heads": 3, "query_length": 333, "key_length": 205}
    q, k, v = operands(batch=2, dtype=dtype, permuted=dtype != torch.float16, **shape)
    pattern = random_pattern(block=(128, 64), **shape)
    assert_attention(FlexCpuAttention(pattern)(q, k, v), q, k, v, pattern)


def test_a_single_token(operands, random_pattern, assert_attention):
    q, k, v = operands(query_length=1)
    pattern = random_pattern(query_length=1)
    assert_attention(FlexCpuAttention(pattern)(q, k, v), q, k, v, pattern)


def test_nothing_past_the_end_is_read(operands, random_pattern, assert_attention):
    q, k, v = operands(query_length=256)
    k[:, :, 200:] = torch.nan
    v[:, :, 200:] = torch.nan
    q, k, v = q[:, :, :200], k[:, :, :200], v[:, :, :200]
    pattern = random_pattern(query_length=200, density=0.9)
    assert_attention(FlexCpuAttention(pattern)(q, k, v), q, k, v, pattern)


def test_one_compilation_serves_all_patterns_of_a_shape(operands, random_pattern, compilations):
    FlexCpuAttention(random_pattern())(*operands())
    assert compilations() <= 1
    for seed in range(1, 12):
        pattern = random_pattern(seed=seed, density=seed / 12)
        FlexCpuAttention(pattern)(*operands(seed=seed))
    assert compilations() == 0


def test_call_state_is_no_reason_to_compile_again(
    operands, random_pattern, assert_attention, compilations
):
    pattern = random_pattern()
    kernel = FlexCpuAttention(pattern)
    q, k, v = operands()
    kernel(q, k, v)
    compilations()
    with torch.no_grad():
        kernel(q, k, v)
    with torch.inference_mode():
        out = kernel(q, k, v)
        assert_attention(out, q, k, v, pattern)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kernel(q, k, v).dtype == torch.float32
    assert_attention(kernel(q, q, q), q, q, q, pattern)
    odd_batch_stride = torch.empty(1, 2 * q.numel()).as_strided(q.shape, (7, *q.stride()[1:]))
    odd_batch_stride.copy_(q)
    assert_attention(kernel(odd_batch_stride, k, v), q, k, v, pattern)
    transposed = k.transpose(2, 3).contiguous().transpose(2, 3)
    assert_attention(kernel(q, transposed, v), q, k, v, pattern)
    assert not kernel(q.requires_grad_(), k, v).requires_grad
    assert compilations() == 0


def test_operands_made_in_inference_mode(operands, random_pattern, assert_attention):
    pattern = random_pattern()
    kernel = FlexCpuAttention(pattern)
    with torch.inference_mode():
        q, k, v = operands()
        assert_attention(kernel(q, k, v), q, k, v, pattern)


def test_beyond_the_recompile_limit_nothing_runs_eagerly(operands, random_pattern, compilations):
    pattern = random_pattern(query_length=20, block=(16, 16))
    kernel = FlexCpuAttention(pattern)
    with torch._dynamo.config.patch(recompile_limit=1), warnings.catch_warnings():
        warnings.simplefilter("error")  # eager FlexAttention warns
        for scale in (0.1, 0.2, 0.3):
            kernel(*operands(query_length=20, head_dim=16), scale=scale)
    assert compilations() == 3


def test_views_of_a_fused_projection_with_a_scale(random_pattern, assert_attention):
    qkv = torch.randn(1, 200, 3, 2, 64, generator=torch.Generator().manual_seed(0))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    pattern = random_pattern()
    out = FlexCpuAttention(pattern)(q, k, v, scale=0.3)
    assert_attention(out, q, k, v, pattern, scale=0.3)


def test_compiles_inside_a_compiled_graph_that_must_not_recompile(operands, random_pattern):
    kernels = [
        FlexCpuAttention(random_pattern()),
        FlexCpuAttention(random_pattern(block=(32, 32))),  # another signature: compiles
    ]

    @torch.library.custom_op("calibatt_test_flex::attend", mutates_args=())
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return kernels[0](q, k, v)

    @attend.register_fake
    def _(q, k, v):
        return torch.empty_like(q.transpose(1, 2)).transpose(1, 2)

    class Layer(nn.Module):
        def forward(self, q, k, v):
            return attend(q * 2, k, v) + 1

    q, k, v = operands()
    layer = torch.compile(Layer(), fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(layer(q, k, v), kernels[0](q * 2, k, v) + 1)
        with (
            torch.compiler.set_stance("fail_on_recompile"),
            torch._dynamo.config.patch(error_on_recompile=True),
        ):
            kernels.pop(0)
            out = layer(q, k, v)
        torch.testing.assert_close(out, kernels[0](q * 2, k, v) + 1)


def test_refuses_what_it_can_not_take(operands, random_pattern):
    kernel = FlexCpuAttention(random_pattern())
    with pytest.raises(KernelError, match="float64"):
        kernel(*operands(dtype=torch.float64))
    with pytest.raises(KernelError, match="plan of this size"):
        kernel(*operands(query_length=100))
