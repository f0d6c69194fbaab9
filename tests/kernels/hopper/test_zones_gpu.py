"""Octave zones on a GPU: accuracy at every kind of step, same bits from tables and literals.

All of it: `pytest tests/kernels/hopper/test_zones_gpu.py`. On a Hopper GPU both kernels are tried,
on others the portable one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from zone_patterns import CASES, many_runs, zone_pattern

from calibatt_compiler.kernels.hopper.capability import gluon_reason
from calibatt_compiler.kernels.portable.tiles import HOPPER, architecture
from calibatt_compiler.kernels.request import KernelRequest
from calibatt_compiler.plan.zones import ZonePattern

CUDA = torch.device("cuda", 0)
ON_HOPPER = torch.cuda.is_available() and architecture(CUDA) == HOPPER and gluon_reason() is None
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # A kernel that waits for ever can't be interrupted: end the process.
    pytest.mark.timeout(120, method="thread"),
]
TARGETS = [
    "portable",
    pytest.param("hopper", marks=pytest.mark.skipif(not ON_HOPPER, reason="sm_90")),
]
BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Make a kernel: `make(zones, target, dtype, head_dim, literal=False, softmax="auto")`."""
    from calibatt_compiler.kernels.baked.source_zones import load_zones
    from calibatt_compiler.kernels.common.zone_table import zone_table
    from calibatt_compiler.kernels.hopper.zones import HopperZones
    from calibatt_compiler.kernels.portable.zones import ZoneAttention

    monkeypatch.setenv("CALIBATT_CACHE_DIR", str(tmp_path))

    def kernel(
        zones: ZonePattern, target: Any, dtype: torch.dtype, head_dim: int, *,
        literal: bool = False, **more: Any,
    ) -> Any:  # fmt: skip
        literals = load_zones(zones, zone_table(zones), target) if literal else None
        request = KernelRequest(zones, device=CUDA, dtype=dtype, head_dim=head_dim, **more)
        kind = HopperZones if target == "hopper" else ZoneAttention
        return kind(request, literals=literals)

    return kernel


def check(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, zones: ZonePattern, step: int, *, fixed: bool
) -> None:
    """No larger error than SDPA's with the same bias, on some query rows, the last among them.

    With a fixed shift, the maximum of the row's lead, the key that a running maximum gives the
    probability 1 is rounded, too: where few keys of weight 2^7 hold a row, that alone is up to 12 %
    of the error. So there the error may also be that of this arithmetic, done in float64 with the
    probabilities and the output rounded.
    """
    drawn = zones.draw(step)
    generator = torch.Generator().manual_seed(step)
    rows = torch.randperm(zones.query_length, generator=generator)[:300].sort().values
    rows = torch.cat([rows, torch.tensor([zones.query_length - 1])])
    weight = torch.from_numpy(drawn.log_weights()).double().masked_fill(~drawn.mask(), -math.inf)
    bias = weight[:, rows // zones.block_m].repeat_interleave(zones.block_n, 2)
    bias = bias[None, ..., : zones.key_length].to(CUDA)
    few = q[:, :, rows.to(CUDA)]
    raw = few.double() @ k.double().mT / math.sqrt(q.shape[-1])
    exact = (raw + bias).softmax(-1) @ v.double()
    yardsticks = [scaled_dot_product_attention(few, k, v, attn_mask=bias.to(q.dtype))]
    if fixed:
        lead = torch.from_numpy(zones.row_leads())[:, rows // zones.block_m, None]
        of_lead = (torch.arange(zones.key_length) // zones.block_n == lead).to(CUDA)
        reference = raw.masked_fill(~of_lead, -math.inf).amax(-1, keepdim=True)
        p = (raw + bias - reference).exp()
        rounded = p.to(q.dtype).double() @ v.double() / p.sum(-1, keepdim=True)
        yardsticks.append(rounded.to(q.dtype))

    def error(x: Tensor) -> float:
        return ((x.double() - exact).norm() / exact.norm()).item()

    found, allowed = error(out[:, :, rows.to(CUDA)]), max(map(error, yardsticks))
    assert found <= 1.1 * allowed, (step, found, allowed)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("dtype", "head_dim", "softmax"),
    [(BF16, 128, "fixed"), (BF16, 64, "exact"), (FP16, 64, "auto")],
)
def test_steps_are_attended_and_literals_give_the_bits_of_the_table(
    operands: Callable[..., tuple[Tensor, ...]],
    make: Callable[..., Any],
    name: str,
    target: str,
    dtype: torch.dtype,
    head_dim: int,
    softmax: str,
) -> None:
    zones = zone_pattern(name)
    sizes: dict[str, Any] = {"query_length": zones.query_length, "key_length": zones.key_length}
    batch = 2 if name == "ragged" else 1
    q, k, v = operands(
        batch=batch, heads=zones.heads, **sizes, head_dim=head_dim, dtype=dtype, device=CUDA
    )
    table = make(zones, target, dtype, head_dim, softmax=softmax)
    literal = make(zones, target, dtype, head_dim, softmax=softmax, literal=True)
    for step in (0, 1, 6, 77, 127):
        out = table(q, k, v, step=step)
        check(out, q, k, v, zones, step, fixed=softmax == "fixed")
        # A barrier that is missing shows as bits that differ.
        for _ in range(10):
            assert torch.equal(table(q, k, v, step=step), out)
            assert torch.equal(literal.at(step)(q, k, v), out)
    assert table.repairs == literal.repairs == 0


@pytest.mark.parametrize("target", TARGETS)
def test_long_sequences_of_many_runs_at_every_phase(
    operands: Callable[..., tuple[Tensor, ...]], make: Callable[..., Any], target: str
) -> None:
    zones = many_runs(3000, heads=8, blocks=400)
    sizes: dict[str, Any] = {"query_length": zones.query_length, "key_length": zones.key_length}
    q, k, v = operands(heads=8, **sizes, head_dim=128, dtype=BF16, device=CUDA)
    table = make(zones, target, BF16, 128)
    literal = make(zones, target, BF16, 128, literal=True)
    for step in range(128):
        assert torch.equal(table(q, k, v, step=step), literal(q, k, v, step=step))
    before = literal(q, k, v, step=3)
    check(before, q, k, v, zones, 3, fixed=True)
    assert table.repairs == 0


@pytest.mark.parametrize("target", TARGETS)
def test_spikes_are_repaired(
    operands: Callable[..., tuple[Tensor, ...]],
    spike: Callable[..., None],
    make: Callable[..., Any],
    target: str,
) -> None:
    zones = zone_pattern("text last")
    q, k, v = operands(query_length=900, key_length=900, head_dim=128, dtype=BF16, device=CUDA)
    spike(q, k, 700, 899, 300.0)  # a row with text keeps all keys
    for literal in (False, True):
        kernel = make(zones, target, BF16, 128, softmax="fixed", literal=literal)
        check(kernel(q, k, v, step=2), q, k, v, zones, 2, fixed=False)  # repaired
        assert kernel.repairs == 1


@pytest.mark.parametrize("target", TARGETS)
def test_a_graph_replays_a_step_and_streams_do_not_meet(
    operands: Callable[..., tuple[Tensor, ...]], make: Callable[..., Any], target: str
) -> None:
    zones = zone_pattern("diagonal")
    q, k, v = operands(query_length=1000, key_length=1000, dtype=BF16, device=CUDA)
    kernel = make(zones, target, BF16, 64, literal=True)
    expected = [kernel(q, k, v, step=step) for step in (4, 5)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel(q, k, v, step=4)
    out.zero_()
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        again = kernel(q, k, v, step=5)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected[0])
    assert torch.equal(again, expected[1])
