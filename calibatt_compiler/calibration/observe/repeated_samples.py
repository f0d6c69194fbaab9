"""How often a call holds the same noise: batched guidance shows each sample once a branch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_SAME = 1e-3
"""Relative distance below which two parts of a batch are the same noise."""


@dataclass(frozen=True)
class CallSamples:
    """What the noisy input of a model's call says of its batch.

    Attributes:
        batch: samples in it.
        copies: how many equal parts, one behind the other, the batch is made of; 1 if its samples
            differ.
    """

    batch: int
    copies: int

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> CallSamples | None:
        """Read a call's arguments; None if no noise is found among them.

        The noise is `hidden_states`, else the first tensor of three or more dimensions; or a list
        of tensors, one a sample.
        """
        for value in _candidates(args, kwargs):
            if isinstance(value, Tensor) and value.dim() >= 3 and value.is_floating_point():
                return cls(len(value), _copies(value))
            if _is_list(value):
                return cls(len(value), _copies(value))
        return None


def _candidates(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    if "hidden_states" in kwargs:
        yield kwargs["hidden_states"]
    yield from args
    yield from kwargs.values()


def _is_list(value: object) -> bool:
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(x, Tensor) and x.dim() >= 3 for x in value)
    )


def _copies(samples: Tensor | Sequence[Tensor]) -> int:
    batch = len(samples)
    for copies in range(batch, 1, -1):
        part, rest = divmod(batch, copies)
        if not rest and all(_same(samples[i], samples[i % part]) for i in range(part, batch)):
            return copies
    return 1


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    a, b = a.detach().float(), b.detach().float()
    # Not bit by bit: a scaled copy may be rounded differently at the end of a vector.
    return bool(torch.linalg.vector_norm(a - b) <= _SAME * torch.linalg.vector_norm(b))
