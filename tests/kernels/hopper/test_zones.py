"""Octave zones on the Hopper kernel's own source, interpreted: draws, weights, walks, barriers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from zone_patterns import CASES, zone_pattern

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.request import KernelRequest
from calibatt_compiler.plan.zones import ZonePattern

pytest.importorskip("triton", reason="Gluon is part of triton")

from calibatt_compiler.kernels.baked import source_zones
from calibatt_compiler.kernels.common.zone_table import zone_table
from calibatt_compiler.kernels.hopper import zones as hopper
from calibatt_compiler.kernels.hopper.zones import HopperZones, row_order

CPU = torch.device("cpu")
STEPS = (0, 1, 6, 77, 127)


@pytest.fixture
def kernel(
    launches: Any, interpreter: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., HopperZones]:
    """Make an interpreted kernel of few programs: `kernel(zones, dtype, head_dim, literal=...)`."""
    monkeypatch.setenv("CALIBATT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(hopper, "hopper_attention", launches)

    def make(
        zones: ZonePattern, dtype: torch.dtype, head_dim: int, *, literal: bool = False, **more: Any
    ) -> HopperZones:
        table = zone_table(zones)
        literals = source_zones.load_zones(zones, table, "hopper") if literal else None
        softmax = more.pop("softmax", "auto")
        request = KernelRequest(zones, device=CPU, dtype=dtype, head_dim=head_dim, softmax=softmax)
        return HopperZones(request, literals, **{"programs": 3, **more})

    return make


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("dtype", "head_dim", "softmax"), [(torch.bfloat16, 64, "fixed"), (torch.float16, 128, "exact")]
)
def test_each_step_is_attended(
    kernel: Callable[..., HopperZones],
    operands: Callable[..., tuple[Tensor, ...]],
    assert_attention: Callable[..., None],
    name: str,
    dtype: torch.dtype,
    head_dim: int,
    softmax: str,
) -> None:
    zones = zone_pattern(name)
    sizes = {"query_length": zones.query_length, "key_length": zones.key_length}
    batch = 2 if name == "ragged" else 1
    q, k, v = operands(batch=batch, heads=zones.heads, **sizes, head_dim=head_dim, dtype=dtype)
    table = kernel(zones, dtype, head_dim, softmax=softmax)
    literal = kernel(zones, dtype, head_dim, softmax=softmax, literal=True, order="rows")
    for step in STEPS[:: 1 if head_dim == 64 else 2]:
        out = table(q, k, v, step=step)
        drawn = zones.draw(step)
        assert_attention(out, q, k, v, drawn)
        assert torch.equal(literal.at(step)(q, k, v), out)
        assert literal.at(step).density == drawn.density
    assert table.repairs == literal.repairs == 0


@pytest.mark.slow
def test_every_phase_is_drawn_as_the_plan_draws_it(
    kernel: Callable[..., HopperZones], operands: Callable[..., tuple[Tensor, ...]]
) -> None:
    """Values that name their key block tell which blocks a row has kept, with which weight."""
    zones = zone_pattern("text first")
    sizes = {"query_length": zones.query_length, "key_length": zones.key_length}
    q, k, v = operands(heads=zones.heads, **sizes, dtype=torch.float16)
    q.zero_()
    block = torch.arange(zones.key_length) // zones.block_n
    v.copy_(torch.nn.functional.one_hot(block, 64).to(v.dtype)[None, None])
    tokens = block.bincount(minlength=zones.key_blocks)
    table = kernel(zones, torch.float16, 64)
    for step in range(128):
        drawn = zones.draw(step)
        weight = torch.from_numpy(np.exp(drawn.log_weights())) * drawn.mask() * tokens
        expected = weight / weight.sum(-1, keepdim=True)
        out, lse = table.attend(q, k, v, step=step, return_lse=True)
        of_rows = out[0, :, :: zones.block_m, : zones.key_blocks].float()
        torch.testing.assert_close(of_rows, expected.float(), atol=2e-3, rtol=2e-3)
        assert lse is not None
        exact = weight.sum(-1).log().float()
        torch.testing.assert_close(lse[0, :, :: zones.block_m], exact, atol=1e-4, rtol=1e-4)


def test_a_call_that_overflows_is_repaired_at_its_own_step(
    kernel: Callable[..., HopperZones],
    operands: Callable[..., tuple[Tensor, ...]],
    spike: Callable[..., None],
    assert_attention: Callable[..., None],
) -> None:
    zones = zone_pattern("ragged")
    q, k, v = operands(heads=3, query_length=333, key_length=1111, dtype=torch.bfloat16)
    lead = int(zones.row_leads()[1, 0])
    step, later = next(
        (step, block)
        for step in range(3, 128)
        for block in zones.draw(step).mask()[1, 0].nonzero().flatten().tolist()
        if block != lead
    )
    spike(q, k, 3, later * 128 + 5, 300.0)
    for literal in (False, True):
        made = kernel(zones, torch.bfloat16, 64, literal=literal)
        assert_attention(made(q, k, v, step=step), q, k, v, zones.draw(step))
        assert made.repairs == 1


def test_heads_that_do_not_fit_the_source_read_the_table(
    kernel: Callable[..., HopperZones],
    operands: Callable[..., tuple[Tensor, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    zones = zone_pattern("ragged")
    table = zone_table(zones)
    first = int((table.heads == 0).sum())
    monkeypatch.setattr(source_zones.generate_zones, "__defaults__", (first + 1,))
    assert source_zones.literal_heads(zones, table, first + 1) == 1
    assert source_zones.literal_heads(zones, table) == 3
    q, k, v = operands(heads=3, query_length=333, key_length=1111, dtype=torch.bfloat16)
    part, whole = (kernel(zones, torch.bfloat16, 64, literal=literal) for literal in (True, False))
    assert "gl.load" in source_zones.generate_zones(zones, table, "hopper")
    assert torch.equal(part(q, k, v, step=4), whole(q, k, v, step=4))


def test_what_zones_do_not_take_is_refused(
    kernel: Callable[..., HopperZones], operands: Callable[..., tuple[Tensor, ...]]
) -> None:
    zones = zone_pattern("plain")
    made = kernel(zones, torch.bfloat16, 64)
    q, k, v = operands(query_length=384, key_length=1024, dtype=torch.bfloat16)
    with pytest.raises(KernelError, match="no key lengths"):
        made.attend(q, k, v, step=0, key_lengths=torch.tensor([5]))
    with pytest.raises(KernelError, match="made for this site"):
        made(q.half(), k.half(), v.half(), step=0)
    octaves = torch.zeros(1, 1, 1 << 14, dtype=torch.int64)
    wide = ZonePattern.from_octaves(octaves, block=(128, 64))
    with pytest.raises(KernelError, match="at most 16383"):
        kernel(wide, torch.bfloat16, 64)


@pytest.mark.parametrize("missing", ["warp_barrier", "octave"])
def test_the_interpreter_finds_octaves_that_are_not_there_yet(
    kernel: Callable[..., HopperZones],
    operands: Callable[..., tuple[Tensor, ...]],
    interpreter: Any,
    launches: Any,
    monkeypatch: pytest.MonkeyPatch,
    missing: str,
) -> None:
    if missing == "warp_barrier":
        monkeypatch.setitem(interpreter.NAMES, "warp_barrier", lambda: None)
    else:
        monkeypatch.setattr(interpreter.SharedTiles, "store", lambda *_: None)
    monkeypatch.setattr(interpreter, "TIMEOUT", 0.5)
    monkeypatch.setattr(hopper, "hopper_attention", interpreter.Interpreted(launches.kernel))
    q, k, v = operands(query_length=384, key_length=1024, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match=r"lane|before it was written"):
        kernel(zone_pattern("plain"), torch.bfloat16, 64)(q, k, v, step=0)


def test_rows_of_like_starts_follow_one_another() -> None:
    zones = zone_pattern("diagonal")
    table = zone_table(zones)
    upwards = np.arange(2 * zones.query_blocks).reshape(2, -1)
    assert np.array_equal(row_order(zones, table, "rows"), upwards)
    order = row_order(zones, table, "starts")
    assert np.array_equal(np.sort(order), upwards)
    assert np.array_equal(order[0], upwards[0]), "rows of diagonal groups go upwards"
    size = int(zones.group_rows[1])
    starts = zones.starts(0)[1]
    for first in range(0, zones.query_blocks, size):
        found = starts[order[1, first : first + size] - zones.query_blocks] - zones.seed & 127
        assert np.array_equal(found, np.sort(found))
