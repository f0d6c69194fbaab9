"""Machine code of the Hopper kernel, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.attention import make_attention
from calibatt_compiler.kernels.hopper import capability as hopper_capability
from calibatt_compiler.kernels.hopper.capability import gluon_reason, hopper_serves, operand_reason
from calibatt_compiler.kernels.hopper.fallback import WithFallback
from calibatt_compiler.plan.copies import RowCopies
from calibatt_compiler.plan.pattern import BlockPattern

SHARED_MEMORY = 227 * 1024
# Twenty-one kernels in all; those left out differ from these in nothing that could spill.
BUILT = (
    "fixed, D 128, everything",
    "fixed, D 128, lengths",
    "exact, D 128, ragged",
    "fp16, D 64, blocks of 64",
    "fixed, D 128, copies, everything",
    "fixed, D 128, copies, lengths",
    "fp16, D 64, copies, blocks of 64",
    "counts",
    "literals",
    "literals, copies",
)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Facts from the machine code, by name of the kernel; compiled once a session."""
    folder = tmp_path_factory.mktemp("hopper")
    environment = {
        **os.environ,
        "CALIBATT_CACHE_DIR": str(folder / "calibatt"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parents[2] / "support" / "hopper_builds.py"), *BUILT],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    facts = [json.loads(line) for line in done.stdout.splitlines()]
    return {fact["name"]: fact for fact in facts}


@pytest.mark.slow
def test_machine_code(kernels: dict[str, dict[str, Any]]) -> None:
    assert len(kernels) == len(BUILT) + 2
    for name, kernel in kernels.items():
        # Both are where spilled registers would go.
        assert kernel["local"] == kernel["stack"] == kernel["local_access"] == 0, kernel
        assert kernel["shared"] <= SHARED_MEMORY, kernel
        assert kernel["half_products"] == 0, "a product on the tensor cores' slow path"
        if name == "counts":
            continue
        # One program an SM: two consumer warpgroups, two copying warps, two that idle.
        assert kernel["threads"] == 384, kernel
        assert kernel["registers"] <= 65536 // 384, kernel
        copies = "copies" in name
        # Consumers take 240 registers, what only copies keeps 24; it needs more for single rows.
        moves = {"0xe8", "0x28"} if copies else {"0xf0", "0x18"}
        assert moves <= set(kernel["register_moves"]), kernel
        # Rows are gathered and scattered 16 bytes at a time, in loops that stay small.
        assert (1 <= kernel["gathers"] <= 32) if copies else kernel["gathers"] == 0, kernel
        assert (1 <= kernel["scatters"] <= 32) if copies else kernel["scatters"] == 0, kernel
        # Tensors are read and written in place, whatever their strides.
        assert kernel["tma_dimensions"] == ["4D"], kernel
        assert kernel["tma_stores"] > 0, kernel
        # Three places compute probabilities (start, loop, change of tile), once a consumer; 64
        # rows of a block over 128 threads; exact softmax has one more in the loop, twice a thread.
        columns = 64 if "blocks of 64" in name else 128
        exact = "fp16" in name or "exact" in name or "repair True" in name
        # Each consumer rescales in its loop, where a row's maximum may grow.
        assert kernel["rescaling"] == [True, True] * exact, kernel
        assert kernel["exponentials"] == 2 * 3 * columns // 2 + 8 * exact, kernel
        # The same places, and the last PV; 16 keys or channels a product.
        channels = 64 if "D 64" in name else 128
        assert kernel["wgmma"] == 2 * (3 * channels + 3 * columns) // 16, kernel


@pytest.mark.slow
def test_a_launch_after_a_build_compiles_nothing(kernels: dict[str, dict[str, Any]]) -> None:
    for copies, repair in product(("", ", copies"), (False, True)):
        assert kernels[f"literals{copies}, repair {repair}"]["new_files"] == 0


def weighted(weight: list[list[float]]) -> BlockPattern:
    made = torch.tensor([weight])
    return BlockPattern.from_mask(torch.ones_like(made, dtype=torch.bool), weight=made)


def test_every_limit_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    fits = BlockPattern.dense(1, 300, 300)
    assert gluon_reason() is None, "the installed triton's Gluon has changed"
    assert hopper_serves(cpu, torch.bfloat16, 128, fits) == "it needs an NVIDIA GPU"
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert hopper_serves(cuda, torch.bfloat16, 128, fits) is None
    for dtype, head_dim, block, words in (
        (torch.float32, 128, (128, 128), "bfloat16 and float16"),
        (torch.float16, 96, (128, 128), "head dims 64 and 128, not 96"),
        (torch.float16, 64, (64, 64), "not 64x64"),
        (torch.float16, 64, (128, 32), "not 128x32"),
    ):
        reason = hopper_serves(cuda, dtype, head_dim, BlockPattern.dense(1, 300, 300, block))
        assert reason is not None
        assert words in reason
    pooled = BlockPattern.from_mask(torch.ones(1, 2, 2, dtype=torch.bool), pooled=1)
    assert "pooled" in (hopper_serves(cuda, torch.bfloat16, 128, pooled) or "")
    repetitive = BlockPattern.from_mask(
        torch.ones(1, 2, 2, dtype=torch.bool),
        repetitive=np.array([True]),
        copies=RowCopies((2, 8, 16), 3),
    )
    assert hopper_serves(cuda, torch.bfloat16, 128, repetitive) is None
    assert hopper_serves(cuda, torch.bfloat16, 128, weighted([[2.0, 4.0], [1.0, 8.0]])) is None
    long = BlockPattern.dense(1, 128, 1 << 21, (128, 64))
    assert "32767 blocks" in (operand_reason(torch.bfloat16, 128, long) or "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (10, 0))
    assert "sm_100" in (hopper_serves(cuda, torch.bfloat16, 128, fits) or "")


def test_another_gluon_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = {"triton.experimental.gluon": (("jit",), ("no_such_thing", "nor_this"))}
    monkeypatch.setattr(hopper_capability, "_NEEDED", needed)
    gluon_reason.cache_clear()
    try:
        assert "no triton.experimental.gluon.no_such_thing or nor_this" in (gluon_reason() or "")
        monkeypatch.setattr(hopper_capability, "_NEEDED", {"triton.no.gluon": ()})
        gluon_reason.cache_clear()
        assert "no Gluon for Hopper" in (gluon_reason() or "")
    finally:
        gluon_reason.cache_clear()


class Stand:
    """Stands for a kernel; fails if told so."""

    kind, density = "stand", 0.5

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.calls = error, 0
        self.reason: str | None = None

    def __call__(self, q: Any, k: Any, v: Any, *, scale: float | None = None) -> Any:
        self.calls += 1
        if self.error is not None:
            raise self.error
        return q


def test_the_portable_kernel_says_why_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "calibatt_compiler.kernels.attention._cuda_kernel", lambda *_, **__: Stand()
    )
    where: dict[str, Any] = {"device": torch.device("cuda"), "dtype": torch.bfloat16}
    # Other GPUs have no Hopper kernel to miss.
    for capability, hopper, words in (
        ((8, 0), True, None),
        ((9, 0), False, None),
        ((9, 0), True, "no Hopper kernel: it takes head dims 64 and 128, not 96"),
    ):
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        made = make_attention(
            BlockPattern.dense(1, 300, 300), lowering="table", **where, head_dim=96, hopper=hopper
        )
        assert made.reason == words


def test_a_kernel_that_does_not_compile_is_replaced_at_its_first_call() -> None:
    x: Any = torch.zeros(1)
    portable = Stand()
    kernel = WithFallback(Stand(RuntimeError("no such layout")), lambda: portable)
    assert kernel(x, x, x) is x
    assert kernel.kernel is portable
    assert kernel.reason == "no Hopper kernel: RuntimeError: no such layout"
    served = Stand()
    kernel = WithFallback(served, lambda: portable)
    kernel(x, x, x)
    assert kernel.reason is None
    served.error = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        kernel(x, x, x)
    refused = WithFallback(Stand(KernelError("wrong operands")), lambda: portable)
    with pytest.raises(KernelError, match="wrong operands"):
        refused(x, x, x)
    assert portable.calls == 1
