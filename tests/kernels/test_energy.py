"""Block energies: the CPU kernel, the plain path and the GPU kernel against float64."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels import energy as energy_module
from calibatt_compiler.kernels.common import dense as dense_lse
from calibatt_compiler.kernels.dispatch import DeviceFacts, fuses
from calibatt_compiler.kernels.energy import attention_with_energy, block_energy
from calibatt_compiler.kernels.reference.energy import reference_energy

SIZES = [
    # query_length, key_length, block
    (256, 256, (128, 128)),
    (200, 333, (64, 32)),
    (65, 17, (32, 48)),
    (1, 300, (16, 16)),
]


def plain_energy(q, k, block, scale=None):
    """The definition in the operands' own dtype: the yardstick of the error."""
    p = torch.softmax((q @ k.mT) * (scale or q.shape[-1] ** -0.5), -1)
    p = torch.stack([part.float().mean(2) for part in p.split(block[0], 2)], 2)
    return torch.stack([part.sum(-1) for part in p.split(block[1], -1)], -1).to(q.dtype)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_the_definition(operands, accuracy, size, dtype):
    query_length, key_length, block = size
    q, k, _ = operands(
        batch=2, heads=3, query_length=query_length, key_length=key_length, dtype=dtype
    )
    exact = reference_energy(q, k, block=block)
    yardstick = plain_energy(q.float(), k.float(), block)  # scores are float32 whatever the dtype
    energy = block_energy(q, k, block=block)
    assert energy.dtype == torch.float32
    assert energy.shape == (2, 3, -(-query_length // block[0]), -(-key_length // block[1]))
    accuracy(energy, exact, yardstick, factor=4).check()
    torch.testing.assert_close(energy.sum(-1), torch.ones(energy.shape[:-1]))
    plain = energy_module._chunked_energy(q, k, block, 64**-0.5, None)
    accuracy(plain, exact, yardstick, factor=4).check()


@pytest.mark.parametrize("path", [block_energy, energy_module._chunked_energy])
def test_takes_a_known_log_sum_exp(operands, path):
    q, k, _ = operands(query_length=130, key_length=75)
    lse = torch.logsumexp(q.double() @ k.double().mT * 0.2, -1)
    if path is block_energy:
        energy = path(q, k, block=(64, 32), scale=0.2, lse=lse)
    else:
        energy = path(q, k, (64, 32), 0.2, lse)
    torch.testing.assert_close(energy, reference_energy(q, k, block=(64, 32), scale=0.2).float())


def test_few_scores_at_a_time_give_the_same(operands, monkeypatch):
    q, k, _ = operands(query_length=200, key_length=150)
    exact = reference_energy(q, k, block=(64, 64)).float()
    monkeypatch.setattr(energy_module, "CHUNK", 7 * 2 * 150)
    torch.testing.assert_close(energy_module._chunked_energy(q, k, (64, 64), 0.125, None), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_is_dense_attention(operands, accuracy, dtype):
    q, k, v = operands(batch=2, query_length=200, key_length=77, dtype=dtype)
    out, energy = attention_with_energy(q, k, v, block=(64, 32))
    assert out.dtype == dtype
    assert out.transpose(1, 2).is_contiguous()
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double())
    accuracy(out, exact, scaled_dot_product_attention(q, k, v)).check()
    assert torch.equal(energy, block_energy(q, k, block=(64, 32)))


def test_the_number_of_threads_changes_no_bit(operands):
    q, k, v = operands(heads=3, query_length=300)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(attention_with_energy(q, k, v, block=(64, 64)))
    finally:
        torch.set_num_threads(threads)
    for out, energy in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(energy, results[0][1])


def test_uniform_attention_spreads_evenly():
    q, k = torch.zeros(1, 1, 96, 64), torch.randn(1, 1, 128, 64)
    energy = block_energy(q, k, block=(32, 32))
    torch.testing.assert_close(energy, torch.full((1, 1, 3, 4), 0.25))


def test_operands_are_left_alone_and_gradients_are_not_asked_for(operands):
    q, k, v = (x.clone().requires_grad_() for x in operands())
    copies = [x.detach().clone() for x in (q, k, v)]
    out, energy = attention_with_energy(q, k, v)
    assert not out.requires_grad
    assert not energy.requires_grad
    assert all(torch.equal(x, copy) for x, copy in zip((q, k, v), copies, strict=True))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda q, k: {"q": q[0]}, "fit one another"),
        (lambda q, k: {"k": k[:, :1]}, r"\(1, 1, 200, 64\)"),
        (lambda q, k: {"k": k.double()}, "float64"),
        (lambda q, k: {"q": q[:, :, :0]}, "not empty"),
        (lambda q, k: {"block": (100, 128)}, "multiples of 16"),
        (lambda q, k: {"block": (0, 128)}, "out of range"),
        (lambda q, k: {"lse": torch.zeros(1, 2, 3)}, "log-sum-exp"),
    ],
)
def test_operands_that_do_not_fit_are_refused(operands, change, named):
    q, k, _ = operands()
    with pytest.raises(KernelError, match=named):
        block_energy(**({"q": q, "k": k} | change(q, k)))


def test_values_that_do_not_fit_are_refused(operands):
    q, k, v = operands()
    with pytest.raises(KernelError, match="values"):
        attention_with_energy(q, k, v[:, :, 1:])


@pytest.mark.parametrize("every", [2, 4, 16])
def test_a_share_of_the_queries_gives_their_means(operands, every):
    q, k, v = operands(query_length=203, key_length=75)
    block = (64, 32)
    # The last query block has 11 queries: at every=16, one of them counts.
    exact = torch.stack(
        [
            reference_energy(q[:, :, first : first + 64 : every], k, block=block)[:, :, 0]
            for first in range(0, 203, 64)
        ],
        2,
    )
    lse = torch.logsumexp(q @ k.mT * 64**-0.5, -1)
    for known in (None, lse):
        energy = block_energy(q, k, block=block, lse=known, queries=1 / every)
        torch.testing.assert_close(energy, exact.float())
    out, energy = attention_with_energy(q, k, v, block=block, queries=1 / every)
    torch.testing.assert_close(energy, exact.float())
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v))
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("queries", [0.0, -1.0, 2.0, 0.3, 1 / 3, 1 / 128, float("nan")])
def test_a_share_of_no_stride_is_refused(operands, queries):
    q, k, v = operands()
    with pytest.raises(KernelError, match="share of queries"):
        block_energy(q, k, block=(64, 64), queries=queries)
    with pytest.raises(KernelError, match="share of queries"):
        attention_with_energy(q, k, v, block=(64, 64), queries=queries)


@pytest.fixture
def gpu_calls(monkeypatch):
    """Take the way of a GPU with tensors that have no data; what is called is written down."""
    calls = []
    triton_energy = pytest.importorskip("calibatt_compiler.kernels.portable.energy_scores")
    fused = pytest.importorskip("calibatt_compiler.kernels.portable.energy_fused")
    ampere = DeviceFacts("cuda", 80)
    monkeypatch.setattr(DeviceFacts, "of", classmethod(lambda cls, device: ampere))

    def scores_only(q, k, block, scale, lse):
        calls.append(("pass", tuple(q.shape), block, None if lse is None else tuple(lse.shape)))
        return torch.empty(0)

    def one_kernel(q, k, v, block, scale):
        calls.append(("fused", tuple(q.shape), block))
        return torch.empty_like(q), torch.empty(0)

    def dense(q, k, v, scale):
        calls.append(("dense", scale))
        return torch.empty_like(q), q.new_empty(q.shape[:3])

    monkeypatch.setattr(triton_energy, "triton_energy", scores_only)
    monkeypatch.setattr(fused, "triton_attention_and_energy", one_kernel)
    monkeypatch.setattr(energy_module, "dense_attention_and_lse", dense)
    return calls


@pytest.mark.parametrize(
    ("dtype", "head_dim", "arguments", "expected"),
    [
        (torch.bfloat16, 128, {}, ["fused"]),
        (torch.bfloat16, 128, {"fused": False}, ["dense", "pass"]),
        (torch.bfloat16, 128, {"queries": 0.25}, ["dense", "pass"]),
        (torch.float16, 256, {}, ["dense", "pass"]),
        (torch.float32, 64, {}, ["dense", "pass"]),
    ],
)
def test_on_a_gpu_keys_are_passed_over_once_more_at_most(
    gpu_calls, dtype, head_dim, arguments, expected
):
    q, k, v = (torch.empty(1, 2, 300, head_dim, dtype=dtype, device="meta") for _ in range(3))
    attention_with_energy(q, k, v, scale=0.5, **arguments)
    assert [call[0] for call in gpu_calls] == expected
    if expected[-1] == "pass":
        rows, block = (75, 32) if "queries" in arguments else (300, 128)
        assert gpu_calls == [
            ("dense", 0.5),
            ("pass", (1, 2, rows, head_dim), (block, 128), (1, 2, rows)),
        ]


@pytest.mark.parametrize(
    ("dtype", "queries"), [(torch.bfloat16, 0.5), (torch.float32, 1.0)], ids=str
)
def test_what_one_kernel_can_not_do_is_refused(gpu_calls, dtype, queries):
    q, k, v = (torch.empty(1, 2, 300, 64, dtype=dtype, device="meta") for _ in range(3))
    with pytest.raises(KernelError, match="one kernel"):
        attention_with_energy(q, k, v, queries=queries, fused=True)
    assert gpu_calls == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("head_dim", [64, 128, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpu_kernel_equals_the_definition(operands, accuracy, size, head_dim, dtype):
    query_length, key_length, block = size
    q, k, v = operands(
        batch=2,
        heads=3,
        query_length=query_length,
        key_length=key_length,
        head_dim=head_dim,
        dtype=dtype,
        device="cuda",
    )
    exact = reference_energy(q, k, block=block)
    yardstick = plain_energy(q.cpu().float(), k.cpu().float(), block)
    energy = block_energy(q, k, block=block)
    # The log-sum-exp, about 10, is held in float32: a relative error of some 10 roundings.
    accuracy(energy, exact, yardstick, factor=64).check()
    lse = torch.logsumexp(q.double() @ k.double().mT * head_dim**-0.5, -1)
    accuracy(block_energy(q, k, block=block, lse=lse), exact, yardstick, factor=64).check()
    dense = scaled_dot_product_attention(q.double(), k.double(), v.double())
    for fused in {False, fuses(dtype, head_dim)}:
        out, found = attention_with_energy(q, k, v, block=block, fused=fused)
        accuracy(found, exact, yardstick, factor=64).check()
        accuracy(out, dense, scaled_dot_product_attention(q, k, v)).check()
        assert out.transpose(1, 2).is_contiguous()
        again = attention_with_energy(q, k, v, block=block, fused=fused)
        assert torch.equal(again[0], out)
        assert torch.equal(again[1], found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", list(dense_lse.OPERATORS), ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 36])
def test_log_sum_exp_of_each_kernel_of_sdpa(operands, accuracy, backend, head_dim):
    q, k, v = operands(
        batch=2, query_length=333, key_length=200, head_dim=head_dim, dtype=torch.bfloat16,
        device="cuda",
    )  # fmt: skip
    with torch.nn.attention.sdpa_kernel(backend):
        if dense_lse.chosen_backend(q, k, v, 0.2) != backend:
            pytest.skip("SDPA does not take it for these operands")
        out, lse = dense_lse.dense_attention_and_lse(q, k, v, 0.2)
        assert torch.equal(out, scaled_dot_product_attention(q, k, v, scale=0.2))
    exact = torch.logsumexp(q.double() @ k.double().mT * 0.2, -1)
    torch.testing.assert_close(lse.double(), exact, rtol=1e-5, atol=1e-4)
