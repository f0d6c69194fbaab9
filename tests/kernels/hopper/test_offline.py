"""Machine code of the Hopper kernel, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.hopper import capability as hopper_capability
from calibatt_compiler.kernels.hopper.attention import HopperAttention
from calibatt_compiler.kernels.hopper.capability import gluon_reason, operand_reason
from calibatt_compiler.kernels.request import KernelRequest
from calibatt_compiler.plan.pattern import BlockPattern

SHARED_MEMORY = 227 * 1024
# Twenty-seven kernels in all; those left out differ from these in nothing that could spill.
BUILT = (
    "fixed, D 128, everything",
    "fixed, D 128, lengths",
    "exact, D 128, ragged",
    "fp16, D 64, blocks of 64",
    "fixed, D 128, copies, everything",
    "fixed, D 128, copies, lengths",
    "fp16, D 64, copies, blocks of 64",
    "fixed, D 128, zones, everything",
    "exact, D 128, zones, everything",
    "fp16, D 64, zones, blocks of 64",
    "counts",
    "literals",
    "literals, copies",
    "literals, zones",
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
    assert len(kernels) == len(BUILT) + 3
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
        # Runs that are literals lie in the kernel's constant memory and are read one at a time.
        assert kernel["literal_reads"] == ("literals, zones" in name), kernel
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


def test_every_limit_is_a_reason() -> None:
    assert gluon_reason() is None, "the installed triton's Gluon has changed"
    for dtype, head_dim, block, words in (
        (torch.float32, 128, (128, 128), "bfloat16 and float16"),
        (torch.float16, 96, (128, 128), "head dims 64 and 128, not 96"),
        (torch.float16, 64, (64, 64), "not 64x64"),
        (torch.float16, 64, (128, 32), "not 128x32"),
    ):
        reason = operand_reason(dtype, head_dim, BlockPattern.dense(1, 300, 300, block))
        assert reason is not None
        assert words in reason
    pooled = BlockPattern.from_mask(torch.ones(1, 2, 2, dtype=torch.bool), pooled=1)
    assert "pooled" in (operand_reason(torch.bfloat16, 128, pooled) or "")
    long = BlockPattern.dense(1, 128, 1 << 21, (128, 64))
    assert "32767 blocks" in (operand_reason(torch.bfloat16, 128, long) or "")
    with pytest.raises(KernelError, match="not 96"):
        HopperAttention(
            KernelRequest(pooled, device=torch.device("cpu"), dtype=torch.float16, head_dim=96)
        )


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
