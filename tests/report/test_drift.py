"""The monitor: what it measures, which calls it looks at, and what the summary says of it."""

from __future__ import annotations

import pytest
import torch

from calibatt_compiler.kernels.request import KernelSettings
from calibatt_compiler.plan import BlockPattern, Plan, Sampler, SitePatterns
from calibatt_compiler.plan.copies import AnchorRows
from calibatt_compiler.plan.order import TokenOrder
from calibatt_compiler.report.drift import MARGIN, Drift
from calibatt_compiler.runtime import monitor
from calibatt_compiler.runtime.monitor import KeptMassMonitor, kept_mass
from calibatt_compiler.runtime.site import SparseSite
from calibatt_compiler.runtime.token_order import Rearrangements

GRID = (2, 5, 8)
HEADS = 3


def random_pattern(length: int, seed: int = 0) -> BlockPattern:
    blocks = -(-length // 16)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(HEADS, blocks, blocks, generator=generator) < 0.4
    return BlockPattern.from_mask(
        mask | torch.eye(blocks).bool(), query_length=length, key_length=length, block=(16, 16)
    )


def plan_of(pattern: BlockPattern, order: str = "raster", **figures: float) -> Plan:
    return Plan.create(
        {"a": SitePatterns.share([pattern, pattern])},
        grid=GRID,
        sampler=Sampler(timesteps=(5.0, 4.0)),
        token_order=TokenOrder.parse(order),
        thresholds=figures,
    )


def operands(length: int, batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randn(batch, length, HEADS, 8, generator=generator).transpose(1, 2) for _ in range(3)
    ]


def make_site(plan: Plan, every: int) -> SparseSite:
    options = {"device": torch.device("cpu"), "dtype": torch.float32, "head_dim": 8}
    return SparseSite(plan, "a", KernelSettings(lowering="reference", **options), monitor=every)


@pytest.mark.parametrize("chunk", [1, 1 << 24])
@pytest.mark.parametrize("order", ["raster", "2x2x3"])
@pytest.mark.parametrize("row", [0, 2, 4])
def test_kept_mass_is_that_of_the_mask(order, row, chunk, monkeypatch):
    """Blocks of 16 hold no more queries than are looked at, so the definition is met exactly."""
    monkeypatch.setattr(monitor, "CHUNK", chunk)
    pattern = random_pattern(77)
    token_order = TokenOrder.parse(order)
    q, k, _ = operands(80)
    if order == "raster":
        q, k, sides = q[:, :, :77], k[:, :, :77], None
        tokens = torch.arange(77)
    else:
        pattern = random_pattern(80)
        sides = Rearrangements().of(token_order, GRID, 80, text_first=False, device=q.device)
        tokens = torch.from_numpy(token_order.tokens(GRID))
    mask = pattern.token_mask()
    p = torch.softmax(q.double()[:, :, tokens] @ k.double()[:, :, tokens].mT * 0.7, -1)
    kept = (p * mask).sum(-1)[:, :, row * 16 : (row + 1) * 16]
    got = kept_mass(q, k, pattern, row, 0.7, (sides, sides))
    assert got.item() == pytest.approx(kept.mean().item(), rel=1e-5)


@pytest.mark.parametrize("chunk", [1, 1 << 24])
@pytest.mark.parametrize("row", [0, 4])
def test_repetitive_heads_are_left_out(row, chunk, monkeypatch):
    monkeypatch.setattr(monitor, "CHUNK", chunk)
    plain = random_pattern(80)
    flags = torch.tensor([False, True, False])
    sizes = {"query_length": 80, "key_length": 80, "block": (16, 16)}
    copies = AnchorRows(GRID, 2)
    some = BlockPattern.from_mask(plain.mask(), **sizes, repetitive=flags.numpy(), copies=copies)
    q, k, _ = operands(80)
    got = kept_mass(q, k, some, row, 0.7)
    p = torch.softmax(q.double() @ k.double().mT * 0.7, -1)
    kept = (p * plain.token_mask()).sum(-1)[:, ~flags, row * 16 : (row + 1) * 16]
    assert got.item() == pytest.approx(kept.mean().item(), rel=1e-5)
    every = BlockPattern.from_mask(
        plain.mask(), **sizes, repetitive=(flags | True).numpy(), copies=copies
    )
    watch = KeptMassMonitor("a", 1)
    watch.sample(0, lambda: every, q, k, 0.7, (None, None))
    assert not watch.samples


@pytest.mark.parametrize("every", [1, 3, 50])
def test_one_in_so_many_calls_is_looked_at_and_every_step_comes_up(every):
    watch = KeptMassMonitor("blocks.0.attn1", every)
    due = [call for call in range(100 * every) if watch.due()]
    assert len(due) == pytest.approx(100, abs=2)
    steps = {call % 10 for call in due}
    assert len(steps) == 10


def test_all_rows_are_looked_at_in_time(monkeypatch):
    rows = []
    monkeypatch.setattr(
        monitor, "kept_mass", lambda q, k, p, row, *rest: rows.append(row) or torch.tensor(0.5)
    )
    watch = KeptMassMonitor("a", 1)
    for _ in range(50):
        watch.sample(0, lambda: random_pattern(80), *operands(80)[:2], 1.0, (None, None))
    assert {rows.count(row) for row in range(5)} <= {9, 10, 11}
    assert watch.kept() == {0: 0.5}


def test_a_site_measures_what_it_serves_and_changes_nothing():
    q, k, v = operands(80)
    plan = plan_of(random_pattern(80))
    plain, watched = make_site(plan, 0), make_site(plan, 1)
    for timestep in (5.0, 4.0, 4.0, 50.0):
        expected = plain.attend(q, k, v, timestep, 0.3)
        assert torch.equal(watched.attend(q, k, v, timestep, 0.3), expected)
    assert plain.monitor is None
    assert watched.monitor.samples == {0: 1, 1: 2}  # the dense call is not looked at
    assert Drift.of(plan, "a", watched.monitor).calibrated is None


def test_drift_is_measured_against_the_calls_own_thresholds():
    q, k, v = operands(80)
    q = torch.zeros_like(q)  # all keys alike: what is kept is the density of the row
    pattern = random_pattern(80)
    plan = plan_of(pattern, A=0.8, C=0.9, k=4.0, **{"raised:a": 0.02})
    site = make_site(plan, 1)
    assert Drift.of(plan, "a", site.monitor) is None
    for _ in range(10):
        site.attend(q, k, v, 4.0, 0.3)
    drift = Drift.of(plan, "a", site.monitor)
    assert drift.kept == pytest.approx(pattern.density, abs=1e-6)
    assert drift.samples == 10
    wanted = 0.8 + 0.1 * torch.tensor(-2.0).exp().item() + 0.02
    assert drift.calibrated == pytest.approx(wanted)
    assert drift.drifted == (wanted - pattern.density > MARGIN)
    assert drift.drifted


def test_weighted_samples_are_not_watched():
    mask = random_pattern(80).mask()
    weight = torch.where(mask, 2.0, 1.0)
    pattern = BlockPattern.from_mask(
        mask, query_length=80, key_length=80, block=(16, 16), weight=weight
    )
    assert make_site(plan_of(pattern), 1).monitor is None
