"""Which blocks are kept, at a density that is the same for all methods.

Shapes: L layers, H heads, R query blocks, C key blocks; masks are bool (L, H, R, C).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from calibatt_compiler.calibration.select.selection import agreement, covering_mask


def _bisect(density: float, masks: Callable[[float], Tensor], steps: int = 14) -> Tensor:
    """Return the mask of the threshold in (0, 1] whose density comes nearest to the wanted one."""
    low, high = 0.0, 1.0
    best, distance = None, float("inf")
    for _ in range(steps):
        middle = (low + high) / 2
        mask = masks(middle)
        found = float(mask.float().mean())
        if abs(found - density) < distance:
            best, distance = mask, abs(found - density)
        low, high = (middle, high) if found < density else (low, middle)
    assert best is not None
    return best


def covering(score: Tensor, density: float) -> Tensor:
    """Keep the smallest sets that cover one share of every row's score (the library's selection).

    The share is the same for all rows and makes the mean density come out as wanted.
    """
    return _bisect(density, lambda share: covering_mask(score, share)[0])


def agreed(energies: Tensor, density: float, rho: float = 0.5) -> Tensor:
    """Keep what at least `rho` of the inputs' own covering masks keep: the paper's method.

    Args:
        energies: (inputs, L, H, R, C).
        density: mean over all rows.
        rho: share of the inputs.
    """

    def masks(share: float) -> Tensor:
        votes = covering_mask(energies, share)[0].sum(0).flatten(0, 1)
        kept = agreement(votes.numpy().astype(np.int32), len(energies), rho)
        return torch.from_numpy(kept).unflatten(0, energies.shape[1:3])

    return _bisect(density, masks, 11)


def top(score: Tensor, counts: Tensor | int) -> Tensor:
    """Keep the `counts` highest-scored blocks of each row, int64 (L, H, R) or one number."""
    rank = score.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return rank < (counts if isinstance(counts, int) else counts.unsqueeze(-1))


def stratified(score: Tensor, candidates: Tensor, counts: Tensor, seed: int) -> Tensor:
    """Sample from each row's candidates, one at random from each of `counts` strata of like score.

    Args:
        score: float (L, H, R, C), orders the candidates into strata of equal size.
        candidates: bool, what to sample from.
        counts: int64 (L, H, R), at most the candidates.
        seed: of the sample.

    Returns:
        bool mask of the sample.
    """
    generator = torch.Generator().manual_seed(seed)
    ranked = score.masked_fill(~candidates, -1.0).argsort(dim=-1, descending=True, stable=True)
    rank = ranked.argsort(-1)
    size = candidates.sum(-1)
    step = size.double() / counts.clamp_min(1)
    stratum = ((rank.double() + 0.5) / step.unsqueeze(-1)).floor().long()
    noise = torch.rand(score.shape, generator=generator, dtype=torch.float64)
    noise = noise.masked_fill(~candidates, 2.0)
    # Within a stratum the lowest draw wins: sort by stratum, then by draw.
    order = (stratum.double() * 4 + noise).argsort(-1)
    sorted_stratum = stratum.gather(-1, order)
    first = torch.ones_like(candidates)
    first[..., 1:] = sorted_stratum[..., 1:] != sorted_stratum[..., :-1]
    first &= candidates.gather(-1, order) & (sorted_stratum < counts.unsqueeze(-1))
    return torch.zeros_like(candidates).scatter_(-1, order, first)


def proportional(score: Tensor, counts: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Sample systematically with probabilities in proportion to the score, capped at 1.

    Args:
        score: float (L, H, R, C), at least 0.
        counts: int64 (L, H, R).
        seed: of each row's random start.

    Returns:
        bool mask of exactly `counts` blocks a row, and the probabilities, float64.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = score.double().clamp_min(1e-12)
    sure = torch.zeros_like(score, dtype=torch.bool)
    wanted = counts.double().unsqueeze(-1)
    for _ in range(score.shape[-1]):
        free = weight.masked_fill(sure, 0)
        p = (
            free
            * (wanted - sure.sum(-1, keepdim=True))
            / free.sum(-1, keepdim=True).clamp_min(1e-30)
        )
        over = (p >= 1) & ~sure
        if not bool(over.any()):
            break
        sure |= over
    p = torch.where(sure, 1.0, p)
    start = torch.rand(counts.shape, generator=generator, dtype=torch.float64).unsqueeze(-1)
    upper = p.cumsum(-1) + start
    return upper.floor() > (upper - p).floor(), p
