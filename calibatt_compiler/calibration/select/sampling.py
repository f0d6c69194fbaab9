"""A sample of the blocks in the place of the highest ones, weighted so that sums stay unbiased.

Keeping the blocks of most energy and renormalising leaves out the broad tail of attention, which
is a bias. Here block `c` of a row is kept with probability p_c and then counts 1 / p_c times: over
samples, the sums of the softmax are those of all blocks. p_c is in proportion to a power of its
mean energy and 1 where that would pass 1, so the blocks that matter are still kept for certain.
The sample is systematic: it is spread evenly over the row (Madow, Ann. Math. Stat. 20, 1949).

Each step draws its own sample, as far from those of the steps before as it can be. A video is a sum
over steps: errors of different samples cancel in it, those of one sample add up. Keeping the same
blocks as long as their chances allow cost 5 dB (`docs/decisions/0007`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from calibatt_compiler.plan.weights import MAX_WEIGHT

FROM_ROW_TO_ROW, FROM_STEP_TO_STEP = 0.6180339887498949, 0.7548776662466927
"""Rows and steps start their samples at multiples of these, modulo 1: evenly spread, and always the
same. The inverse golden ratio and the inverse plastic number."""

WEIGHTS_AN_OCTAVE = 2
"""Weights are rounded to powers of two with this denominator: that halves what they take in a plan
and changes no video by more than 0.7 dB, up or down (`docs/decisions/0007`)."""

LOWEST = 1e-9
"""Energy that a block is taken to have at least, so that each has a chance."""


def sample(
    energy: Tensor, counts: Tensor, power: float, always: Tensor | None = None, *, step: int = 0
) -> tuple[Tensor, Tensor]:
    """Sample blocks and weigh them.

    Args:
        energy: float (heads, query_blocks, key_blocks), mean over the inputs, at least 0.
        counts: int64 (heads, query_blocks), how many blocks each row keeps.
        power: of the energy that probabilities are in proportion to.
        always: bool (key_blocks,), blocks kept for certain, as those of text are.
        step: the diffusion step; others draw others.

    Returns:
        bool mask of exactly `counts` blocks a row, and the weights, float64, both like `energy`.
    """
    counts = counts.cpu()
    score = energy.detach().cpu().double().clamp_min(LOWEST) ** power
    p = inclusion(score, counts, None if always is None else always.cpu())
    row = torch.arange(1, counts.numel() + 1, dtype=torch.float64).view(counts.shape)
    return draw(p, row * FROM_ROW_TO_ROW + step * FROM_STEP_TO_STEP), rounded(1 / p)


def draw(p: Tensor, start: Tensor) -> Tensor:
    """Keep blocks with given probabilities, spread evenly over each row.

    Args:
        p: float64 (heads, query_blocks, key_blocks), rows of which sum to whole numbers.
        start: float64 (heads, query_blocks), where the samples start, modulo 1.

    Returns:
        bool mask like `p`, of as many blocks a row as the sum says.
    """
    # Never at 0 or 1 itself, where rounding could keep one block more or less than asked for.
    first = start.frac().clamp(1e-6, 1 - 1e-6).unsqueeze(-1)
    upper = p.cumsum(-1) + first
    return (upper.floor() > (upper - p).floor()) | (p == 1)


def rounded(weight: Tensor) -> Tensor:
    """Round weights, from 1 to `MAX_WEIGHT`, as `WEIGHTS_AN_OCTAVE` says."""
    steps = (weight.log2() * WEIGHTS_AN_OCTAVE).round() / WEIGHTS_AN_OCTAVE
    highest = math.floor(math.log2(MAX_WEIGHT) * WEIGHTS_AN_OCTAVE) / WEIGHTS_AN_OCTAVE
    return 2.0 ** steps.clamp_max(highest)


def inclusion(score: Tensor, counts: Tensor, always: Tensor | None = None) -> Tensor:
    """Return probabilities in proportion to `score`, at most 1, that sum to `counts` in each row.

    Those of blocks that could come are at least 1 / `MAX_WEIGHT`, or hardly below.

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
    # No weight is above the highest. What that adds to low chances the others of the row lose.
    least = 1 / MAX_WEIGHT
    open_ = (rank >= certain) & (certain < wanted)
    low = open_ & (share < least)
    rest_of = wanted - certain - least * low.sum(-1, keepdim=True)
    share = share * rest_of / (share * (open_ & ~low)).sum(-1, keepdim=True).clamp_min(least)
    p = torch.where(rank < certain, 1.0, torch.where(low, least, share * open_).clamp_max(1.0))
    return torch.empty_like(p).scatter_(-1, order, p)
