"""What a plan needs compiled, asked for a little at a time."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from calibatt_compiler.build import PlanSpecs
from calibatt_compiler.errors import PlanError
from calibatt_compiler.kernels.baked.compiler import (
    AHEAD,
    BuildReport,
    CompiledSource,
    KernelCompiler,
    KernelSpec,
)
from calibatt_compiler.plan import AnchorRows, BlockPattern, Plan, Sampler, SitePatterns

GRID = (1, 16, 12)
STEPS = 3


def pattern(seed: int, *, pooled: int = 0) -> BlockPattern:
    mask = torch.rand(2, 3, 3, generator=torch.Generator().manual_seed(seed)) < 0.4
    mask |= torch.eye(3, dtype=torch.bool)
    return BlockPattern.from_mask(mask, block=(64, 64), pooled=pooled)


def plan_of(head_dim: int | None = 64) -> Plan:
    """Four distinct patterns that need a kernel, one that keeps all, one with pooled keys."""
    full = BlockPattern.dense(2, math.prod(GRID), math.prod(GRID), (64, 64))
    sites = {
        "a": SitePatterns.share([full, pattern(1), pattern(2)], head_dim),
        "b": SitePatterns.share([pattern(2), pattern(3), pattern(4)], head_dim),
        "c": SitePatterns.share([pattern(5, pooled=2)] * STEPS, head_dim),
    }
    return Plan.create(sites, grid=GRID, sampler=Sampler(timesteps=(3.0, 2.0, 1.0)))


@pytest.mark.parametrize("stored", [False, True])
def test_each_pattern_that_has_a_generated_kernel_comes_once(stored, tmp_path: Path):
    plan = plan_of()
    if stored:
        plan.save(tmp_path / "p")
        plan = Plan.load(tmp_path / "p")
    specs = PlanSpecs(plan, [80, 90], torch.bfloat16)
    found = list(specs)
    assert len(found) == len(specs) == 8
    digests = {pattern(seed).digest for seed in (1, 2, 3, 4)}
    assert {(spec.pattern.digest, spec.arch) for spec in found} == {
        (digest, arch) for digest in digests for arch in (80, 90)
    }
    assert {(spec.target, spec.head_dim) for spec in found} == {("portable", 64)}
    assert found[0] in specs
    assert KernelSpec(pattern(9), torch.bfloat16, 64, 90) not in specs
    assert KernelSpec(pattern(1), torch.float16, 64, 90) not in specs


def test_hopper_kernels_are_for_hopper_gpus():
    mask = torch.ones(1, 2, 2, dtype=torch.bool)
    mask[0, 0, 1] = False
    site = SitePatterns.share([BlockPattern.from_mask(mask, block=(128, 128))], 64)
    plan = Plan.create({"a": site}, grid=(1, 16, 16), sampler=Sampler(timesteps=(1.0,)))
    specs = PlanSpecs(plan, [80, 90], torch.bfloat16)
    assert {(spec.arch, spec.target) for spec in specs} == {(80, "portable"), (90, "hopper")}
    portable = PlanSpecs(plan, [90], torch.bfloat16, hopper=False)
    assert {spec.target for spec in portable} == {"portable"}
    # Blocks of 64x64 are not for it.
    assert {spec.target for spec in PlanSpecs(plan_of(), [90], torch.bfloat16)} == {"portable"}


def test_repetitive_heads_are_compiled_at_any_density():
    copies = AnchorRows(GRID, 4)  # 48 of 192 queries
    plain = pattern(1)
    one_block = BlockPattern.from_mask(
        torch.ones(1, 1, 1, dtype=torch.bool),
        query_length=192,
        key_length=192,
        block=(192, 192),
        repetitive=np.array([True]),
        copies=copies,
    )
    some = BlockPattern.from_mask(
        plain.mask(), block=(64, 64), repetitive=np.array([False, True]), copies=copies
    )
    assert one_block.density == 1
    sites = {
        "a": SitePatterns.share([one_block], 64),
        "b": SitePatterns.share([some], 64),
        "c": SitePatterns.share([plain], 64),
    }
    plan = Plan.create(sites, grid=GRID, sampler=Sampler(timesteps=(1.0,)))
    for arch, target in ((80, "portable"), (90, "portable")):
        specs = PlanSpecs(plan, [arch], torch.bfloat16)
        found = {spec.pattern.digest: spec.target for spec in specs}
        assert found == dict.fromkeys([one_block.digest, some.digest, plain.digest], target)


def test_the_channels_of_a_head_must_be_known():
    with pytest.raises(PlanError, match="channels"):
        PlanSpecs(plan_of(None), [90], torch.bfloat16)
    assert len(PlanSpecs(plan_of(None), [90], torch.bfloat16, 128)) == 4


def test_specs_are_asked_for_as_they_are_compiled(monkeypatch: pytest.MonkeyPatch):
    asked = done = most = 0

    class Counted(PlanSpecs):
        def __len__(self) -> int:
            return 40

        def __iter__(self):
            nonlocal asked, most
            for seed in range(40):
                asked += 1
                most = max(most, asked - done)
                yield KernelSpec(pattern(100 + seed % 30), torch.bfloat16, 64, 90)

    def progress(now: int, total: int) -> None:
        nonlocal done
        assert total == 40
        done = now

    monkeypatch.setattr("calibatt_compiler.kernels.baked.compiler._Worker", FakeWorker)
    with KernelCompiler(workers=1) as pool:
        report = pool.build(Counted(plan_of(), [90], torch.bfloat16), progress)
    assert done == 40
    assert len(report.compiled) == 30
    assert not report.failed
    assert most <= AHEAD + 2


class FakeWorker:
    """Answers at once."""

    def run(self, job: str, timeout: float) -> dict[str, object]:
        source = CompiledSource("d", "v", Path("s"), 0.0, False)
        return {"ok": True, **vars(source), "source_path": "s"}

    def stop(self) -> None:
        """Nothing runs."""


def zone_plan() -> Plan:
    """Two sites of two step groups of zones."""
    maps = torch.arange(3).expand(2, 2, 3, 3).clone()
    maps[1] = maps[1].flip(-1)
    return Plan.from_zones({"a": maps, "b": maps}, GRID, (5.0, 4.0, 3.0, 2.0, 1.0), (64, 64))


def test_of_zones_each_step_group_is_compiled_and_all_its_steps_count(
    monkeypatch: pytest.MonkeyPatch,
):
    plan = zone_plan()
    specs = PlanSpecs(plan, [80, 90], torch.bfloat16, 64)
    # Seeds tell the sites apart.
    assert len(specs) == len(list(specs)) == 8
    assert all(spec in specs for spec in specs)
    assert specs.count_steps(BuildReport()) == {"generated": 0, "table": 20, "dense": 0}
    monkeypatch.setattr("calibatt_compiler.kernels.baked.compiler._Worker", FakeWorker)
    with KernelCompiler(workers=1) as pool:
        report = pool.build(specs)
    assert specs.count_steps(report) == {"generated": 20, "table": 0, "dense": 0}
    # Without the first group of one site: three steps.
    site = plan.sites["a"]
    report.ready.remove((site.digests[0], 64, 90))
    assert specs.count_steps(report) == {"generated": 17, "table": 3, "dense": 0}


def test_steps_of_masks_count_too(monkeypatch: pytest.MonkeyPatch):
    specs = PlanSpecs(plan_of(), [90], torch.bfloat16)
    monkeypatch.setattr("calibatt_compiler.kernels.baked.compiler._Worker", FakeWorker)
    with KernelCompiler(workers=1) as pool:
        report = pool.build(specs)
    assert specs.count_steps(report) == {"generated": 5, "table": 3, "dense": 1}
