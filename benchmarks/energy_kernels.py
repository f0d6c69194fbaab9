"""Kernels that `energy.py` compares: dense attention of others, and what gives block energies."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from attention_cases import Size
from attention_kernels import DENSE as DENSE_ATTENTION
from attention_kernels import Operands, fa3_function
from torch import Tensor

from calibatt_compiler.kernels.energy import attention_with_energy, block_energy
from calibatt_compiler.kernels.portable.tiles import TileSettings, architecture, energy_settings
from calibatt_compiler.plan.pattern import BlockPattern


@dataclass(frozen=True)
class Measured:
    """What is timed.

    Attributes:
        run: one call; returns the output and the energies, None for what it does not compute.
        every: energies are the means over each query block's queries 0, `every`, ...
        partial: energies alone, to be added to some dense attention's time.
    """

    run: Callable[[], tuple[Tensor | None, Tensor | None]]
    every: int = 1
    partial: bool = False

    def timed(self) -> Tensor:
        """`run` as the timing wants it."""
        out, energy = self.run()
        found = energy if out is None else out
        assert found is not None
        return found


Maker = Callable[[Operands, Size], Measured]


def _dense(name: str) -> Maker:
    def make(operands: Operands, size: Size) -> Measured:
        pattern = BlockPattern.dense(1, size.tokens, size.tokens, size.block)
        contestant = DENSE_ATTENTION[name](pattern, operands)
        return Measured(lambda: (contestant.run(), None))

    return make


def _both(every: int = 1, **options: Any) -> Maker:
    def make(operands: Operands, size: Size) -> Measured:
        def run() -> tuple[Tensor, Tensor]:
            return attention_with_energy(*operands, block=size.block, queries=1 / every, **options)

        return Measured(run, every)

    return make


def _alone(every: int = 1, known: bool = True) -> Maker:
    def make(operands: Operands, size: Size) -> Measured:
        q, k, v = operands
        lse = _lse(q, k, v) if known else None

        def run() -> tuple[None, Tensor]:
            return None, block_energy(q, k, block=size.block, lse=lse, queries=1 / every)

        return Measured(run, every, partial=True)

    return make


def _lse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scale = 1 / math.sqrt(q.shape[-1])
    if not q.is_cuda:
        return torch.logsumexp(q @ k.mT * scale, -1)
    from calibatt_compiler.kernels.common.dense import dense_attention_and_lse

    lse = dense_attention_and_lse(q, k, v, scale)[1]
    if lse is None:
        raise RuntimeError("SDPA gives no log-sum-exp")
    return lse


def fa3_and_pass(operands: Operands, size: Size) -> Measured:
    """FlashAttention-3 with its log-sum-exp, and the pass for the energies."""
    function = fa3_function()
    q, k, _ = operands
    turned = [x.transpose(1, 2) for x in operands]

    def run() -> tuple[Tensor, Tensor]:
        out, lse, *_ = function(*turned, return_attn_probs=True)
        return out.transpose(1, 2), block_energy(q, k, block=size.block, lse=lse)

    return Measured(run)


def _swept(with_output: bool, **changes: int) -> Maker:
    def make(operands: Operands, size: Size) -> Measured:
        from calibatt_compiler.kernels.portable.energy_fused import triton_attention_and_energy
        from calibatt_compiler.kernels.portable.energy_scores import triton_energy

        q, k, v = operands
        own = energy_settings(
            size.block[1],
            arch=architecture(q.device),
            dtype=q.dtype,
            head_dim=size.head_dim,
            with_output=with_output,
        )
        settings: TileSettings = replace(own, **changes)
        scale = 1 / math.sqrt(size.head_dim)
        lse = None if with_output else _lse(q, k, v)

        def fused() -> tuple[Tensor, Tensor]:
            return triton_attention_and_energy(q, k, v, size.block, scale, settings=settings)

        def scores_only() -> tuple[None, Tensor]:
            return None, triton_energy(q, k, size.block, scale, lse, settings=settings)

        return Measured(fused if with_output else scores_only, partial=not with_output)

    return make


def hopper(operands: Operands, size: Size) -> Measured:
    """The Hopper kernel, output and energies."""
    from calibatt_compiler.kernels.hopper.energy import hopper_attention_and_energy

    scale = 1 / math.sqrt(size.head_dim)
    return Measured(lambda: hopper_attention_and_energy(*operands, size.block, scale))


def fused(operands: Operands, size: Size) -> Measured:
    """The portable kernel, output and energies."""
    from calibatt_compiler.kernels.portable.energy_fused import triton_attention_and_energy

    scale = 1 / math.sqrt(size.head_dim)
    return Measured(lambda: triton_attention_and_energy(*operands, size.block, scale))


DENSE = {name: _dense(name) for name in DENSE_ATTENTION}
ALL: dict[str, Maker] = {
    **DENSE,
    "hopper": hopper,
    "fused": fused,
    "SDPA and pass": _both(fused=False),
    "SDPA and pass 1/4": _both(every=4, fused=False),
    "fa3 and pass": fa3_and_pass,
    "energies alone": _alone(),
    "energies alone 1/4": _alone(every=4),
    "two passes": _alone(known=False),
    "cpu": _both(),
}
_TILES = ((128, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 4, 2), (128, 128, 8, 2),
          (128, 128, 8, 3), (64, 128, 4, 2), (64, 64, 4, 3))  # fmt: skip
SWEEP: dict[str, Maker] = {
    f"{kind} {m}x{n}, {warps} warps, {stages}": _swept(
        kind == "fused", m=m, n=n, warps=warps, stages=stages
    )
    for kind in ("fused", "pass")
    for m, n, warps, stages in _TILES
}
"""Other tiles than the chosen ones; some spill, or don't fit and are left out."""
