"""The Hopper kernel on a Hopper GPU: accuracy, spikes, special values, layouts, same bits.

Smallest cases first: `-x` stops at the first that hangs or is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hopper_gpu import BF16, CUDA, FP16, MARKS, Operands, error
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from calibatt_compiler.kernels.attention import make_attention
from calibatt_compiler.kernels.baked.attention import baked_attention
from calibatt_compiler.kernels.energy import attention_with_energy
from calibatt_compiler.kernels.hopper import energy as hopper_energy
from calibatt_compiler.kernels.hopper.attention import HopperAttention
from calibatt_compiler.kernels.hopper.schedule import key_runs
from calibatt_compiler.kernels.reference.energy import reference_energy
from calibatt_compiler.kernels.request import KernelRequest
from calibatt_compiler.kernels.tiered import TieredKernel
from calibatt_compiler.plan.copies import AnchorRows
from calibatt_compiler.plan.pattern import BlockPattern

pytestmark = MARKS
CASES = [
    # query_length, key_length, heads, head_dim, block_n, batch
    (128, 128, 1, 128, 128, 1),
    (128, 512, 1, 128, 128, 1),
    (300, 333, 2, 128, 128, 1),
    (2160, 2160, 4, 64, 128, 1),
    (1267, 1267, 3, 128, 64, 2),
    (130, 2049, 2, 64, 64, 3),
    (4096, 4096, 12, 128, 128, 2),
    (32760, 32760, 2, 128, 128, 1),
]


def sampled_exact(q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, rows: Tensor) -> Operands:
    """Float64 output and log-sum-exp of some query rows; SDPA's output of them as a yardstick."""
    mask = pattern.mask()[:, rows // pattern.block_m].to(q.device)
    mask = mask.repeat_interleave(pattern.block_n, 2)[..., : pattern.key_length]
    few = q[:, :, rows.to(q.device)]
    scores = few.double() @ k.double().mT / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~mask[None], -math.inf)
    yardstick = scaled_dot_product_attention(few, k, v, attn_mask=mask[None])
    return scores.softmax(-1) @ v.double(), scores.logsumexp(-1), yardstick


@pytest.mark.parametrize(("rows", "keys", "heads", "head_dim", "block_n", "batch"), CASES)
@pytest.mark.parametrize(("dtype", "softmax"), [(BF16, "exact"), (BF16, "fixed"), (FP16, "exact")])
def test_error_is_that_of_sdpa_and_bits_are_the_same_every_time(
    operands: Callable[..., Operands],
    random_pattern: Callable[..., BlockPattern],
    rows: int,
    keys: int,
    heads: int,
    head_dim: int,
    block_n: int,
    batch: int,
    dtype: torch.dtype,
    softmax: str,
) -> None:
    block = (128, block_n)
    pattern = random_pattern(heads=heads, query_length=rows, key_length=keys, block=block)
    q, k, v = operands(
        batch=batch,
        heads=heads,
        query_length=rows,
        key_length=keys,
        head_dim=head_dim,
        dtype=dtype,
        device=CUDA,
    )
    where: dict[str, Any] = {"device": CUDA, "dtype": dtype, "head_dim": head_dim}
    kernel = HopperAttention(KernelRequest(pattern, **where, softmax=softmax))
    out, lse = kernel.attend(q, k, v, return_lse=True)
    assert out.transpose(1, 2).is_contiguous()
    sample = torch.arange(rows) if rows < 1000 else torch.randperm(rows)[:400].sort().values
    sample = torch.cat([sample, torch.tensor([rows - 1])])
    exact, exact_lse, yardstick = sampled_exact(q, k, v, pattern, sample)
    assert error(out[:, :, sample.to(CUDA)], exact) <= 1.1 * error(yardstick, exact)
    assert lse is not None
    found = lse[:, :, sample.to(CUDA)].double()
    torch.testing.assert_close(found, exact_lse, atol=1e-3, rtol=1e-5)
    assert kernel.repairs == 0
    # A barrier that is missing shows as bits that differ.
    for _ in range(20):
        again, lse_again = kernel.attend(q, k, v, return_lse=True)
        assert torch.equal(out, again)
        assert torch.equal(lse, lse_again)
    assert torch.equal(out, kernel(q, k, v))


@pytest.mark.parametrize("block", [0, 7, 19])
@pytest.mark.parametrize("row", [0, 700, 2499])
@pytest.mark.parametrize("head", [0, 2])
def test_spikes_are_repaired(
    operands: Callable[..., Operands], row: int, block: int, head: int
) -> None:
    length = 2500
    pattern = BlockPattern.dense(3, length, length)
    q, k, v = operands(heads=3, query_length=length, head_dim=128, dtype=BF16, device=CUDA)
    key = min(block * 128 + 5, length - 1)
    nats = 250.0
    q[0, head, row], k[0, head, :, 0] = 0, 0
    q[0, head, row, 0] = k[0, head, key, 0] = math.sqrt(nats * math.sqrt(128))
    kernel = HopperAttention(KernelRequest(pattern, device=CUDA, dtype=BF16, head_dim=128))
    out = kernel(q, k, v)
    exact = (q.double() @ k.double().mT / math.sqrt(128)).softmax(-1) @ v.double()
    yardstick = scaled_dot_product_attention(q, k, v)
    # Where one key holds nearly all of a row and is not in its first block, that probability is
    # rounded, which is 1 with a running maximum: as large an error as that of rounding the output.
    bound = 1.1 if kernel.repairs else 1.1 * math.sqrt(2)
    assert error(out, exact) <= bound * error(yardstick, exact)
    exactly = HopperAttention(
        KernelRequest(pattern, device=CUDA, dtype=BF16, head_dim=128, softmax="exact")
    )
    assert error(exactly(q, k, v), exact) <= 1.1 * error(yardstick, exact)
    # Only where the spike is not in the row's first block, its reference.
    assert kernel.repairs == (row // 128 != key // 128)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("of", [0, 1, 2])
def test_what_is_not_finite_spreads_as_in_dense_attention(
    operands: Callable[..., Operands], dtype: torch.dtype, bad: float, of: int
) -> None:
    given = operands(query_length=400, dtype=dtype, device=CUDA)
    given[of][0, 0, 150, 7] = bad
    q, k, v = given
    pattern = BlockPattern.dense(2, 400, 400)
    out = HopperAttention(KernelRequest(pattern, device=CUDA, dtype=dtype, head_dim=64))(
        q, k, v
    ).double()
    exact = (q.double() @ k.double().mT / 8).softmax(-1) @ v.double()
    assert torch.equal(out.isnan(), exact.isnan())
    assert torch.equal(out.isinf(), exact.isinf())
    torch.testing.assert_close(out, exact, equal_nan=True, atol=0.02, rtol=0.02)


def test_views_batches_and_scales(
    operands: Callable[..., Operands], random_pattern: Callable[..., BlockPattern]
) -> None:
    pattern = random_pattern(heads=3, query_length=700, block=(128, 128))
    fused = torch.randn(3, 700, 3, 3, 128, device=CUDA, dtype=BF16)
    q, k, v = (fused[:, :, i].transpose(1, 2) for i in range(3))
    kernel = HopperAttention(KernelRequest(pattern, device=CUDA, dtype=BF16, head_dim=128))
    plain = kernel(*(x.contiguous() for x in (q, k, v)))
    assert torch.equal(kernel(q, k, v), plain)
    assert torch.equal(kernel(q[1:2], k[1:2], v[1:2]), plain[1:2])
    assert torch.equal(kernel(q, k, v, scale=-0.1), kernel(-q, k, v, scale=0.1))
    odd = torch.randn(3, 3, 700, 129, device=CUDA, dtype=BF16)[..., :128]
    assert torch.equal(kernel(odd, k, v), kernel(odd.contiguous(), k, v))


def test_key_lengths(
    operands: Callable[..., Operands], random_pattern: Callable[..., BlockPattern]
) -> None:
    pattern = random_pattern(query_length=900, key_length=1300, block=(128, 128), density=0.6)
    q, k, v = operands(batch=5, query_length=900, key_length=1300, dtype=BF16, device=CUDA)
    lengths = torch.tensor([1300, 1024, 650, 7, 0], device=CUDA)
    for softmax in ("exact", "fixed"):
        kernel = HopperAttention(
            KernelRequest(pattern, device=CUDA, dtype=BF16, head_dim=64, softmax=softmax)
        )
        out, _ = kernel.attend(q, k, v, key_lengths=lengths)
        valid = torch.arange(1300, device=CUDA)[None] < lengths[:, None]
        mask = pattern.token_mask().to(CUDA)[None] & valid[:, None, None]
        scores = (q.double() @ k.double().mT / 8).masked_fill(~mask, -math.inf)
        exact = scores.softmax(-1).nan_to_num() @ v.double()
        yardstick = scaled_dot_product_attention(q, k, v, attn_mask=mask).nan_to_num()
        assert error(out, exact) <= 1.1 * error(yardstick, exact)
        assert (out[4] == 0).all()
        assert kernel.repairs == 0


@pytest.mark.parametrize(
    ("rows", "keys", "heads", "head_dim", "block_n", "batch", "dtype"),
    [
        (300, 333, 2, 128, 128, 2, BF16),
        (1267, 1267, 3, 128, 64, 1, BF16),
        (2160, 2160, 4, 64, 128, 1, FP16),
        (4000, 4000, 5, 128, 128, 1, BF16),
    ],
)
def test_output_and_block_energies(
    operands: Callable[..., Operands],
    assert_attention: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    keys: int,
    heads: int,
    head_dim: int,
    block_n: int,
    batch: int,
    dtype: torch.dtype,
) -> None:
    q, k, v = operands(
        batch=batch, heads=heads, query_length=rows, key_length=keys, head_dim=head_dim,
        dtype=dtype, device=CUDA,
    )  # fmt: skip
    # One row far above its first block: repaired, energies and all.
    q[0, 0, 5], k[0, 0, keys - 1] = 6.0, 6.0
    block = (128, block_n)
    monkeypatch.setattr(
        hopper_energy, "SUMS_BYTES", 2 * 512 * -(-rows // 128) * (-(-keys // block_n) | 1)
    )
    out, energy = attention_with_energy(q, k, v, block=block)
    assert_attention(out, q, k, v, BlockPattern.dense(heads, rows, keys, block), factor=1.1)
    exact = reference_energy(q, k, block=block)
    assert (energy.double().cpu() - exact).abs().max() < 2e-5
    torch.testing.assert_close(energy.sum(-1), torch.ones_like(energy[..., 0]), atol=1e-4, rtol=0)
    scale = 1 / math.sqrt(head_dim)
    again = hopper_energy.hopper_attention_and_energy(q, k, v, block, scale)
    assert torch.equal(out, again[0])
    assert torch.equal(energy, again[1])


@pytest.mark.parametrize(("head_dim", "softmax"), [(64, "fixed"), (128, "fixed"), (128, "exact")])
def test_weighted_blocks(
    operands: Callable[..., Operands],
    random_pattern: Callable[..., BlockPattern],
    assert_attention: Callable[..., None],
    head_dim: int,
    softmax: Any,
) -> None:
    mask = random_pattern(query_length=900, key_length=1300, block=(128, 128), density=0.8).mask()
    weight = 2.0 ** (4 * torch.rand(mask.shape, generator=torch.Generator().manual_seed(7)) - 1)
    weight = weight.clamp_min(1.0)
    pattern = BlockPattern.from_mask(mask, query_length=900, key_length=1300, weight=weight)
    sizes = {"query_length": 900, "key_length": 1300, "head_dim": head_dim}
    q, k, v = operands(**sizes, dtype=BF16, device=CUDA)
    where: dict[str, Any] = {"device": CUDA, "dtype": BF16, "head_dim": head_dim}
    kernel = HopperAttention(KernelRequest(pattern, **where, softmax=softmax))
    assert_attention(kernel(q, k, v), q, k, v, pattern, factor=1.1)
    assert kernel.repairs == 0


@pytest.mark.parametrize("repetitive", [(), (True, False, True)])
def test_literals_give_the_bits_of_the_tables(
    operands: Callable[..., Operands],
    random_pattern: Callable[..., BlockPattern],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    repetitive: tuple[bool, ...],
) -> None:
    monkeypatch.setenv("CALIBATT_CACHE_DIR", str(tmp_path))
    pattern = random_pattern(
        heads=3,
        query_length=1500,
        block=(128, 128),
        density=0.3,
        repetitive=repetitive,
        copies=AnchorRows((3, 20, 24), 4, first=13) if repetitive else None,
    )
    q, k, v = operands(batch=2, heads=3, query_length=1500, head_dim=128, dtype=BF16, device=CUDA)
    where: dict[str, Any] = {"device": CUDA, "dtype": BF16, "head_dim": 128}
    baked = make_attention(KernelRequest(pattern, lowering="baked", **where, hopper=True))
    assert isinstance(baked, TieredKernel)
    before = baked(q, k, v)
    assert baked.serving.wait(100), baked.reason
    assert baked.kind == "hopper-baked"
    assert torch.equal(baked(q, k, v), before)
    # So few keys take the exact form by default (`dispatch.FIXED_FROM`).
    tables = HopperAttention(KernelRequest(baked.serving.serving.pattern, softmax="exact", **where))
    assert torch.equal(tables(q, k, v), before)


def test_literals_are_repaired_by_the_tables(
    operands: Callable[..., Operands],
    random_pattern: Callable[..., BlockPattern],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CALIBATT_CACHE_DIR", str(tmp_path))
    pattern = random_pattern(query_length=1500, block=(128, 128), density=0.3)
    q, k, v = operands(query_length=1500, head_dim=128, dtype=BF16, device=CUDA)
    runs = key_runs(pattern)
    first = runs.starts[runs.offsets[2]]
    later = next(x for x in pattern.mask()[0, 2].nonzero().flatten().tolist() if x != first)
    q[0, 0, 300] = 40.0 * k[0, 0, later * 128]
    where: dict[str, Any] = {"device": CUDA, "dtype": BF16, "head_dim": 128, "softmax": "fixed"}
    baked = baked_attention(KernelRequest(pattern, **where), "hopper")
    table = HopperAttention(KernelRequest(pattern, **where))
    before = table(q, k, v)
    assert table.repairs == 1
    assert baked.wait(100), baked.reason
    assert torch.equal(baked(q, k, v), before)
    assert baked.repairs == 1


def test_a_graph_replays_the_repair(operands: Callable[..., Operands]) -> None:
    pattern = BlockPattern.dense(2, 700, 700)
    q, k, v = operands(query_length=700, dtype=BF16, device=CUDA)
    kernel = HopperAttention(KernelRequest(pattern, device=CUDA, dtype=BF16, head_dim=64))
    expected = kernel(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel(q, k, v)
    graph.replay()
    assert torch.equal(out, expected)
    calm = q.clone()
    q[0, 0, 5], k[0, 0, 600] = 12.0, 12.0
    graph.replay()
    assert kernel.repairs == 1
    exact = (q.double() @ k.double().mT / 8).softmax(-1) @ v.double()
    assert error(out, exact) < 0.01
    q.copy_(calm)
    graph.replay()
    assert kernel.repairs == 1
