"""Tokens brought into a plan's order around a site, and back."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calibatt_compiler.kernels.common.padding import KeyPadding
from calibatt_compiler.kernels.common.uploads import DeviceTableCache, Uploaded
from calibatt_compiler.kernels.protocol import AttentionKernel, ReorderingKernel
from calibatt_compiler.plan.order import TokenOrder


class Rearrangement:
    """Lays the tokens of queries, keys and values out in another order.

    Attributes:
        tokens: int32 (length), the model's index of the token at each position.
        positions: int32 (length), the position of each of the model's tokens.
        uploaded: behind their copies.
    """

    def __init__(self, tokens: np.ndarray[tuple[int], np.dtype[np.int64]], device: torch.device):
        self.tokens = torch.from_numpy(tokens.astype(np.int32)).to(device)
        self.positions = torch.from_numpy(np.argsort(tokens).astype(np.int32)).to(device)
        self.uploaded = Uploaded(device)

    def apply(self, x: Tensor) -> Tensor:
        """Return x (B, H, S, D) in this order, laid out as contiguous (B, S, H, D)."""
        return x.transpose(1, 2).index_select(1, self.tokens).transpose(1, 2)

    def undo(self, x: Tensor) -> Tensor:
        """Return x (B, H, S, D) in the model's order, laid out as contiguous (B, S, H, D)."""
        return x.transpose(1, 2).index_select(1, self.positions).transpose(1, 2)


_shared: DeviceTableCache[Rearrangement] = DeviceTableCache()


class Rearrangements:
    """Rearrangements for as long as this lives; equal ones of several such are the same."""

    def __init__(self) -> None:
        self._made: dict[tuple[object, ...], Rearrangement | None] = {}

    def of(
        self,
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
        return self.laid_out(order, grid, length, first, device)

    def laid_out(
        self,
        order: TokenOrder,
        grid: tuple[int, int, int],
        length: int,
        first: int,
        device: torch.device,
    ) -> Rearrangement | None:
        """Do as `of`, for a video that begins at place `first` of a sequence."""
        key = (order, grid, length, first, device)
        if key not in self._made:
            tokens = order.tokens(grid, length=length, first=first)
            self._made[key] = (
                None if tokens is None else _shared.get(key, lambda: Rearrangement(tokens, device))
            )
        return self._made[key]


def attend_in_order(
    kernel: AttentionKernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    orders: tuple[Rearrangement | None, Rearrangement | None],
    padding: KeyPadding | None = None,
) -> Tensor:
    """Call a kernel on tokens in its pattern's order; the output is in the model's.

    Args:
        kernel: one that can reads the operands in their order, others are given copies.
        q: (B, H, Sq, D) in the model's order.
        k: (B, H, Sk, D).
        v: (B, H, Sk, D).
        scale: factor on the scores.
        orders: of the queries, and of the keys and values.
        padding: what a mask says of the keys in the model's order; None: there is none.
    """
    of_queries, of_keys = orders
    if padding is not None and of_keys is not None:
        padding = padding.ordered(of_keys.tokens)
    more: dict[str, Any] = {"scale": scale} | ({} if padding is None else {"padding": padding})
    if of_queries is None and of_keys is None:
        return kernel(q, k, v, **more)
    if isinstance(kernel, ReorderingKernel) and of_queries is not None and of_keys is not None:
        return kernel.reordered(q, k, v, of_queries.tokens, of_keys.tokens, **more)
    q = q if of_queries is None else of_queries.apply(q)
    k, v = (x if of_keys is None else of_keys.apply(x) for x in (k, v))
    out = kernel(q, k, v, **more)
    return out if of_queries is None else of_queries.undo(out)
