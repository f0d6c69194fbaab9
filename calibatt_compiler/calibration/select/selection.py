"""From energies to masks: the smallest covering set, and the agreement of several inputs.

Energies are turned into whole numbers first (`UNITS` to a row). Sums of whole numbers do not
depend on the order of addition, so CPU and GPU select the same blocks, and ties are exact.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calibatt_compiler.plan.text import TextPosition, text_blocks

UNITS = 1 << 32
"""Whole units that an energy of 1 is counted in."""

_FORCED = 1 << 40
"""Added to the units of a block that must be kept, so that it sorts before all others."""


def to_units(energy: Tensor) -> Tensor:
    """Round energies to whole units, int64 of the same shape; the energies must be finite."""
    return (energy.double() * UNITS).round_().to(torch.int64)


def covering_mask(
    energy: Tensor, threshold: float, always: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Keep in each row the fewest key blocks that hold `threshold` of its energy.

    Of blocks with equal energy the one with the lower index is kept. At least one block is kept.

    Args:
        energy: float (..., key_blocks), finite, at least 0; rows need not sum to 1 exactly.
        threshold: share of a row's sum to keep, in (0, 1].
        always: bool (key_blocks,): blocks kept in any case, as the text of joint attention is;
            what they hold counts.

    Returns:
        bool mask like `energy`, and the share of its energy that each row keeps, float64 (...).
    """
    units = to_units(energy)
    total = units.sum(-1)
    order_by = units if always is None else units + always.to(torch.int64) * _FORCED
    order = order_by.argsort(dim=-1, descending=True, stable=True)
    ranked = units.gather(-1, order)
    before = ranked.cumsum(-1) - ranked
    # A float64 holds the total exactly, so the target is the same number on every device.
    target = (total.double() * threshold).ceil().to(torch.int64).unsqueeze(-1)
    keep = before < target
    keep[..., 0] = True
    if always is not None:
        keep[..., : int(always.sum())] = True
    mask = torch.zeros_like(keep).scatter_(-1, order, keep)
    kept = torch.where(keep, ranked, 0).sum(-1).double() / total.clamp_min(1).double()
    return mask, kept


def select(
    energy: Tensor,
    threshold: float,
    *,
    lengths: tuple[int, int],
    video: int,
    block: tuple[int, int],
    text: TextPosition | None,
) -> tuple[Tensor, Tensor]:
    """Select the blocks of one call; blocks with text stay dense, as queries and as keys.

    Args:
        energy: float (votes, heads, query_blocks, key_blocks), finite.
        threshold: share of attention mass to keep.
        lengths: tokens on the query and the key side.
        video: video tokens in its sequences.
        block: tokens a query block, tokens a key block.
        text: where text stands.

    Returns:
        bool mask like `energy`, and the mass kept, float64 (votes, heads, query_blocks).
    """
    keys = text_blocks(lengths[1], video, block[1], text)
    rows = text_blocks(lengths[0], video, block[0], text)
    mask, kept = covering_mask(energy, threshold, None if keys is None else keys.to(energy.device))
    if rows is not None:
        rows = rows.to(energy.device)
        mask = mask | rows[:, None]
        kept = torch.where(rows, 1.0, kept)
    return mask, kept


def best_share(energy: Tensor, fraction: float = 0.2) -> Tensor:
    """Return the share of each row's energy that its best `fraction` of key blocks holds.

    Equal energies give `fraction`: a partly counted block makes up for rounding.

    Args:
        energy: float (..., key_blocks), finite.
        fraction: share of the key blocks, in (0, 1].

    Returns:
        float64 (...).
    """
    units = to_units(energy)
    ranked = units.sort(dim=-1, descending=True).values
    exact = fraction * energy.shape[-1]
    whole = math.floor(exact)
    best = ranked[..., :whole].sum(-1).double()
    if whole < energy.shape[-1]:
        best = best + ranked[..., whole].double() * (exact - whole)
    return best / units.sum(-1).clamp_min(1).double()


def pack(mask: Tensor) -> npt.NDArray[np.uint8]:
    """Pack bool (..., key_blocks) into uint8 (..., ceil(key_blocks / 8)), on its own device first.

    Little-endian bit order, that of `BlockPattern.bits`.
    """
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % 8))
    weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=mask.device)
    grouped = padded.reshape(*padded.shape[:-1], -1, 8) * weights
    bits: npt.NDArray[np.uint8] = grouped.sum(-1, dtype=torch.uint8).cpu().numpy()
    return bits


def count_votes(counts: npt.NDArray[np.int32], bits: npt.NDArray[np.uint8]) -> None:
    """Add the masks of one input to `counts`, in place.

    Args:
        counts: int32 (heads, query_blocks, key_blocks).
        bits: uint8 (votes, heads, query_blocks, ceil(key_blocks / 8)).
    """
    for vote in bits:
        counts += np.unpackbits(vote, axis=-1, count=counts.shape[-1], bitorder="little")


def agreement(counts: npt.NDArray[np.int32], votes: int, rho: float) -> npt.NDArray[np.bool_]:
    """Keep a block where at least `rho` of the votes keep it.

    A query block left with none keeps its most-agreed block, the one of lowest index on ties.

    Args:
        counts: int32 (heads, query_blocks, key_blocks), votes for each block.
        votes: how many were cast.
        rho: share of them that a block needs.
    """
    kept = counts / votes >= rho
    fallback = counts.argmax(-1)[..., None]
    empty = ~kept.any(-1, keepdims=True)
    np.put_along_axis(kept, fallback, np.take_along_axis(kept, fallback, -1) | empty, -1)
    return kept
