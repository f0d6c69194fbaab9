"""When literals of zones serve and when tables do, without a GPU: nothing is launched."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from zone_patterns import CASES, zone_pattern

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.baked.compiler import CompiledSource, KernelCompiler, KernelSpec
from calibatt_compiler.kernels.baked.zone_entries import get_zone_entry
from calibatt_compiler.kernels.baked.zone_jobs import decode_zones, encode_zones
from calibatt_compiler.kernels.request import KernelRequest
from calibatt_compiler.kernels.tiered import TieredZones

pytest.importorskip("triton")


class ManualCompiler(KernelCompiler):
    """Compiles nothing; the test decides when, and how, a kernel is done."""

    def __init__(self) -> None:
        super().__init__(workers=1)
        self.future: Future[CompiledSource] = Future()
        self.specs: list[KernelSpec] = []

    def submit(self, spec: KernelSpec) -> Future[CompiledSource]:
        self.specs.append(spec)
        return self.future


@pytest.fixture
def compiler() -> ManualCompiler:
    return ManualCompiler()


@pytest.fixture(params=["portable", "hopper"])
def make(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    compiler: ManualCompiler,
) -> Callable[[], TieredZones]:
    """Make a kernel for a GPU that is not there; tables lie on the CPU."""
    monkeypatch.setenv("CALIBATT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("calibatt_compiler.kernels.portable.launch.architecture", lambda device: 90)
    if request.param == "hopper":
        zones = pytest.importorskip("calibatt_compiler.kernels.hopper.zones")
        monkeypatch.setattr(zones, "multiprocessors", lambda device: 8)

    def build() -> TieredZones:
        from calibatt_compiler.kernels.baked.zones import baked_zones

        where: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.bfloat16}
        asked = KernelRequest(zone_pattern("plain"), head_dim=64, softmax="exact", **where)
        return baked_zones(asked, request.param, compiler=compiler)

    return build


def test_tables_serve_until_literals_are_compiled(
    make: Callable[[], TieredZones], compiler: ManualCompiler
) -> None:
    kernel = make()
    step = kernel.at(3)
    table = kernel.serving
    assert step.kind in ("triton-zones", "hopper-zones")
    assert not kernel.wait(timeout=0.01)
    assert [spec.pattern for spec in compiler.specs] == [kernel.pattern]
    compiler.future.set_result(CompiledSource("d", "v", Path("p"), 1.0, False))
    assert kernel.wait()
    # The site's step is the same object: it takes up what its group has.
    assert step.kind in ("triton-zones-baked", "hopper-zones-baked")
    assert kernel.reason is None
    assert kernel.table_bytes == table.table_bytes > 0
    assert kernel.serving._repairs is table._repairs  # type: ignore[attr-defined]
    assert table.kind in ("triton-zones", "hopper-zones")
    assert step.density == kernel.pattern.density_at(3)


def test_literals_that_fail_leave_tables_and_their_reason(
    make: Callable[[], TieredZones], compiler: ManualCompiler
) -> None:
    kernel = make()
    compiler.future.set_exception(KernelError("ptxas said no"))
    assert not kernel.wait()
    assert kernel.at(0).kind in ("triton-zones", "hopper-zones")
    assert kernel.at(0).reason == "ptxas said no"


@pytest.mark.parametrize("case", CASES)
def test_zones_reach_the_compiling_process_whole(case: str) -> None:
    zones = zone_pattern(case)
    assert decode_zones(encode_zones(zones)).digest == zones.digest


def test_a_source_that_was_changed_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CALIBATT_CACHE_DIR", str(tmp_path))
    zones = zone_pattern("ragged")
    entry = get_zone_entry(zones, "portable")
    assert get_zone_entry(zones, "portable") == entry
    assert get_zone_entry(zones, "hopper").digest != entry.digest
    whole = entry.source_path.read_text()
    entry.source_path.write_text("raise SystemExit")
    assert get_zone_entry(zones, "portable") == entry
    assert entry.source_path.read_text() == whole
    # Steps and seeds are not in the source.
    seeded = get_zone_entry(zones.with_seed(zones.seed ^ 1), "portable")
    assert seeded == entry
    assert not np.array_equal(zones.starts(0), zones.with_seed(zones.seed ^ 1).starts(0))
