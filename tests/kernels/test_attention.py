"""Which kernel is chosen, and that all of a machine's kernels agree."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.attention import attention_like, make_attention
from calibatt_compiler.kernels.common.dense import dense_attention
from calibatt_compiler.kernels.dispatch import FIXED_FROM, DeviceFacts
from calibatt_compiler.kernels.request import KernelRequest
from calibatt_compiler.kernels.tiered import Tier
from calibatt_compiler.plan.pattern import BlockPattern

CPU = torch.device("cpu")


def make(pattern, lowering="baked", device=CPU, dtype=torch.float32, head_dim=64):
    return make_attention(
        KernelRequest(pattern, lowering=lowering, device=device, dtype=dtype, head_dim=head_dim)
    )


@pytest.mark.parametrize("lowering", ["baked", "table"])
def test_one_kernel_serves_a_cpu(random_pattern, lowering):
    pattern = random_pattern()
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        kernel = make(pattern, lowering, dtype=dtype)
        assert kernel.kind == "native-cpu"
        assert kernel.density == pattern.density


def test_reference_serves_any_device(random_pattern):
    assert make(random_pattern(), "reference", device=torch.device("meta")).kind == "reference"


@pytest.mark.parametrize("lowering", ["baked", "table", "reference"])
def test_every_lowering_agrees_with_dense_attention(
    operands, random_pattern, assert_attention, lowering
):
    q, k, v = operands(query_length=201, key_length=97)
    pattern = random_pattern(query_length=201, key_length=97, block=(64, 32))
    assert_attention(make(pattern, lowering)(q, k, v), q, k, v, pattern)


def test_a_gpu_that_is_too_old_is_refused(random_pattern, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    with pytest.raises(KernelError, match=r"8\.0.*\n.*Old GPU") as raised:
        make(random_pattern(), device=torch.device("cuda"))
    assert "reference" in str(raised.value)


@pytest.mark.parametrize("lowering", ["table", "baked"])
@pytest.mark.parametrize("softmax", ["auto", "exact"])
def test_the_softmax_option_reaches_the_portable_kernels(monkeypatch, lowering, softmax):
    asked = []
    kernels = {"table": "portable.attention.TableAttention", "baked": "baked.attention.BakedTier"}

    class Kernel(Tier):
        reason = None

        def __init__(self, request, *_, **__):
            super().__init__()
            self.table = object()
            asked.append(request.softmax)

        def make(self):
            return self.table

    monkeypatch.setattr(f"calibatt_compiler.kernels.{kernels[lowering]}", Kernel)
    ampere = DeviceFacts("cuda", 80)
    monkeypatch.setattr(DeviceFacts, "of", classmethod(lambda cls, device: ampere))
    for length in (FIXED_FROM, FIXED_FROM - 1):
        make_attention(
            KernelRequest(
                BlockPattern.dense(1, 128, length),
                lowering=lowering,
                device=torch.device("cuda"),
                dtype=torch.bfloat16,
                head_dim=128,
                softmax=softmax,
            )
        )
    assert asked == [softmax, "exact"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_reference_serves_where_tables_do_not(random_pattern, monkeypatch, dtype):
    """As in calibration, which takes what there is."""
    ampere = DeviceFacts("cuda", 80)
    monkeypatch.setattr(DeviceFacts, "of", classmethod(lambda cls, device: ampere))
    kernel = attention_like(random_pattern(), torch.empty(1, 2, 3, 257, dtype=dtype))
    assert kernel.kind == "reference"
    monkeypatch.undo()
    kernel = attention_like(random_pattern(), torch.empty(1, 2, 3, 64, dtype=dtype))
    assert kernel.kind == "native-cpu"


@pytest.mark.parametrize("permuted", [True, False])
def test_dense_attention_has_the_layout_of_the_kernels(operands, permuted):
    q, k, v = operands(batch=2, key_length=90, permuted=permuted)
    out = dense_attention(q, k, v, 0.2)
    assert out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v, scale=0.2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("lowering", ["baked", "table", "reference"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_lowering_agrees_on_a_gpu(
    operands, random_pattern, assert_attention, lowering, head_dim, dtype
):
    shape = {"heads": 3, "query_length": 333, "key_length": 205}
    q, k, v = operands(batch=2, head_dim=head_dim, dtype=dtype, device="cuda", **shape)
    pattern = random_pattern(block=(128, 64), **shape)
    kernel = make(pattern, lowering, q.device, dtype, head_dim)
    assert kernel.density >= pattern.density
    # Triton sums in another order than the dense kernel: allow a little more than the least.
    assert_attention(kernel(q, k, v), q, k, v, pattern, factor=4)
