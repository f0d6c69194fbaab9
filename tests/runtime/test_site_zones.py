"""Sites of zones: one kernel serves all steps of a group, and is counted once."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from calibatt_compiler.errors import PlanFormatError
from calibatt_compiler.kernels.reference.attention import masked_dense_attention
from calibatt_compiler.kernels.request import KernelSettings
from calibatt_compiler.plan import Plan
from calibatt_compiler.runtime import site_kernels
from calibatt_compiler.runtime.device_queue import HostQueue
from calibatt_compiler.runtime.kernel_cache import KernelCache
from calibatt_compiler.runtime.site import SparseSite

GRID, BLOCK = (2, 5, 8), (16, 16)
VIDEO = math.prod(GRID)
TIMESTEPS = (1000.0, 800.0, 600.0, 400.0, 200.0)
GROUPS = (0, 0, 0, 1, 1)


class Counted:
    """A kernel of zones whose tables and recomputed calls are known."""

    def __init__(self, kernel: Any, table_bytes: int) -> None:
        self._kernel = kernel
        self.table_bytes, self.repairs = table_bytes, 3

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Counted]:
    """Kernels that were made, of 1000 bytes each."""
    found: list[Counted] = []
    real = site_kernels.make_zones

    def make(request: Any) -> Any:
        found.append(Counted(real(request), 1000))
        return found[-1]

    monkeypatch.setattr(site_kernels, "make_zones", make)
    return found


def plan_of(text: int = 0) -> Plan:
    length = VIDEO + text
    blocks, video = -(-length // BLOCK[0]), VIDEO // BLOCK[0]
    far = (torch.arange(blocks)[:, None] - torch.arange(blocks)).abs()
    maps = torch.stack([far // (1 + i % 2) for i in range(4)]).view(2, 2, blocks, blocks).clone()
    maps[..., video:] = 0
    maps[..., video:, :] = 0
    given: dict[str, Any] = {"lengths": {"a": (length, length)}, "text": "dense_last"}
    return Plan.from_zones({"a": maps}, GRID, TIMESTEPS, BLOCK, **(given if text else {}))


def site_of(plan: Plan, cache: KernelCache | None = None, lowering: Any = "baked") -> SparseSite:
    where = {"device": torch.device("cpu"), "dtype": torch.float32, "head_dim": 8}
    return SparseSite(plan, "a", KernelSettings(lowering=lowering, **where), kernels=cache)  # type: ignore[arg-type]


def operands(length: int = VIDEO) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, length, 8, generator=generator) for _ in range(3)]


def test_one_kernel_serves_a_step_group(made: list[Counted]) -> None:
    plan, cache = plan_of(), KernelCache(HostQueue())
    site = site_of(plan, cache)
    assert len(made) == 1
    assert site.counts.kinds == ("native-cpu-zones",)
    for _ in range(2):
        for step, timestep in enumerate(TIMESTEPS):
            out = site.attend(*operands(), timestep, 0.3)
            wanted = masked_dense_attention(*operands(), plan.sites["a"].at(step), scale=0.3)
            assert (out - wanted).abs().max() < 1e-5
    assert len(made) == len(set(GROUPS))
    assert site.calls == {"native-cpu-zones": 10}
    assert cache.bytes == cache.counts.peak == 2000
    assert site.repairs == 6
    for step, served in site.counts.served.items():
        assert served.density == plan.sites["a"].density_at(step)
    assert len(site.counts.served) == len(TIMESTEPS)
    site.release_kernels()
    assert site.repairs == site.counts.recomputed == 6


def test_a_budget_for_one_group_holds_one(made: list[Counted]) -> None:
    cache = KernelCache(HostQueue(), budget=1500)
    site = site_of(plan_of(), cache)
    for timestep in TIMESTEPS:
        site.attend(*operands(), timestep, 0.3)
    assert len(made) == 2
    assert cache.counts.peak == 1000
    assert cache.counts.evicted == 1
    assert site.repairs == 6


@pytest.mark.parametrize("lowering", ["reference", "table", "baked"])
def test_another_text_length_has_a_kernel_a_group_of_its_own(
    made: list[Counted], lowering: str
) -> None:
    plan = plan_of(text=16)
    site = site_of(plan, lowering=lowering)
    zones = plan.sites["a"].zones
    assert zones is not None
    for length in (VIDEO + 3, VIDEO + 40):
        before = len(made)
        for step, timestep in enumerate(TIMESTEPS):
            out = site.attend(*operands(length), timestep, 0.3)
            own = zones.zones[GROUPS[step]].with_lengths(length, length).draw(step)
            wanted = masked_dense_attention(*operands(length), own, scale=0.3)
            assert (out - wanted).abs().max() < 1e-5
        assert len(made) == before + 2
    assert not any(kind.startswith("dense") for kind in site.calls)


def test_zones_that_contradict_the_record_are_not_served() -> None:
    plan = plan_of()
    zones = plan.sites["a"].zones
    assert zones is not None
    # The last step of the first group, while the kernel is made for its first.
    zones.kept = (*zones.kept[:2], zones.kept[2] + 1, *zones.kept[3:])
    with pytest.raises(PlanFormatError, match=r"step 2 .* recorded"):
        site_of(plan)
