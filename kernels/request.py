"""What is asked of an attention kernel: a pattern, and what it is to serve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import torch

from calibatt_compiler.options import Lowering
from calibatt_compiler.plan.pattern import BlockPattern
from calibatt_compiler.plan.stored import PatternOutline
from calibatt_compiler.plan.zones import ZonePattern

Softmax = Literal["auto", "exact", "fixed"]
"""See `CompileOptions`; `fixed` insists on a fixed softmax shift."""

Padded = Literal["", "tail", "any"]

Target = Literal["portable", "hopper"]
"""Whose kernels: the portable ones, or those for Hopper GPUs."""

AnyPattern = BlockPattern | PatternOutline | ZonePattern
"""A pattern, of blocks or of zones, or, to choose by, what is known of one that is not decoded."""

Form_co = TypeVar("Form_co", bound=AnyPattern, covariant=True)
Given = TypeVar("Given", bound=AnyPattern)


@dataclass(frozen=True, kw_only=True)
class KernelSettings:
    """What the kernels of one site have in common.

    Attributes:
        device: of the operands.
        dtype: of the operands.
        head_dim: channels a head.
        lowering: see `CompileOptions`.
        softmax: see `CompileOptions`; `fixed` insists on a fixed softmax shift.
        hopper: see `CompileOptions`.
        padded: calls have a mask over keys, `KeyPadding`: "tail" if it is expected to cut the last
            ones, for the text stands there; else "any". Both are served right whatever it cuts.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    lowering: Lowering = "baked"
    softmax: Softmax = "auto"
    hopper: bool = True
    padded: Padded = ""

    def request(
        self, pattern: Given, *, dense: bool = False, lasting: bool = True
    ) -> KernelRequest[Given]:
        """Return the request for a kernel of a pattern; arguments: see `KernelRequest`."""
        return KernelRequest(pattern, dense=dense, lasting=lasting, **vars(self))


@dataclass(frozen=True)
class KernelRequest(KernelSettings, Generic[Form_co]):
    """One kernel that is asked for.

    Attributes:
        pattern: which blocks are kept.
        dense: stock dense attention may serve a pattern that keeps every block.
        lasting: it is worth making a kernel for this pattern alone; False for those that come and
            go, such as with the lengths of prompts.
    """

    pattern: Form_co
    dense: bool = False
    lasting: bool = True
