"""When the baked kernel serves and when the table does, without a GPU: nothing is launched."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from torch import Tensor

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.baked import attention as baked
from calibatt_compiler.kernels.baked.attention import baked_attention
from calibatt_compiler.kernels.baked.cache import get_entry
from calibatt_compiler.kernels.baked.compiler import CompiledSource, KernelCompiler, KernelSpec
from calibatt_compiler.kernels.baked.cover import EXACT, CoverError, CoverLimits
from calibatt_compiler.kernels.request import KernelRequest
from calibatt_compiler.kernels.tiered import TieredKernel
from calibatt_compiler.plan.pattern import BlockPattern


class ManualCompiler(KernelCompiler):
    """Compiles nothing; the test decides when, and how, a kernel is done."""

    def __init__(self) -> None:
        super().__init__(workers=1)
        self.future: Future[CompiledSource] = Future()
        self.specs: list[KernelSpec] = []

    def submit(self, spec: KernelSpec) -> Future[CompiledSource]:
        self.specs.append(spec)
        return self.future

    def finish(self) -> None:
        self.future.set_result(CompiledSource("d", "v", Path("p"), 1.0, False))


class RecordedLaunch:
    """Stands for a kernel: returns a value everywhere, or fails."""

    table_bytes, repairs, reason, density = 0, 0, None, 0.5

    def __init__(self, value: float, error: Exception | None = None) -> None:
        self.value, self.error = value, error
        self.kind = "triton-table" if value == 1 else "triton-baked"

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, padding: object = None
    ) -> Tensor:
        if self.error is not None:
            raise self.error
        return torch.full_like(q, self.value)


@pytest.fixture
def compiler() -> ManualCompiler:
    return ManualCompiler()


@pytest.fixture
def make(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    compiler: ManualCompiler,
    random_pattern: Callable[..., BlockPattern],
) -> Callable[..., TieredKernel]:
    """Make a kernel for a GPU that is not there; tables stay on the CPU."""
    monkeypatch.setenv("CALIBATT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("calibatt_compiler.kernels.portable.launch.architecture", lambda device: 90)
    monkeypatch.setattr(
        "calibatt_compiler.kernels.portable.attention.index_tables", lambda pattern, device: None
    )

    def build(error: Exception | None = None, **limits: object) -> TieredKernel:
        monkeypatch.setattr(baked, "TableLiterals", lambda *_, **__: RecordedLaunch(2.0, error))
        kernel = baked_attention(
            KernelRequest(
                random_pattern(heads=2, query_length=300),
                device=torch.device("cuda"),
                dtype=torch.bfloat16,
                head_dim=64,
                softmax="exact",
            ),
            compiler=compiler,
            **limits,
        )
        kernel.tiers[1]._kernel = RecordedLaunch(1.0)
        return kernel

    return build


Q = torch.zeros(1, 2, 300, 64)


def test_the_table_serves_until_the_kernel_is_compiled(
    make: Callable[..., TieredKernel], compiler: ManualCompiler
) -> None:
    kernel = make()
    assert kernel.kind == "triton-table"
    assert not kernel.wait(timeout=0.01)
    assert kernel(Q, Q, Q).unique().item() == 1
    compiler.finish()
    assert kernel.wait()
    assert kernel.kind == "triton-baked"
    assert kernel(Q, Q, Q).unique().item() == 2
    assert compiler.specs[0].arch == 90
    assert kernel.reason is None


def test_a_failed_kernel_leaves_the_table_and_its_reason(
    make: Callable[..., TieredKernel], compiler: ManualCompiler
) -> None:
    kernel = make()
    compiler.future.set_exception(KernelError("ptxas said no"))
    assert not kernel.wait()
    assert kernel(Q, Q, Q).unique().item() == 1
    assert kernel.kind == "triton-table"
    assert kernel.reason == "ptxas said no"


def test_a_cancelled_kernel_leaves_the_table(
    make: Callable[..., TieredKernel], compiler: ManualCompiler
) -> None:
    kernel = make()
    compiler.future.cancel()
    assert not kernel.wait()
    assert kernel(Q, Q, Q).unique().item() == 1
    assert kernel.reason == "compiling was cancelled"


def test_a_kernel_that_cannot_be_launched_leaves_the_table(
    make: Callable[..., TieredKernel], compiler: ManualCompiler
) -> None:
    kernel = make(error=RuntimeError("out of shared memory"))
    compiler.finish()
    assert kernel(Q, Q, Q).unique().item() == 1
    assert kernel.kind == "triton-table"
    assert kernel.reason is not None
    assert "out of shared memory" in kernel.reason


def test_wrong_operands_are_the_callers_error(
    make: Callable[..., TieredKernel], compiler: ManualCompiler
) -> None:
    kernel = make(error=KernelError("operands don't fit"))
    compiler.finish()
    with pytest.raises(KernelError, match="don't fit"):
        kernel(Q, Q, Q)
    assert kernel.kind == "triton-baked"


def test_a_mask_beyond_given_limits_is_declined_at_once(
    make: Callable[..., TieredKernel], compiler: ManualCompiler
) -> None:
    kernel = make(limits=CoverLimits(16))
    assert kernel.reason is not None
    assert "16 literals" in kernel.reason
    assert not compiler.specs
    assert not kernel.wait()


def test_a_mask_of_too_many_literals_is_left_to_the_table(
    make: Callable[..., TieredKernel], compiler: ManualCompiler
) -> None:
    kernel = make()
    compiler.future.set_exception(CoverError("the mask takes more than 2048 literals"))
    assert not kernel.wait()
    assert kernel.reason == "the mask takes more than 2048 literals"


def test_nothing_is_covered_while_a_model_waits(
    make: Callable[..., TieredKernel], compiler: ManualCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    covered = []
    monkeypatch.setattr(
        "calibatt_compiler.kernels.baked.cache.cover_pattern", lambda *_: covered.append(1)
    )
    make()
    assert not covered
    assert compiler.specs[0].limits == EXACT


def test_what_was_declined_before_is_not_tried_again(
    make: Callable[..., TieredKernel],
    compiler: ManualCompiler,
    random_pattern: Callable[..., BlockPattern],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = CoverLimits(16)
    monkeypatch.setattr(baked, "EXACT", few)
    with pytest.raises(CoverError):
        get_entry(random_pattern(heads=2, query_length=300), few)
    kernel = make()
    assert kernel.reason == "the mask takes more than 16 literals and 6 intervals a row"
    assert not compiler.specs


def test_an_unwritable_cache_leaves_the_table(
    make: Callable[..., TieredKernel], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("CALIBATT_CACHE_DIR", str(blocked))
    monkeypatch.setattr("calibatt_compiler.kernels.baked.cache_folder.private_dir", lambda: blocked)
    kernel = make(limits=CoverLimits())
    assert kernel.kind == "triton-table"
    assert kernel.reason is not None
