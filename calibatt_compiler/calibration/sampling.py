"""A sample of the blocks in the place of the highest ones, weighted so that sums stay unbiased.

Keeping the blocks of most energy and renormalising leaves out the broad tail of attention, which
is a bias. Here block `c` of a row is kept with probability p_c and then counts 1 / p_c times: over
samples, the sums of the softmax are those of all blocks. p_c is in proportion to a power of its
mean energy and 1 where that would pass 1, so the blocks that matter are still kept for certain.
The sample is systematic: it is spread evenly over the row (Madow, Ann. Math. Stat. 20, 1949).
"""

from __future__ import annotations

import torch
from torch import Tensor

from calibatt_compiler.plan.weights import MAX_WEIGHT

GOLDEN = 0.6180339887498949
"""Rows start their samples at multiples of this, modulo 1: evenly spread, and always the same."""

LOWEST = 1e-9
"""Energy that a block is taken to have at least, so that each has a chance."""


def sample(
    energy: Tensor, counts: Tensor, power: float, always: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sample blocks and weigh them.

    Args:
        energy: float (heads, query_blocks, key_blocks), mean over the inputs, at least 0.
        counts: int64 (heads, query_blocks), how many blocks each row keeps.
        power: of the energy that probabilities are in proportion to.
        always: bool (key_blocks,), blocks kept for certain, as those of text are.

    Returns:
        bool mask of exactly `counts` blocks a row, and the weights, float64, both like `energy`.
    """
    score = energy.detach().cpu().double().clamp_min(LOWEST) ** power
    p = inclusion(score, counts.cpu(), None if always is None else always.cpu())
    row = torch.arange(1, counts.numel() + 1, dtype=torch.float64).view(*counts.shape, 1)
    # Never at 0 or 1 itself, where rounding could keep one block more or less than asked for.
    start = (row * GOLDEN).frac().clamp(1e-6, 1 - 1e-6)
    upper = p.cumsum(-1) + start
    mask = upper.floor() > (upper - p).floor()
    return mask | (p == 1), (1 / p).clamp_max(MAX_WEIGHT)


def inclusion(score: Tensor, counts: Tensor, always: Tensor | None = None) -> Tensor:
    """Return probabilities in proportion to `score`, at most 1, that sum to `counts` in each row.

    Args:
        score: float64 (heads, query_blocks, key_blocks), positive.
        counts: int64 (heads, query_blocks), 1 to key_blocks, and at least as many as `always`.
        always: bool (key_blocks,), blocks whose probability is 1.
    """
    first = torch.zeros(score.shape[-1], dtype=torch.bool) if always is None else always
    order = (score + first * (1 + score.amax())).argsort(dim=-1, descending=True, stable=True)
    ranked = score.gather(-1, order)
    rest = ranked.flip(-1).cumsum(-1).flip(-1)  # sum of this and all lower scores
    wanted = counts.unsqueeze(-1)
    rank = torch.arange(score.shape[-1])
    # With the blocks before it certain, does this one still get less than 1?
    open_from = (ranked * (wanted - rank) < rest) & (rank >= first.sum()) & (rank < wanted)
    certain = torch.where(open_from.any(-1), open_from.int().argmax(-1), counts).unsqueeze(-1)
    certain = certain.where(wanted < score.shape[-1], wanted)
    left = rest.gather(-1, certain.clamp_max(score.shape[-1] - 1))
    share = ranked * (wanted - certain) / left
    p = torch.where(rank < certain, 1.0, share.clamp(1 / MAX_WEIGHT, 1.0))
    return torch.empty_like(p).scatter_(-1, order, p)
