"""Tokens brought into a plan's order around a site, and back."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from calibatt_compiler.plan.order import TokenOrder


class Rearrangement:
    """Lays the tokens of queries, keys and values out in another order.

    Attributes:
        tokens: int32 (length), the model's index of the token at each position.
        positions: int32 (length), the position of each of the model's tokens.
    """

    def __init__(self, tokens: np.ndarray[tuple[int], np.dtype[np.int64]], device: torch.device):
        self.tokens = torch.from_numpy(tokens.astype(np.int32)).to(device)
        self.positions = torch.from_numpy(np.argsort(tokens).astype(np.int32)).to(device)

    def apply(self, x: Tensor) -> Tensor:
        """Return x (B, H, S, D) in this order, laid out as contiguous (B, S, H, D)."""
        return x.transpose(1, 2).index_select(1, self.tokens).transpose(1, 2)

    def undo(self, x: Tensor) -> Tensor:
        """Return x (B, H, S, D) in the model's order, laid out as contiguous (B, S, H, D)."""
        return x.transpose(1, 2).index_select(1, self.positions).transpose(1, 2)


@functools.lru_cache(maxsize=64)
def rearrangement(
    order: TokenOrder,
    grid: tuple[int, int, int],
    length: int,
    *,
    text_first: bool,
    device: torch.device,
) -> Rearrangement | None:
    """Return how to lay out sequences of a length, or None if they are as they should be.

    Args:
        order: of the grid's tokens.
        grid: tokens (frames, height, width).
        length: tokens of a sequence, text included; text stays where it is.
        text_first: whether text stands before the video.
        device: of the operands.
    """
    first = length - math.prod(grid) if text_first else 0
    tokens = order.tokens(grid, length=length, first=first)
    return None if tokens is None else Rearrangement(tokens, device)
