"""Block energies: the CPU kernel, the plain path and the GPU kernel against float64."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels import energy as energy_module
from calibatt_compiler.kernels.energy import attention_with_energy, block_energy
from calibatt_compiler.kernels.energy_reference import reference_energy

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
    out, same = attention_with_energy(q, k, v, block=block)
    assert torch.equal(same, energy)
    dense = scaled_dot_product_attention(q.double(), k.double(), v.double())
    accuracy(out, dense, scaled_dot_product_attention(q, k, v)).check()
