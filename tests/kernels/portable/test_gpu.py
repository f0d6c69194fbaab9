"""Portable kernels on a GPU: accuracy, equal bits, repairs, nothing left to compile at launch."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from calibatt_compiler.kernels.baked.attention import baked_attention
from calibatt_compiler.kernels.baked.compiler import KernelCompiler, KernelSpec
from calibatt_compiler.kernels.baked.cover import PORTABLE_INTERVALS
from calibatt_compiler.kernels.portable.attention import TableAttention
from calibatt_compiler.kernels.portable.tiles import architecture
from calibatt_compiler.kernels.reference.attention import masked_dense_attention
from calibatt_compiler.kernels.request import KernelRequest
from calibatt_compiler.plan.copies import AnchorRows
from calibatt_compiler.plan.order import TokenOrder
from calibatt_compiler.plan.pattern import BlockPattern

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
]
CUDA = torch.device("cuda", 0)
CASES = [
    # query_length, key_length, heads, head_dim, block, batch
    (2160, 2160, 4, 64, (64, 64), 1),
    (1267, 1267, 3, 128, (128, 128), 2),
    (1000, 333, 2, 128, (128, 64), 1),
    (129, 2049, 2, 64, (32, 128), 1),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALIBATT_CACHE_DIR", str(tmp_path / "calibatt"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "columns", "heads", "head_dim", "block", "batch"), CASES)
def test_error_is_that_of_dense_attention_in_the_same_dtype(
    operands: Callable[..., tuple[torch.Tensor, ...]],
    random_pattern: Callable[..., BlockPattern],
    assert_attention: Callable[..., None],
    rows: int,
    columns: int,
    heads: int,
    head_dim: int,
    block: tuple[int, int],
    batch: int,
    dtype: torch.dtype,
) -> None:
    pattern = random_pattern(heads=heads, query_length=rows, key_length=columns, block=block)
    q, k, v = operands(
        batch=batch,
        heads=heads,
        query_length=rows,
        key_length=columns,
        head_dim=head_dim,
        dtype=dtype,
        device=CUDA,
    )
    kernel = TableAttention(KernelRequest(pattern, device=CUDA, dtype=dtype, head_dim=head_dim))
    out = kernel(q, k, v)
    assert_attention(out, q, k, v, pattern, factor=1.5)
    assert torch.equal(out, kernel(q, k, v))
    assert kernel.config.softmax == ("fixed" if dtype == torch.bfloat16 else "exact")
    assert kernel.repairs == 0
    exact = TableAttention(
        KernelRequest(pattern, device=CUDA, dtype=dtype, head_dim=head_dim, softmax="exact")
    )
    assert_attention(exact(q, k, v), q, k, v, pattern, factor=1.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("weighted", "pooled"), [(False, 0), (True, 2)])
@pytest.mark.parametrize(
    "copies",
    [
        AnchorRows((5, 18, 16), 5),
        AnchorRows((3, 20, 20), 3, first=77, order=TokenOrder((1, 8, 8))),
        AnchorRows((1, 30, 48), 30),
    ],
    ids=str,
)
def test_repetitive_heads(
    operands: Callable[..., tuple[torch.Tensor, ...]],
    random_pattern: Callable[..., BlockPattern],
    assert_attention: Callable[..., None],
    copies: AnchorRows,
    weighted: bool,
    pooled: int,
    dtype: torch.dtype,
) -> None:
    shape = {"heads": 4, "query_length": 1441, "key_length": 1441}
    pattern = random_pattern(
        block=(128, 64),
        weighted=weighted,
        pooled=pooled,
        repetitive=(True, False, False, True),
        copies=copies,
        intervals=PORTABLE_INTERVALS,
        **shape,
    )
    q, k, v = operands(batch=2, head_dim=128, dtype=dtype, device=CUDA, **shape)
    where = {"device": CUDA, "dtype": dtype, "head_dim": 128}
    out = TableAttention(KernelRequest(pattern, **where))(q, k, v)
    assert_attention(out, q, k, v, pattern, factor=1.5)
    if not weighted:
        baked = baked_attention(KernelRequest(pattern, **where))
        assert baked.wait(240), baked.reason
        assert torch.equal(baked(q, k, v), out)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_table_and_baked_give_the_same_bits_and_the_launch_compiles_nothing(
    operands: Callable[..., tuple[torch.Tensor, ...]],
    random_pattern: Callable[..., BlockPattern],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    head_dim: int,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    pattern = random_pattern(heads=3, query_length=1500, block=(128, 128), density=0.3)
    with KernelCompiler(workers=1) as compiler:
        report = compiler.build([KernelSpec(pattern, torch.bfloat16, head_dim, architecture(CUDA))])
    assert not report.failed
    where = {"device": CUDA, "dtype": torch.bfloat16, "head_dim": head_dim}
    baked = baked_attention(KernelRequest(pattern, **where))
    assert baked.wait(0), baked.reason
    table = TableAttention(KernelRequest(baked.serving.pattern, **where))
    q, k, v = operands(
        batch=2,
        heads=3,
        query_length=1500,
        head_dim=head_dim,
        dtype=torch.bfloat16,
        device=CUDA,
    )
    expected = table(q, k, v)
    cubins = set((tmp_path / "triton").rglob("*.cubin"))
    out = baked(q, k, v)
    assert set((tmp_path / "triton").rglob("*.cubin")) == cubins
    assert torch.equal(out, expected)
    assert baked.kind == "triton-baked"
    # Nor where calls are repaired.
    *_, last = baked.serving.pattern.mask()[0, 0].nonzero()[:, 0].tolist()
    assert last > 0
    k[0, 0, 128 * last], q[0, 0, 5] = 12.0, 12.0
    expected = table(q, k, v)
    assert table.repairs == 1
    assert torch.equal(baked(q, k, v), expected)
    assert baked.repairs == 1


def test_the_switch_from_table_to_baked_changes_no_bit(
    operands: Callable[..., tuple[torch.Tensor, ...]],
    random_pattern: Callable[..., BlockPattern],
) -> None:
    pattern = random_pattern(
        heads=2, query_length=2160, block=(64, 64), density=0.3, intervals=PORTABLE_INTERVALS
    )
    with KernelCompiler(workers=1) as compiler:
        kernel = baked_attention(
            KernelRequest(pattern, device=CUDA, dtype=torch.float16, head_dim=64), compiler=compiler
        )
        q, k, v = operands(heads=2, query_length=2160, dtype=torch.float16, device=CUDA)
        before = kernel(q, k, v)
        assert kernel.wait(240), kernel.reason
        after = kernel(q, k, v)
    assert kernel.kind == "triton-baked"
    assert torch.equal(before, after)


@pytest.mark.parametrize("block", [0, 7, 19])
@pytest.mark.parametrize("row", [0, 700, 2499])
@pytest.mark.parametrize("lowering", ["table", "baked"])
def test_spikes_are_repaired(
    operands: Callable[..., tuple[torch.Tensor, ...]],
    random_pattern: Callable[..., BlockPattern],
    accuracy: Callable[..., Any],
    row: int,
    block: int,
    lowering: str,
) -> None:
    length = 2500
    mask = random_pattern(
        heads=3, query_length=length, block=(128, 128), intervals=PORTABLE_INTERVALS
    ).mask()
    mask[0] = mask[2] = True
    pattern = BlockPattern.from_mask(mask, query_length=length, key_length=length)
    q, k, v = operands(
        heads=3, query_length=length, head_dim=128, dtype=torch.bfloat16, device=CUDA
    )
    key = min(block * 128 + 5, length - 1)
    q[0, 2, row], k[0, 2, :, 0] = 0, 0
    q[0, 2, row, 0] = k[0, 2, key, 0] = math.sqrt(250 * math.sqrt(128))
    where: dict[str, Any] = {"device": CUDA, "dtype": torch.bfloat16, "head_dim": 128}
    kernel: Any = TableAttention(KernelRequest(pattern, **where))
    if lowering == "baked":
        kernel = baked_attention(KernelRequest(pattern, **where))
        assert kernel.wait(240), kernel.reason
    out = kernel(q, k, v)
    exact = masked_dense_attention(q.double(), k.double(), v.double(), pattern)
    yardstick = masked_dense_attention(q, k, v, pattern)
    # Where one key holds nearly all of a row and is not in its reference, that probability is
    # rounded, which is 1 with a running maximum: as large an error as that of rounding the output.
    accuracy(out, exact, yardstick, factor=1.5 if kernel.repairs else 1.5 * math.sqrt(2)).check()
    # Only where the spike is not in the first keys of the row's diagonal block, its reference.
    assert kernel.repairs == (row // 128 != key // 128)
    exactly = TableAttention(KernelRequest(pattern, **where, softmax="exact"))
    if kernel.repairs:
        assert torch.equal(out, exactly(q, k, v))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("of", [0, 1, 2])
def test_what_is_not_finite_spreads_as_in_dense_attention(
    operands: Callable[..., tuple[torch.Tensor, ...]], dtype: torch.dtype, bad: float, of: int
) -> None:
    given = operands(query_length=400, dtype=dtype, device=CUDA)
    given[of][0, 0, 150, 7] = bad
    q, k, v = given
    pattern = BlockPattern.dense(2, 400, 400)
    out = TableAttention(KernelRequest(pattern, device=CUDA, dtype=dtype, head_dim=64))(
        q, k, v
    ).double()
    exact = (q.double() @ k.double().mT / 8).softmax(-1) @ v.double()
    assert torch.equal(out.isnan(), exact.isnan())
    finite = exact.isfinite()
    assert torch.equal(out.isfinite(), finite)
    torch.testing.assert_close(out[finite], exact[finite], atol=0.02, rtol=0.02)


@pytest.mark.parametrize("lowering", ["table", "baked"])
def test_a_graph_replays_the_repair(
    operands: Callable[..., tuple[torch.Tensor, ...]], lowering: str
) -> None:
    pattern = BlockPattern.dense(2, 700, 700)
    q, k, v = operands(query_length=700, dtype=torch.bfloat16, device=CUDA)
    where: dict[str, Any] = {"device": CUDA, "dtype": torch.bfloat16, "head_dim": 64}
    kernel: Any = TableAttention(KernelRequest(pattern, **where))
    if lowering == "baked":
        kernel = baked_attention(KernelRequest(pattern, **where))
        assert kernel.wait(240), kernel.reason
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
    assert (out - exact).abs().max() < 0.05
    q.copy_(calm)
    graph.replay()
    assert kernel.repairs == 1


@pytest.mark.parametrize("head_dim", [40, 96, 128])
def test_views_and_copies_of_operands_give_the_same_bits(
    operands: Callable[..., tuple[torch.Tensor, ...]],
    random_pattern: Callable[..., BlockPattern],
    head_dim: int,
) -> None:
    """Descriptors read permuted and sliced views in place; what they can't read is copied."""
    pattern = random_pattern(heads=3, query_length=700, block=(128, 128), density=0.5)
    shape = {"batch": 2, "heads": 3, "query_length": 700, "head_dim": head_dim}
    q, k, v = operands(**shape, dtype=torch.bfloat16, device=CUDA)
    kernel = TableAttention(
        KernelRequest(pattern, device=CUDA, dtype=torch.bfloat16, head_dim=head_dim)
    )
    expected = kernel(q, k, v)
    assert torch.equal(kernel(*(x.contiguous() for x in (q, k, v))), expected)
    packed = torch.stack([q, k, v], 3).transpose(1, 2).contiguous()  # (B, S, H, 3, D)
    sliced = [x.transpose(1, 2) for x in packed.unbind(3)]
    assert torch.equal(kernel(*sliced), expected)
    odd = torch.empty(k.numel() + 1, dtype=k.dtype, device=CUDA)[1:].view(k.shape).copy_(k)
    assert torch.equal(kernel(q, odd, v), expected)
    one = k[:, :1].expand_as(k)
    assert torch.equal(kernel(q, one, v), kernel(q, one.contiguous(), v))


def test_extreme_scores_do_what_dense_attention_does(
    operands: Callable[..., tuple[torch.Tensor, ...]],
    assert_attention: Callable[..., None],
) -> None:
    pattern = BlockPattern.dense(2, 300, 300, block=(64, 64))
    q, k, v = operands(heads=2, query_length=300, dtype=torch.bfloat16, device=CUDA)
    kernel = TableAttention(KernelRequest(pattern, device=CUDA, dtype=torch.bfloat16, head_dim=64))
    spiked = k.clone()
    spiked[:, :, 170] *= 60  # hundreds of nats above the rest
    assert_attention(kernel(q, spiked, v), q, spiked, v, pattern, factor=1.5)
    broken = k.clone()
    broken[:, 0, 5] = float("nan")
    out = kernel(q, broken, v)
    assert out[:, 0].isnan().all()
    assert not out[:, 1].isnan().any()
