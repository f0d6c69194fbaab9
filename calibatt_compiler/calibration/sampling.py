"""A sample of the blocks in the place of the highest ones, weighted so that sums stay unbiased.

Keeping the blocks of most energy and renormalising leaves out the broad tail of attention, which
is a bias. Here block `c` of a row is kept with probability p_c and then counts 1 / p_c times: over
samples, the sums of the softmax are those of all blocks. p_c is in proportion to a power of its
mean energy and 1 where that would pass 1, so the blocks that matter are still kept for certain.

Each block has a number of its own, the same at every step, and is kept where that is small for its
chance (Pareto sampling: Rosen, J. Stat. Plan. Inference 62, 1997; permanent numbers: Ohlsson,
Business Survey Methods ch. 9, 1995). So neighbouring steps, whose energies differ little, keep
nearly the same blocks, as the masks of the highest do: the plan is as small, and steps can share.
The numbers are evenly spread along a row, and from row to row, and so is what is kept: that lowers
the error of a layer below that of random numbers (`benchmarks/RESULTS.md`), for chances that are
met less exactly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from calibatt_compiler.plan.weights import MAX_WEIGHT

ALONG_ROW, FROM_ROW_TO_ROW = 0.6180339887498949, 0.7548776662466927
"""Multiples of the inverse golden ratio, and of the inverse plastic number: of all numbers they
stay furthest from a period, such as that of the frames of a video would be."""

WEIGHTS_AN_OCTAVE = 2
"""Weights are rounded to powers of two with this denominator. That adds less than 1 % to the error
of a layer, and makes a plan half as large (`benchmarks/RESULTS.md`)."""

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
    counts = counts.cpu()
    score = energy.detach().cpu().double().clamp_min(LOWEST) ** power
    p = inclusion(score, counts, None if always is None else always.cpu())
    return draw(p, counts, numbers(p.shape)), rounded(1 / p)


def numbers(shape: torch.Size) -> Tensor:
    """The number of each block, float64 between 0 and 1, (heads, query_blocks, key_blocks)."""
    heads, rows, columns = shape
    row = torch.arange(heads * rows, dtype=torch.float64).view(heads, rows, 1)
    column = torch.arange(columns, dtype=torch.float64)
    found = (row * FROM_ROW_TO_ROW + (column + 1) * ALONG_ROW).frac()
    return found.clamp(1e-9, 1 - 1e-9)


def draw(p: Tensor, counts: Tensor, number: Tensor) -> Tensor:
    """Keep the blocks whose numbers have the smallest odds for their chance.

    Args:
        p: float64 (heads, query_blocks, key_blocks), from `inclusion`.
        counts: int64 (heads, query_blocks), the sum of each row.
        number: like `p`, between 0 and 1, evenly distributed.

    Returns:
        bool mask like `p`, of exactly `counts` blocks a row; those with p = 1 are among them.
    """
    odds = number * (1 - p) / (p * (1 - number))
    order = odds.argsort(dim=-1, stable=True)
    first = torch.arange(p.shape[-1]) < counts.unsqueeze(-1)
    return torch.empty_like(first).scatter_(-1, order, first)


def rounded(weight: Tensor) -> Tensor:
    """Round weights, from 1 to `MAX_WEIGHT`, as `WEIGHTS_AN_OCTAVE` says."""
    steps = (weight.log2() * WEIGHTS_AN_OCTAVE).round() / WEIGHTS_AN_OCTAVE
    highest = math.floor(math.log2(MAX_WEIGHT) * WEIGHTS_AN_OCTAVE) / WEIGHTS_AN_OCTAVE
    return 2.0 ** steps.clamp_max(highest)


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
