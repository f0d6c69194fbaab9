"""Weights of the blocks that stand for a dropped tail.

S is kept with weight 1, T (the sample) stands for itself and for D (what is dropped). Shapes are
(..., R, C) for masks and energies, (..., R, C, C) for Gram matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_rate(sample: Tensor, dropped: Tensor) -> Tensor:
    """Return (|T| + |D|) / |T| per row, (..., R, 1)."""
    return 1 + dropped.sum(-1, keepdim=True) / sample.sum(-1, keepdim=True).clamp_min(1)


def mass_ratio(have: Tensor, wanted: Tensor) -> Tensor:
    """Return the factor per row, (..., R, 1), that scales the masses `have` to those `wanted`.

    A row that has none gets 1.
    """
    sums = have.sum(-1, keepdim=True)
    ratio = wanted.sum(-1, keepdim=True) / sums.clamp_min(1e-12)
    return torch.where(sums > 0, ratio, 1.0)


def fitted(
    gram: Tensor, energy: Tensor, sample: Tensor, dropped: Tensor, *, by_head: bool = False
) -> Tensor:
    """Return the one weight of T with the least output error on the calibration inputs.

    With u = weight - 1 (x in T, -1 in D) the error of the unnormalised output is u' G u, and the
    row's mass becomes 1 + E' u; the weight minimises (a + 2 b x + c x^2) / (e + f x)^2, the ratio
    of the former to the square of the latter, which has one stationary point.

    Args:
        gram: see `record.Record`.
        energy: mean energies.
        sample: T.
        dropped: D.
        by_head: add the rows up first: one weight a head, (..., 1, 1), instead of (..., R, 1).
    """
    t, d = sample.float(), dropped.float()
    with_t = (gram @ t.unsqueeze(-1)).squeeze(-1)
    with_d = (gram @ d.unsqueeze(-1)).squeeze(-1)
    terms = torch.stack(
        [
            (with_d * d).sum(-1, keepdim=True),
            -(with_t * d).sum(-1, keepdim=True),
            (with_t * t).sum(-1, keepdim=True),
            1 - (energy * d).sum(-1, keepdim=True),
            (energy * t).sum(-1, keepdim=True),
        ]
    )
    if by_head:
        terms = terms.mean(-2, keepdim=True)
    a, b, c, e, f = terms
    below = c * e - f * b
    x = torch.where(below > 0, (f * a - b * e) / below.clamp_min(1e-20), 0.0)
    return (1 + x).clamp(0.01, 100.0)


def fitted_each(gram: Tensor, energy: Tensor, sample: Tensor, base: Tensor, ridge: float) -> Tensor:
    """Return a weight for every block of T, (..., R, C), fitted to the calibration inputs.

    Minimises u' G u + ridge * sum of G[c, c] (w[c] - base[c])^2 over the weights w of T (0
    elsewhere), u = w - 1, while the row keeps its calibrated mass: E' u = 0. Without that condition
    the fit shrinks all weights, since the error that counts is divided by the row's mass.

    Args:
        gram: see `record.Record`.
        energy: mean energies.
        sample: T.
        base: weights to stay near, (..., R, C).
        ridge: how near; 0 fits freely.
    """
    t = sample.float()
    start = t * base - 1
    diagonal = torch.where(sample, ridge * gram.diagonal(dim1=-2, dim2=-1) + 1e-9, 1.0)
    left = gram * t.unsqueeze(-1) * t.unsqueeze(-2) + torch.diag_embed(diagonal)
    pull = -(gram @ start.unsqueeze(-1)).squeeze(-1) * t
    right = torch.stack([pull, energy * t], -1)
    free, along = torch.linalg.solve(left.double(), right.double()).float().unbind(-1)
    missing = -(energy * (start + free * t)).sum(-1, keepdim=True)
    step = missing / (energy * along * t).sum(-1, keepdim=True).clamp_min(1e-12)
    return ((base + free + step * along) * t).clamp_min(0.0)
