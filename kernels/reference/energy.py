"""Block energies by definition, in float64: tests' oracle."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def reference_energy(
    q: Tensor, k: Tensor, *, block: tuple[int, int] = (128, 128), scale: float | None = None
) -> Tensor:
    """Return block energies from a full attention matrix.

    Args:
        q: (B, H, Sq, D).
        k: (B, H, Sk, D).
        block: tokens a query block, tokens a key block.
        scale: factor on the scores; default 1 / sqrt(D).

    Returns:
        float64 (B, H, query_blocks, key_blocks), on the CPU.
    """
    q, k = q.double().cpu(), k.double().cpu()
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    p = torch.softmax(q @ k.mT * scale, -1)
    rows = [part.mean(2) for part in torch.split(p, block[0], 2)]
    columns = [part.sum(-1) for part in torch.split(torch.stack(rows, 2), block[1], -1)]
    return torch.stack(columns, -1)
