"""The Hopper kernel's own source, interpreted: every row, mask and barrier, without a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.request import KernelRequest
from calibatt_compiler.plan.copies import AnchorRows
from calibatt_compiler.plan.pattern import BlockPattern

pytest.importorskip("triton", reason="Gluon is part of triton")

from calibatt_compiler.kernels.baked.attention import baked_attention
from calibatt_compiler.kernels.baked.cache import get_entry
from calibatt_compiler.kernels.baked.hopper_literals import HopperLiterals
from calibatt_compiler.kernels.hopper import attention as hopper
from calibatt_compiler.kernels.hopper import energy as hopper_energy
from calibatt_compiler.kernels.hopper.attention import HopperAttention
from calibatt_compiler.kernels.hopper.schedule import key_runs
from calibatt_compiler.kernels.reference.energy import reference_energy

CPU = torch.device("cpu")
CASES = [
    # query_length, key_length, heads, head_dim, block_n, batch, dtype, softmax
    (384, 384, 2, 64, 128, 1, torch.bfloat16, "fixed"),
    (300, 333, 2, 64, 128, 2, torch.bfloat16, "fixed"),
    (300, 333, 2, 128, 64, 1, torch.bfloat16, "fixed"),
    (130, 500, 3, 128, 128, 2, torch.float16, "exact"),
    (257, 130, 1, 64, 64, 1, torch.bfloat16, "exact"),
    (60, 40, 2, 64, 64, 1, torch.float16, "auto"),
]


@pytest.mark.parametrize(
    ("rows", "keys", "heads", "dim", "block_n", "batch", "dtype", "softmax"), CASES
)
@pytest.mark.parametrize("density", [0.0, 0.6])
def test_every_row_is_attended(
    launches: Any,
    make: Callable[..., HopperAttention],
    operands: Callable[..., tuple[Tensor, ...]],
    random_pattern: Callable[..., BlockPattern],
    assert_attention: Callable[..., None],
    rows: int,
    keys: int,
    heads: int,
    dim: int,
    block_n: int,
    batch: int,
    dtype: torch.dtype,
    softmax: str,
    density: float,
) -> None:
    pattern = random_pattern(
        heads=heads, query_length=rows, key_length=keys, block=(128, block_n), density=density
    )
    q, k, v = operands(
        batch=batch, heads=heads, query_length=rows, key_length=keys, head_dim=dim, dtype=dtype
    )
    kernel = make(pattern, dtype, dim, softmax=softmax)
    out, lse = kernel.attend(q, k, v, return_lse=True)
    assert_attention(out, q, k, v, pattern)
    scores = q.double() @ k.double().mT / math.sqrt(dim)
    exact = scores.masked_fill(~pattern.token_mask(), -math.inf).logsumexp(-1)
    torch.testing.assert_close(lse.double(), exact, atol=2e-5, rtol=1e-5)
    assert launches.launches == (2 if softmax == "fixed" else 1)
    assert kernel.repairs == 0
    assert torch.equal(out, kernel(q, k, v))


@pytest.mark.parametrize(
    ("row", "key", "nats", "repaired"),
    [
        (3, 300, 60.0, False),  # within the range of the fixed shift
        (3, 300, 95.0, True),  # above it, in a later block
        (3, 332, 200.0, True),  # in the ragged last block
        (299, 5, 500.0, True),  # the last query, a block before its diagonal
        (3, 5, 500.0, False),  # the reference itself
        (130, 140, -500.0, False),  # far below
    ],
)
def test_spikes_are_repaired_and_only_where_needed(
    launches: Any,
    make: Callable[..., HopperAttention],
    spike: Callable[..., None],
    operands: Callable[..., tuple[Tensor, ...]],
    assert_attention: Callable[..., None],
    row: int,
    key: int,
    nats: float,
    repaired: bool,
) -> None:
    pattern = BlockPattern.dense(2, 300, 333)
    q, k, v = operands(query_length=300, key_length=333, dtype=torch.bfloat16)
    spike(q, k, row, key, abs(nats))
    if nats < 0:
        q[0, 1, row] *= -1
    kernel = make(pattern, torch.bfloat16, 64)
    out = kernel(q, k, v)
    assert kernel.repairs == repaired
    assert_attention(out, q, k, v, pattern)
    kernel(q, k, v)
    assert kernel.repairs == 2 * repaired


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("step", [0.3, 1.0, 2.0, 5.0, 12.0])
@pytest.mark.parametrize("keys", [1, 64])
def test_a_maximum_that_rises_from_block_to_block(
    launches: Any,
    make: Callable[..., HopperAttention],
    operands: Callable[..., tuple[Tensor, ...]],
    flash_attention: Callable[..., tuple[Tensor, Tensor]],
    dtype: torch.dtype,
    step: float,
    keys: int,
) -> None:
    """The exact softmax's reference follows only what counts: no worse than a running maximum."""
    blocks = 9
    q, k, v = operands(heads=1, query_length=128, key_length=blocks * 64, dtype=dtype)
    q[..., 0], k[..., 0] = 8.0, 0.0
    for block in range(blocks):
        k[..., block * 64 : block * 64 + keys, 0] = step * block  # nats
    pattern = BlockPattern.dense(1, 128, blocks * 64, block=(128, 64))
    kernel = make(pattern, dtype, 64, softmax="exact")
    out, lse = kernel.attend(q, k, v, return_lse=True)
    scores = q.double() @ k.double().mT / 8
    exact, yardstick = flash_attention(q, k, v, pattern)
    assert (out - exact).norm() <= 1.1 * (yardstick - exact).norm()
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("of", ["q", "k", "v"])
def test_what_is_not_finite_spreads_as_in_dense_attention(
    launches: Any,
    make: Callable[..., HopperAttention],
    operands: Callable[..., tuple[Tensor, ...]],
    dtype: torch.dtype,
    bad: float,
    of: str,
) -> None:
    pattern = BlockPattern.dense(2, 200, 200)
    q, k, v = operands(query_length=200, dtype=dtype)
    broken = {"q": q, "k": k, "v": v}
    broken[of][0, 0, 150, 7] = bad
    out = make(pattern, dtype, 64)(q, k, v).double()
    exact = (q.double() @ k.double().mT / 8).softmax(-1) @ v.double()
    assert torch.equal(out.isnan(), exact.isnan())
    finite = exact.isfinite()
    assert torch.equal(out.isfinite(), finite)
    assert torch.equal(out[~finite & ~exact.isnan()], exact[~finite & ~exact.isnan()])
    torch.testing.assert_close(out[finite], exact[finite], atol=0.02, rtol=0.02)


def test_a_first_block_of_minus_infinity_is_no_reference(
    launches: Any, make: Callable[..., HopperAttention], operands: Callable[..., tuple[Tensor, ...]]
) -> None:
    q, k, v = operands(heads=1, query_length=128, key_length=256, dtype=torch.bfloat16)
    q[..., 0] = 1.0
    k[..., :128, 0] = -math.inf
    k[..., 128:, 0] = -3e3  # so far below 0 that a reference of 0 would lose it
    kernel = make(BlockPattern.dense(1, 128, 256), torch.bfloat16, 64)
    out = kernel(q, k, v)
    exact = (q.double() @ k.double().mT / 8).softmax(-1) @ v.double()
    torch.testing.assert_close(out.double(), exact, atol=0.02, rtol=0.02)
    assert kernel.repairs == 1


def test_large_values_overflow_only_where_dense_attention_does(
    launches: Any,
    make: Callable[..., HopperAttention],
    spike: Callable[..., None],
    operands: Callable[..., tuple[Tensor, ...]],
) -> None:
    q, k, v = operands(query_length=200, dtype=torch.bfloat16)
    spike(q, k, 3, 190, 60.0)  # probabilities of 2^86 times values of 2^80
    v *= 2.0**80
    kernel = make(BlockPattern.dense(2, 200, 200), torch.bfloat16, 64)
    out = kernel(q, k, v)
    exact = (q.double() @ k.double().mT / 8).softmax(-1) @ v.double()
    assert kernel.repairs == 1
    torch.testing.assert_close(out.double(), exact, atol=0.05 * 2.0**80, rtol=0.02)


@pytest.mark.parametrize("softmax", ["exact", "fixed"])
def test_key_lengths_mask_each_item_of_a_batch(
    launches: Any,
    make: Callable[..., HopperAttention],
    operands: Callable[..., tuple[Tensor, ...]],
    random_pattern: Callable[..., BlockPattern],
    accuracy: Callable[..., Any],
    softmax: str,
) -> None:
    pattern = random_pattern(query_length=300, key_length=500, block=(128, 128), density=0.6)
    q, k, v = operands(batch=5, query_length=300, key_length=500, dtype=torch.bfloat16)
    lengths = torch.tensor([500, 256, 130, 7, 0])
    kernel = make(pattern, torch.bfloat16, 64, softmax=softmax)
    out, lse = kernel.attend(q, k, v, key_lengths=lengths, return_lse=True)
    valid = torch.arange(500)[None] < lengths[:, None]
    mask = pattern.token_mask()[None] & valid[:, None, None]
    scores = (q.double() @ k.double().mT / 8).masked_fill(~mask, -math.inf)
    exact = scores.softmax(-1).nan_to_num() @ v.double()
    yardstick = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    accuracy(out, exact, yardstick.nan_to_num()).check()
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=2e-5, rtol=1e-5)
    assert (out[4] == 0).all()
    assert kernel.repairs == 0


def test_weighted_blocks(
    launches: Any,
    make: Callable[..., HopperAttention],
    operands: Callable[..., tuple[Tensor, ...]],
    random_pattern: Callable[..., BlockPattern],
    assert_attention: Callable[..., None],
) -> None:
    mask = random_pattern(query_length=300, key_length=700, block=(128, 128), density=0.8).mask()
    # Some blocks count once, others up to eight times, each otherwise.
    weight = 2.0 ** (4 * torch.rand(mask.shape, generator=torch.Generator().manual_seed(7)) - 1)
    weight = weight.clamp_min(1.0)
    pattern = BlockPattern.from_mask(mask, query_length=300, key_length=700, weight=weight)
    q, k, v = operands(query_length=300, key_length=700, dtype=torch.bfloat16)
    for softmax in ("exact", "fixed"):
        kernel = make(pattern, torch.bfloat16, 64, softmax=softmax)
        assert_attention(kernel(q, k, v), q, k, v, pattern)
        assert kernel.repairs == 0
    with pytest.raises(KernelError, match="weights: True"):
        kernel.attend(q, k, v, key_lengths=torch.tensor([5]))


def test_views_are_read_in_place(
    launches: Any,
    make: Callable[..., HopperAttention],
    operands: Callable[..., tuple[Tensor, ...]],
    assert_attention: Callable[..., None],
) -> None:
    fused = torch.randn(2, 200, 3, 2, 64).to(torch.bfloat16)
    q, k, v = (fused[:, :, i].transpose(1, 2) for i in range(3))
    pattern = BlockPattern.dense(2, 200, 200)
    for tensor in (q, k, v):
        from calibatt_compiler.kernels.hopper.launch import readable

        assert readable(tensor) is tensor
        assert readable(tensor.transpose(2, 3)[:, :, :, :64].contiguous().mT) is not tensor
    assert_attention(make(pattern, torch.bfloat16, 64)(q, k, v), q, k, v, pattern)
    kernel = make(pattern, torch.bfloat16, 64)
    for scale in (0.3, -0.2, 0.0):
        assert_attention(kernel(q, k, v, scale=scale), q, k, v, pattern, scale=scale)


def test_any_block_may_come_first(
    launches: Any,
    make: Callable[..., HopperAttention],
    operands: Callable[..., tuple[Tensor, ...]],
    random_pattern: Callable[..., BlockPattern],
    assert_attention: Callable[..., None],
) -> None:
    pattern = random_pattern(query_length=300, key_length=700, block=(128, 128), density=0.5)
    first = np.array([[0, 5, 3], [2, 2, 4]])
    q, k, v = operands(query_length=300, key_length=700, dtype=torch.bfloat16)
    kernel = make(pattern, torch.bfloat16, 64, first_blocks=first)
    assert_attention(kernel(q, k, v), q, k, v, pattern)


@pytest.mark.parametrize("block_n", [64, 128])
@pytest.mark.parametrize("repetitive", [(), (True, False, True)])
def test_literals_give_the_bits_of_the_tables(
    launches: Any,
    spike: Callable[..., None],
    operands: Callable[..., tuple[Tensor, ...]],
    random_pattern: Callable[..., BlockPattern],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    block_n: int,
    repetitive: tuple[bool, ...],
) -> None:
    monkeypatch.setenv("CALIBATT_CACHE_DIR", str(tmp_path))
    pattern = random_pattern(
        heads=3,
        query_length=400,
        key_length=700,
        block=(128, block_n),
        density=0.5,
        repetitive=repetitive,
        copies=AnchorRows((2, 10, 18), 4, first=13) if repetitive else None,
    )
    q, k, v = operands(heads=3, query_length=400, key_length=700, dtype=torch.bfloat16)
    where = {"device": CPU, "dtype": torch.bfloat16, "head_dim": 64}
    monkeypatch.setattr(hopper, "multiprocessors", lambda _: 2)
    baked = baked_attention(KernelRequest(pattern, **where), "hopper")
    assert baked.kind == "hopper-baked", baked.reason
    assert torch.equal(baked(q, k, v), HopperAttention(KernelRequest(pattern, **where))(q, k, v))
    assert baked.repairs == 0
    runs, row = key_runs(pattern), pattern.query_blocks + 1
    first = runs.starts[runs.offsets[row]]
    later = next(x for x in pattern.mask()[1, 1].nonzero().flatten().tolist() if x != first)
    spike(q, k, 130, later * block_n, 200.0)
    assert torch.equal(baked(q, k, v), HopperAttention(KernelRequest(pattern, **where))(q, k, v))
    assert baked.repairs == 1
    entry = get_entry(pattern, target="hopper")
    literals = HopperLiterals(entry, HopperAttention(KernelRequest(pattern, **where)))
    assert literals.tables.runs.numel() == 1
    with pytest.raises(KernelError, match="literals: True"):
        literals.attend(q, k, v, key_lengths=torch.tensor([5]))


@pytest.mark.parametrize(
    ("rows", "keys", "heads", "block_n", "batch", "dtype"),
    [
        (300, 300, 3, 128, 2, torch.bfloat16),
        (130, 500, 2, 64, 1, torch.bfloat16),
        (257, 130, 2, 128, 1, torch.float16),
    ],
)
def test_output_and_block_energies_in_one_launch(
    launches: Any,
    interpreter: Any,
    spike: Callable[..., None],
    operands: Callable[..., tuple[Tensor, ...]],
    assert_attention: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    keys: int,
    heads: int,
    block_n: int,
    batch: int,
    dtype: torch.dtype,
) -> None:
    summed = interpreter.Interpreted(hopper_energy.hopper_energies)
    monkeypatch.setattr(hopper_energy, "hopper_energies", summed)
    monkeypatch.setattr(hopper_energy, "multiprocessors", lambda _: 2)
    monkeypatch.setattr(hopper, "multiprocessors", lambda _: 2)
    q, k, v = operands(batch=batch, heads=heads, query_length=rows, key_length=keys, dtype=dtype)
    # A spike in one head, far above the first block: repaired, energies and all.
    spike(q, k, 3, keys - 1, 300.0)
    block = (128, block_n)
    # The budget holds two heads.
    monkeypatch.setattr(
        hopper_energy, "SUMS_BYTES", 2 * 512 * -(-rows // 128) * (-(-keys // block_n) | 1)
    )
    out, energy = hopper_energy.hopper_attention_and_energy(q, k, v, block, 0.125)
    assert_attention(out, q, k, v, BlockPattern.dense(heads, rows, keys, block))
    exact = reference_energy(q, k, block=block)
    assert (energy.double() - exact).abs().max() < 1e-5
    torch.testing.assert_close(energy.sum(-1), torch.ones(energy.shape[:-1]))
    parts = -(-heads // hopper_energy.heads_a_launch(heads, rows, energy.shape[3], 2))
    assert launches.launches == parts * batch * (2 if dtype == torch.bfloat16 else 1)


def test_heads_of_a_launch_fit_its_budget_and_fill_the_gpu() -> None:
    share = hopper_energy.heads_a_launch
    assert share(40, 75600, 591, 132) == 2  # 8.95 rounds of programs; 3 heads would take 13.4
    assert 1 <= share(40, 32760, 256, 132) <= 16
    assert share(3, 128, 1, 132) == 3
    assert share(2, 1 << 20, 1 << 13, 132) == 1  # one head's sums exceed the budget


def test_operands_of_another_kind_are_refused(
    launches: Any, make: Callable[..., HopperAttention], operands: Callable[..., tuple[Tensor, ...]]
) -> None:
    kernel = make(BlockPattern.dense(2, 200, 200), torch.bfloat16, 64)
    q, k, v = operands(query_length=200, dtype=torch.float16)
    with pytest.raises(KernelError, match="made for this site"):
        kernel(q, k, v)
    q, k, v = operands(query_length=200, dtype=torch.bfloat16)
    with pytest.raises(KernelError, match="key lengths"):
        kernel.attend(q, k, v, key_lengths=torch.tensor([1, 2]))
    with pytest.raises(KernelError, match="range of bfloat16"):
        make(BlockPattern.dense(2, 200, 200), torch.float16, 64, softmax="fixed")
