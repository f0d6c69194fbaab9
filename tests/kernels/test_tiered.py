"""Kernels behind one another: which serves, and what an error of a launch means."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.tiered import FirstLaunch, Tier, TieredKernel

X: Any = torch.zeros(1)


class Stand:
    """Stands for a kernel; fails where it is to."""

    density, table_bytes, repairs = 0.5, 7, 3
    reason: str | None = None

    def __init__(self, kind: str = "stand", error: Exception | None = None) -> None:
        self.kind, self.error, self.calls = kind, error, 0

    def __call__(
        self, q: Any, k: Any, v: Any, *, scale: float | None = None, padding: Any = None
    ) -> Any:
        self.calls += 1
        if self.error is not None:
            raise self.error
        return q


class Late(Tier):
    """Is ready, or fails, when the test says so."""

    outcome: Stand | str | None = None

    def make(self) -> Stand | None:
        if isinstance(self.outcome, str):
            self.reason = self.outcome
            return None
        return self.outcome


def two(first: Stand, second: Stand) -> TieredKernel:
    return TieredKernel([Tier(lambda: first, "no such kernel: "), Tier(lambda: second)])


def test_a_kernel_that_does_not_compile_is_replaced_at_its_first_call() -> None:
    portable = Stand("portable")
    kernel = two(Stand("fast", RuntimeError("no such layout")), portable)
    assert kernel.kind == "fast"
    assert kernel.reason is None
    assert kernel(X, X, X) is X
    assert kernel.kind == "portable"
    assert kernel.reason == "no such kernel: RuntimeError: no such layout"
    assert (kernel.density, kernel.table_bytes, kernel.repairs) == (0.5, 7, 3)


def test_an_error_after_a_good_call_is_raised() -> None:
    served, portable = Stand(), Stand()
    kernel = two(served, portable)
    kernel(X, X, X)
    served.error = RuntimeError("illegal address")
    with pytest.raises(RuntimeError, match="illegal"):
        kernel(X, X, X)
    assert kernel.reason is None
    assert portable.calls == 0


@pytest.mark.parametrize("error", [KernelError("wrong operands"), torch.OutOfMemoryError("full")])
def test_what_is_not_about_the_kernel_is_raised(error: Exception) -> None:
    refused, portable = Stand("fast", error), Stand()
    kernel = two(refused, portable)
    with pytest.raises(type(error)):
        kernel(X, X, X)
    assert portable.calls == 0
    refused.error = None
    assert kernel(X, X, X) is X
    assert (kernel.kind, kernel.reason) == ("fast", None)


def test_the_last_kernel_raises_whatever_it_is() -> None:
    kernel = two(Stand(error=ValueError("a")), Stand(error=ValueError("b")))
    with pytest.raises(ValueError, match="b"):
        kernel(X, X, X)
    assert "ValueError: a" in str(kernel.reason)


def test_a_later_kernel_serves_until_a_better_one_is_ready() -> None:
    late, table = Late(), Stand("table")
    kernel = TieredKernel([late, Tier(lambda: table)], reason="asked for more")
    kernel(X, X, X)
    assert (kernel.kind, table.calls, kernel.wait()) == ("table", 1, False)
    late.outcome = Stand("baked")
    assert kernel.wait()
    kernel(X, X, X)
    assert (kernel.kind, table.calls) == ("baked", 1)
    assert kernel.reason == "asked for more"


def test_a_kernel_that_never_comes_leaves_its_reason() -> None:
    late, table = Late(), Stand("table")
    kernel = TieredKernel([late, Tier(lambda: table)], reason="asked for more")
    late.outcome = "ptxas said no"
    kernel(X, X, X)
    assert kernel.kind == "table"
    assert kernel.reason == "ptxas said no"


def test_within_one_another_each_looks_at_its_own_launches() -> None:
    """As a generated Hopper kernel, Hopper tables, and the portable ones behind both."""
    baked, tables, portable = Late(), Stand("tables"), Stand("portable")
    inner = TieredKernel([baked, Tier(lambda: tables)])
    kernel = TieredKernel([Tier(lambda: inner, "no Hopper kernel: "), Tier(lambda: portable)])
    kernel(X, X, X)
    baked.outcome = Stand("baked", RuntimeError("out of shared memory"))
    kernel(X, X, X)
    assert kernel.kind == "tables"
    assert kernel.reason == "RuntimeError: out of shared memory"
    tables.error = RuntimeError("illegal address")
    with pytest.raises(RuntimeError, match="illegal"):
        kernel(X, X, X)


def test_a_kernel_is_made_when_it_is_needed_and_gone_when_it_failed() -> None:
    made: list[weakref.ref[Stand]] = []

    def make(error: Exception | None = None) -> Stand:
        stand = Stand(error=error)
        made.append(weakref.ref(stand))
        return stand

    kernel = TieredKernel([Tier(lambda: make(RuntimeError("no"))), Tier(make)])
    assert len(made) == 1
    kernel(X, X, X)
    assert len(made) == 2
    assert kernel.kind == "stand"
    gc.collect()  # the error that it raised holds it
    assert made[0]() is None
    assert made[1]() is not None


def test_a_launch_that_failed_once_says_why() -> None:
    first = FirstLaunch("no Hopper kernel: ")
    assert first.attempt(lambda: 1 / 0) is None
    assert first.reason == "no Hopper kernel: ZeroDivisionError: division by zero"
