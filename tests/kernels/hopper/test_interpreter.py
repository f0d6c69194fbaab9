"""The interpreter of Gluon kernels finds what it is there to find."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from calibatt_compiler.plan.copies import AnchorRows
from calibatt_compiler.plan.pattern import BlockPattern

pytest.importorskip("triton", reason="Gluon is part of triton")

from calibatt_compiler.kernels.hopper import attention as hopper
from calibatt_compiler.kernels.hopper.attention import HopperAttention


@pytest.mark.parametrize("missing", ["commit_group", "wait_group", "fence"])
def test_the_interpreter_finds_rows_that_are_not_there_yet(
    launches: Any,
    interpreter: Any,
    make: Callable[..., HopperAttention],
    operands: Callable[..., tuple[Tensor, ...]],
    random_pattern: Callable[..., BlockPattern],
    monkeypatch: pytest.MonkeyPatch,
    missing: str,
) -> None:
    pattern = random_pattern(
        query_length=429,
        block=(128, 128),
        repetitive=(True, True),
        copies=AnchorRows((3, 13, 11), 2),
    )
    q, k, v = operands(query_length=429, dtype=torch.bfloat16)
    if missing == "fence":
        monkeypatch.setitem(interpreter.NAMES, "fence_async_shared", lambda: None)
    else:
        monkeypatch.setattr(interpreter.NAMES["async_copy"], missing, lambda *_: None)
    monkeypatch.setattr(interpreter, "TIMEOUT", 0.5)
    again = interpreter.Interpreted(launches.kernel)
    monkeypatch.setattr(hopper, "hopper_attention", again)
    with pytest.raises(AssertionError, match=r"never waited for|not fenced"):
        make(pattern, torch.bfloat16, 64)(q, k, v)


def test_the_interpreter_finds_a_deadlock(
    interpreter: Any,
    make: Callable[..., HopperAttention],
    launches: Any,
    monkeypatch: pytest.MonkeyPatch,
    operands: Callable[..., tuple[Tensor, ...]],
) -> None:
    q, k, v = operands(query_length=300, key_length=700, dtype=torch.bfloat16)
    pattern = BlockPattern.dense(2, 300, 700)
    monkeypatch.setattr(interpreter, "TIMEOUT", 0.5)
    schedule = hopper.make_schedule

    def one_block_short(*given: Any, **more: Any) -> Any:
        made = schedule(*given, **more)
        made.tiles[:-1, 1] += 1  # the consumers expect a block that never comes
        return made

    monkeypatch.setattr(hopper, "make_schedule", one_block_short)
    with pytest.raises(AssertionError, match="deadlock"):
        make(pattern, torch.bfloat16, 64, programs=1)(q, k, v)
