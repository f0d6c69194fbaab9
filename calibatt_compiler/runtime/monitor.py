"""Monitors whether the plan still fits: a few queries are attended densely, and compared."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from calibatt_compiler.kernels.common.padding import KeyPadding
from calibatt_compiler.plan.pattern import BlockPattern
from calibatt_compiler.runtime.token_order import Rearrangement

QUERIES = 16
"""Queries of a block that are looked at: their scores are `QUERIES / Sq` of dense attention's."""

CHUNK = 1 << 24
"""Most numbers of keys or scores held at a time, in float32."""

GOLDEN = (math.sqrt(5) - 1) / 2
"""Its multiples modulo 1 lie evenly in [0, 1), and in step with no number of diffusion steps."""


class KeptMassMonitor:
    """Measures which share of attention mass the kept blocks hold in calls that are served.

    One in `every` calls is sampled, on average: call n if the fractional part of n times the
    golden ratio, shifted by a number of the site's own, is below 1 / every. Of the m-th sampled
    call one query block is looked at, chosen so too, in all heads. No random numbers are drawn,
    and a GPU is not waited for.

    Args:
        site: its name.
        every: calls for one that is sampled.

    Attributes:
        samples: sampled calls by diffusion step.
    """

    def __init__(self, site: str, every: int) -> None:
        self.samples: Counter[int] = Counter()
        self._every = every
        self._phase = zlib.crc32(site.encode()) / 2**32
        self._calls = 0
        self._sums: dict[int, Tensor] = {}

    def due(self) -> bool:
        """Count a call; return whether it is to be sampled."""
        self._calls += 1
        return (self._calls * GOLDEN + self._phase) % 1 < 1 / self._every

    def sample(
        self,
        step: int,
        pattern: Callable[[], BlockPattern],
        q: Tensor,
        k: Tensor,
        scale: float,
        orders: tuple[Rearrangement | None, Rearrangement | None],
        padding: KeyPadding | None = None,
    ) -> None:
        """Look at one query block of a call.

        Args:
            step: the diffusion step.
            pattern: gives the pattern that serves the call.
            q: (B, H, Sq, D), in the model's order.
            k: (B, H, Sk, D).
            scale: factor on the scores.
            orders: of queries and of keys in the pattern.
            padding: what a mask says of the keys, in the model's order.
        """
        served = pattern()
        if served.repetitive is not None and served.repetitive.all():
            return
        count = self.samples.total() + 1
        row = int((count * GOLDEN + self._phase) % 1 * served.query_blocks)
        share = kept_mass(q, k, served, row, scale, orders, padding)
        self.samples[step] += 1
        self._sums[step] = share if step not in self._sums else self._sums[step] + share

    def kept(self) -> dict[int, float]:
        """Return the mean share of mass kept by diffusion step; waits for the GPU."""
        return {step: float(self._sums[step]) / n for step, n in sorted(self.samples.items())}


@torch.no_grad()
def kept_mass(
    q: Tensor,
    k: Tensor,
    pattern: BlockPattern,
    row: int,
    scale: float,
    orders: tuple[Rearrangement | None, Rearrangement | None] = (None, None),
    padding: KeyPadding | None = None,
) -> Tensor:
    """Return the share of attention mass in the kept blocks of one row of blocks.

    Args:
        q: (B, H, Sq, D), in the model's order.
        k: (B, H, Sk, D).
        pattern: which blocks are kept.
        row: the query block; at most `QUERIES` of its queries are looked at, evenly spread.
        scale: factor on the scores.
        orders: of queries and of keys in the pattern.
        padding: what a mask says of the keys, in the model's order; a row without keys loses none.

    Returns:
        float64 scalar on the operands' device: mean over samples, queries and heads that are not
        row-shared.
    """
    judged = np.ones(pattern.heads, np.bool_)
    if pattern.repetitive is not None:
        judged = ~pattern.repetitive  # the others drop no key: they copy rows
    first = row * pattern.block_m
    last = min(first + pattern.block_m, pattern.query_length) - 1
    queries = torch.linspace(first, last, min(QUERIES, last - first + 1)).round().long()
    queries = queries.to(q.device)
    if orders[0] is not None:
        queries = orders[0].tokens[queries].long()
    blocks = torch.from_numpy(pattern.row_mask(row))
    kept = blocks.repeat_interleave(pattern.block_n, -1)[:, : pattern.key_length].to(q.device)
    if orders[1] is not None:
        kept = kept[:, orders[1].positions.long()]
    few = q.index_select(2, queries)
    heads = max(1, CHUNK // (k.shape[0] * k.shape[2] * max(len(queries), k.shape[3])))
    total = q.new_zeros((), dtype=torch.float64)
    for start in range(0, q.shape[1], heads):
        part = slice(start, start + heads)
        scores = (few[:, part].float() @ k[:, part].float().mT).mul_(scale)
        if padding is not None:
            scores += padding.bias[:, None, None]
        shares = (scores.softmax(-1) * kept[part, None]).sum(-1).double()
        shares = shares.nan_to_num(1.0).mean((0, 2)) if padding is not None else shares.mean((0, 2))
        total += (shares * torch.from_numpy(judged[part]).to(q.device)).sum()
    return total / int(judged.sum())
