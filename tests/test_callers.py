"""Which modules are being called."""

from __future__ import annotations

from torch import nn

from calibatt_compiler.model.callers import module_calls


class Inner(nn.Module):
    def forward(self) -> list[nn.Module]:
        return [call.module for call in module_calls()]


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self) -> list[nn.Module]:
        return self.inner()

    def generate(self) -> list[nn.Module]:
        return self.inner()


def around(other: nn.Module, model: nn.Module) -> list[nn.Module]:
    return model() if other is not model else []


def test_modules_are_seen_from_the_innermost_on_and_those_only_handed_over_are_not() -> None:
    model, other = Outer(), Outer()
    assert around(other, model) == [model.inner, model]
    assert model.generate() == [model.inner, model]
