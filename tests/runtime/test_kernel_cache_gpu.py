"""Kernels made ahead on a GPU: right results, within the budget, copied beneath the compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from calibatt_compiler.kernels.request import KernelSettings
from calibatt_compiler.plan import Plan
from calibatt_compiler.runtime import timestep
from calibatt_compiler.runtime.device_queue import CudaQueue
from calibatt_compiler.runtime.invocation import Invocation, Sites, running
from calibatt_compiler.runtime.kernel_cache import KernelCache
from calibatt_compiler.runtime.site import SparseSite

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
]
SITES, STEPS, HEADS, BLOCKS = 4, 12, 8, 64


def plan_of_noise() -> Plan:
    """Ragged masks, all different, so that each step needs tables of its own."""
    draw = torch.Generator().manual_seed(0)
    diagonal = torch.eye(BLOCKS, dtype=torch.bool)
    masks = {
        f"s{site}": (torch.rand(STEPS, HEADS, BLOCKS, BLOCKS, generator=draw) < 0.4) | diagonal
        for site in range(SITES)
    }
    timesteps = [float(STEPS - step) for step in range(STEPS)]
    return Plan.from_masks(masks, (1, 64, 128), timesteps)


@pytest.mark.parametrize("share", [0.3, 1.5, 100.0])
def test_results_are_those_of_kernels_that_are_held(share: float) -> None:
    """`share`: budget over the tables of one step."""
    device, plan = torch.device("cuda", 0), plan_of_noise()
    options: Any = {"device": device, "dtype": torch.bfloat16, "head_dim": 64}
    apart = {
        name: SparseSite(plan, name, KernelSettings(lowering="table", **options))
        for name in plan.sites
    }
    one = apart["s0"]._kernels.held("s0")[0].table_bytes
    budget = int(share * SITES * one)
    cache = KernelCache(CudaQueue(device), budget=budget)
    sites = [
        SparseSite(plan, name, KernelSettings(lowering="table", **options), kernels=cache)
        for name in plan.sites
    ]
    q, k, v = (
        torch.randn(1, HEADS, 128 * BLOCKS, 64, device=device, dtype=torch.bfloat16)
        for _ in range(3)
    )
    expected = {
        (name, t): site.attend(q, k, v, t, 0.125)
        for name, site in apart.items()
        for t in plan.timesteps
    }
    torch.cuda.synchronize()
    for _ in range(2):
        # Nothing is waited for within a video: the host runs as far ahead as it can.
        got = {
            (site._name, t): site.attend(q, k, v, t, 0.125)
            for t in plan.timesteps
            for _ in range(2)
            for site in sites
        }
        torch.cuda.synchronize()
        for key, out in got.items():
            assert torch.equal(out, expected[key]), key
    assert cache.counts.peak <= max(budget, 1.2 * one)
    assert cache.counts.ahead > 0 or share < 1


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU",
)
@pytest.mark.parametrize("lowering", ["table", "baked"])
@pytest.mark.parametrize(("blocks", "kinds"), [(128, ("hopper-table",)), (16, ("sdpa",))])
def test_the_hopper_kernel_serves_long_dense_sequences(
    blocks: int, kinds: tuple[str], lowering: Any
) -> None:
    tokens = 128 * blocks
    masks = {"a": torch.ones(1, 2, blocks, blocks, dtype=torch.bool)}
    plan = Plan.from_masks(masks, (1, blocks, 128), [1.0])
    options: Any = {"device": torch.device("cuda", 0), "dtype": torch.bfloat16, "head_dim": 128}
    site = SparseSite(plan, "a", KernelSettings(lowering=lowering, **options))
    q, k, v = (
        torch.randn(1, 2, tokens, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3)
    )
    got = site.attend(q, k, v, 1.0, 128**-0.5)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert site.counts.kinds == kinds
    assert (got - dense).float().norm() <= 0.01 * dense.float().norm()


def test_a_timestep_is_read_when_the_device_has_come_to_it() -> None:
    busy = torch.randn(4096, 4096, device="cuda")
    values = torch.arange(50, dtype=torch.float32, device="cuda")
    for i in range(50):
        busy = busy @ busy
        with running(Invocation(Sites({}))):
            sent = timestep.send(values[i : i + 1].expand(2))
            if i % 2:  # some are never read
                assert timestep.read(sent) == i
    assert timestep.read(timestep.send(values[3:4])) == 3, "outside of a graph it is waited for"
