"""Attention by octave zones on a CPU: each step's runs are drawn once and kept, by phase."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calibatt_compiler.kernels.common.operands import check_operands
from calibatt_compiler.kernels.common.padding import KeyPadding
from calibatt_compiler.kernels.common.zone_step import ZoneStep
from calibatt_compiler.kernels.cpu.attention import Tables, attend, check_compiled_for, library
from calibatt_compiler.plan.zones import ZonePattern
from calibatt_compiler.plan.zones.drawing import phase


class CpuZones:
    """Block-sparse attention by zones; see `ZoneKernel`. Half types are computed in float32.

    Attributes:
        kind: "native-cpu-zones".
        pattern: the zones.
        density: expected density over steps.
        reason: None.
        table_bytes: of the steps drawn so far.

    Raises:
        KernelError: there is no C++ compiler, or it fails.
    """

    kind = "native-cpu-zones"
    reason: str | None = None
    repairs = 0

    def __init__(self, zones: ZonePattern, *, dtype: torch.dtype, head_dim: int) -> None:
        self.pattern = zones
        self.density = zones.density
        self._library = library(dtype, head_dim)
        self._specialisation = (dtype, head_dim)
        # One for each phase at most: 128.
        self._drawn: dict[int, Tables] = {}
        self.table_bytes = 0

    def at(self, step: int) -> CpuZoneStep:
        """The kernel at a step, as call sites hold kernels."""
        return CpuZoneStep(self, step)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        step: int,
        scale: float | None = None,
        tokens: tuple[Tensor | None, Tensor | None] = (None, None),
        padding: KeyPadding | None = None,
    ) -> Tensor:
        """Attend what the zones keep at a step.

        Args:
            q: (B, H, Sq, D) on the CPU, any strides.
            k: (B, H, Sk, D).
            v: (B, H, Sk, D).
            step: the diffusion step.
            scale: factor on the scores; default 1 / sqrt(D).
            tokens: int32 (Sq) and (Sk), the query and the key that stand at each position of the
                pattern; None: in the pattern's own order.
            padding: what a mask says of the keys at their positions; None: there is none.

        Returns:
            (B, H, Sq, D), laid out as contiguous (B, Sq, H, D).

        Raises:
            KernelError: the operands don't fit the pattern, one another or this kernel.
        """
        zones = self.pattern
        check_operands(zones, q, k, v, padding)
        check_compiled_for(q, self._specialisation)
        block = (zones.block_m, zones.block_n)
        call = (self._library, (q, k, v), block, scale, tokens, self._tables(step))
        return attend(*call, padding=padding)

    def _tables(self, step: int) -> Tables:
        key = phase(step)
        found = self._drawn.get(key)
        if found is None:
            found = self._drawn[key] = _draw(self.pattern, step)
            self.table_bytes += sum(x.nbytes for x in found if x is not None)
        return found


@dataclass(frozen=True)
class CpuZoneStep(ZoneStep):
    """A step of `CpuZones`, which reads tokens in another order without a copy, too."""

    kernel: Any

    def reordered(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        query_tokens: Tensor,
        key_tokens: Tensor,
        *,
        scale: float | None = None,
        padding: KeyPadding | None = None,
    ) -> Tensor:
        """Attend tokens in the pattern's order; see `ReorderingKernel`."""
        tokens = (query_tokens, key_tokens)
        found: Tensor = self.kernel(
            q, k, v, step=self.step, scale=scale, tokens=tokens, padding=padding
        )
        return found


def _draw(zones: ZonePattern, step: int) -> Tables:
    """The tables of a step: rows by falling work, then their runs."""
    runs = zones.draw_runs(step)
    starts = np.arange(zones.query_blocks) * zones.block_m
    tokens = (zones.query_length - starts).clip(0, zones.block_m)
    work = runs.kept().reshape(zones.heads, -1) * tokens
    order = np.argsort(-work.ravel(), kind="stable").astype(np.int32)
    ends = runs.firsts + ((runs.counts - 1) << runs.octaves.astype(np.int32)) + 1
    return order, runs.offsets.astype(np.int32), runs.firsts, ends, None, runs.octaves
