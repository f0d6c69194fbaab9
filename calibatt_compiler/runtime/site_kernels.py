"""How the kernels of one site are made."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import cast

import torch

from calibatt_compiler.kernels.attention import make_attention
from calibatt_compiler.kernels.hopper.capability import dense_is_faster
from calibatt_compiler.kernels.protocol import AttentionKernel
from calibatt_compiler.options import Lowering, Softmax
from calibatt_compiler.plan import Plan
from calibatt_compiler.plan.pattern import BlockPattern
from calibatt_compiler.plan.text import fit_pattern


@dataclass
class SiteKernels:
    """Makes the kernels of one site, and remembers what those that are gone have counted.

    Apart from the site, which holds the store that holds this: with a cycle, tables of a model that
    is gone would stay until Python looks for cycles.

    Attributes:
        plan: the plan.
        name: of the site.
        lowering: as in `CompileOptions`.
        device: of the operands.
        dtype: of the operands.
        head_dim: of the operands.
        hopper: as in `CompileOptions`.
        softmax: as in `CompileOptions`.
        repaired: calls that kernels which are gone had to compute again.
    """

    plan: Plan
    name: str
    lowering: Lowering
    device: torch.device
    dtype: torch.dtype
    head_dim: int
    hopper: bool = True
    softmax: Softmax = "auto"
    repaired: int = 0

    def __post_init__(self) -> None:
        site = self.plan.sites[self.name]
        full = {
            index
            for step, index in enumerate(site.steps)
            if site.density_at(step) == 1.0 and not site.repetitive_at(step)
        }
        # One whose copied rows save no block still copies them: the plan says what is computed, not
        # its blocks.
        self._full = set() if self.lowering == "reference" or site.weighted else full
        own = (
            bool(self._full)
            and self.hopper
            and dense_is_faster(
                self.device, self.dtype, self.head_dim, site.patterns[min(self._full)]
            )
        )
        self._dense = set() if own else self._full

    def is_full(self, index: int) -> bool:
        """Whether a pattern is dense attention, for which the order of tokens does not matter."""
        return index in self._full

    def is_dense(self, index: int) -> bool:
        """Whether stock dense attention serves a pattern at the plan's own lengths.

        It serves those that keep everything, unless the Hopper kernel does so faster.
        """
        return index in self._dense

    def pattern(self, index: int, lengths: Hashable) -> BlockPattern:
        """Return a pattern, completed for `lengths` as in `make`."""
        site = self.plan.sites[self.name]
        if lengths is None:
            return site.patterns[index]
        to = cast("tuple[int, int]", lengths)
        if site.zones is not None:
            return site.zones.fitted(index, to)
        pattern, position = site.patterns[index], self.plan.text_position
        assert position is not None
        return fit_pattern(pattern, to, video=math.prod(self.plan.grid), position=position)

    def make(self, index: int, lengths: Hashable) -> AttentionKernel | None:
        """Return the kernel of a pattern; None: stock dense attention serves it.

        Args:
            index: of the pattern.
            lengths: tokens on the query and key side, where the text is of another length than the
                plan's and the pattern is to be completed; else None.

        Raises:
            KernelError: there is no kernel for this device, dtype and head dim.
        """
        if lengths is None and self.is_dense(index):
            return None
        pattern = self.pattern(index, lengths)
        lowering = self.lowering
        if lengths is not None:
            # Text lengths come and go with prompts: not worth a generated kernel for each.
            lowering = "reference" if lowering == "reference" else "table"
            full = pattern.density == 1.0 and pattern.repetitive is None
            if full and lowering != "reference":
                return None
        elif self.is_full(index):
            lowering = "table"  # there are no indices worth a kernel of its own
        return make_attention(
            pattern,
            lowering=lowering,
            device=self.device,
            dtype=self.dtype,
            head_dim=self.head_dim,
            hopper=self.hopper,
            softmax=self.softmax,
        )

    def retire(self, kernel: AttentionKernel) -> None:
        """Keep what a kernel has counted."""
        self.repaired += getattr(kernel, "repairs", 0)
