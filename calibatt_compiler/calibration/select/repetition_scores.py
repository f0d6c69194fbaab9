"""What a call says of spatial repetition: how alike rows attend, and what copying them would cost.

Recorded of the scored inputs, beside their masks, for each sample and head:

- *similarity*: `kernels.row_similarity`, at most `FRAMES` frames of it;
- *copy error*: |O - O'|^2 / |O|^2 over the video tokens of the dense output O, with O' the output
  in which each row is that of its nearest anchor row (`plan.copies`);
- *sparse error*: |O - S|^2 / |O|^2 over the same tokens, with S the output of attention under the
  sample's own covering mask; only of heads whose similarity is at least `LEAST_GAMMA`, else 0;
- *dropped*: the share of attention mass that this mask drops, mean over query blocks.

Errors that rounding makes count as none.

Under another threshold the sparse error is taken to go with the power `GROWTH` of the dropped
share: 2 if all that is dropped pulled the output one way, 1 if each part pulled its own. Measured
on the heads of `examples/tiny_wan` that are alike enough (`benchmarks/repetition.py`), 1.75 tells
the error at thresholds from 0.7 to 0.95 from that at 0.84 or 0.9 within 5 % in the median, and
within a factor of 0.6 to 1.7 for nine heads in ten.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calibatt_compiler.calibration.config import LEAST_GAMMA
from calibatt_compiler.kernels.attention import attention_like
from calibatt_compiler.kernels.common.padding import KeyPadding
from calibatt_compiler.kernels.common.row_similarity import row_similarity
from calibatt_compiler.plan.copies import AnchorRows
from calibatt_compiler.plan.order import TokenOrder
from calibatt_compiler.plan.pattern import BlockPattern
from calibatt_compiler.plan.text import TextPosition
from calibatt_compiler.runtime.token_order import Rearrangement, attend_in_order

ARRAY = "repetition"
"""Suffix of the array's name in the run folder."""

DIGITS = 4
"""Significant digits that a plan goes by."""

GROWTH = 1.75
"""Power of the dropped share that the sparse error goes with."""

ELEMENTS = 1 << 26
"""Elements of queries in one group of heads whose sparse form is computed."""

_NOTHING = 1e-6
"""A dropped share below this is rounding: the error that goes with it says nothing."""

Scores = npt.NDArray[np.float32]
"""(4, votes, heads): similarity, copy error, sparse error, dropped share."""


@dataclass(frozen=True)
class AttentionCall:
    """One observed call, its samples that count.

    Attributes:
        q: (votes, heads, Sq, D), in the model's order.
        k: (votes, heads, Sk, D).
        v: (votes, heads, Sk, D).
        out: dense output, (votes, heads, Sq, D), in the model's order.
        scale: factor on the scores.
        orders: how queries and keys are brought into the order that masks are of.
        padding: what a mask says of the keys, in the model's order.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    scale: float
    orders: tuple[Rearrangement | None, Rearrangement | None]
    padding: KeyPadding | None = None

    def similarity(self, grid: tuple[int, int, int], first: int) -> Tensor:
        """Return `row_similarity` over the keys that take part."""
        if self.padding is None:
            return row_similarity(self.q, self.k, grid=grid, first=first, scale=self.scale)
        found = []
        for vote in range(len(self.q)):
            q, k = self.q[vote : vote + 1], self.k[vote : vote + 1]
            k = k[:, :, self.padding.sample(vote).valid[0]]
            found.append(row_similarity(q, k, grid=grid, first=first, scale=self.scale))
        return torch.cat(found)


def copies_rows(grid: tuple[int, int, int], anchor_rows: int) -> bool:
    """Whether a row-shared head of this grid copies any row."""
    return grid[1] > anchor_rows


def copies_of(
    grid: tuple[int, int, int],
    length: int,
    text: TextPosition | None,
    anchor_rows: int,
    order: str = "raster",
) -> AnchorRows | None:
    """Return what row-shared heads of a site copy; None if none can be.

    Args:
        grid: tokens (frames, height, width).
        length: queries of a call, text included.
        text: where that stands.
        anchor_rows: rows of each frame that are computed.
        order: how the grid's tokens are laid out.
    """
    beside = length - math.prod(grid)
    if not copies_rows(grid, anchor_rows) or (beside and text is None):
        return None
    return AnchorRows(grid, anchor_rows, beside if text == "first" else 0, TokenOrder.parse(order))


def measure(
    call: AttentionCall, mask: Tensor, kept: Tensor, copies: AnchorRows, block: tuple[int, int]
) -> Scores:
    """Return the scores of a call.

    Args:
        call: what was observed.
        mask: bool (votes, heads, query_blocks, key_blocks), the samples' own, in their order.
        kept: share of mass that its rows keep, (votes, heads, query_blocks).
        copies: of the rows, in the model's order.
        block: tokens a query block, tokens a key block.
    """
    alike = call.similarity(copies.grid, copies.first)
    tokens = slice(copies.first, copies.first + copies.video)
    length = call.q.shape[2]
    source = torch.from_numpy(copies.computed(length)[copies.sources(length)][tokens].copy())
    source = source.to(call.out.device)
    copied, skipped = torch.zeros_like(alike), torch.zeros_like(alike)
    for vote, head in itertools.product(*map(range, alike.shape)):
        out = call.out[vote, head]
        copied[vote, head] = _relative_error(out[tokens], out[source])
    for vote, scores in enumerate(alike):
        enough = (scores >= LEAST_GAMMA).nonzero().flatten()
        for heads in torch.split(enough, heads_at_once(length, call.q.shape[3])):
            sparse = _sparse(call, vote, heads, mask, block) if len(heads) else ()
            for head, out in zip(heads.tolist(), sparse, strict=True):
                dense = call.out[vote, head, tokens]
                skipped[vote, head] = _relative_error(dense, out[tokens])
    dropped = 1 - kept.mean(-1)
    found = torch.stack([alike, copied, skipped, dropped.to(alike)]).cpu().numpy()
    noise = max(16 * torch.finfo(torch.float32).eps ** 2, torch.finfo(call.out.dtype).eps ** 2 / 4)
    found[1:3] = np.where(found[1:3] < noise, 0.0, found[1:3])
    return found.astype(np.float32)


def heads_at_once(length: int, head_dim: int) -> int:
    """Return of how many heads the sparse form is computed at a time, for little memory."""
    return max(1, ELEMENTS // (length * head_dim))


def decimals(scores: Scores) -> npt.NDArray[np.float64]:
    """Return scores rounded to `DIGITS` digits, so that the order of sums does not show."""
    exact = scores.astype(np.float64)
    size = 10.0 ** (DIGITS - 1 - np.floor(np.log10(np.maximum(np.abs(exact), 1e-30))))
    return np.round(exact * size) / size


def at_other_share(scores: Scores, kept: Tensor) -> Scores:
    """Return scores with the sparse error that a mask of another share of mass makes.

    Args:
        scores: of a call.
        kept: share of mass that the rows of the other mask keep, (votes, heads, query_blocks).
    """
    alike, copied, error, dropped = scores.astype(np.float64)
    now = (1 - kept.mean(-1)).double().cpu().numpy()
    factor = np.where(dropped > _NOTHING, now / np.maximum(dropped, _NOTHING), 0.0)
    return np.stack([alike, copied, error * factor**GROWTH, now]).astype(np.float32)


def _sparse(
    call: AttentionCall, vote: int, heads: Tensor, mask: Tensor, block: tuple[int, int]
) -> Tensor:
    """Some heads' attention of one sample under its own mask, in the model's order."""
    q, k, v = (x[vote, heads].unsqueeze(0) for x in (call.q, call.k, call.v))
    pattern = BlockPattern.from_mask(
        mask[vote, heads], query_length=q.shape[2], key_length=k.shape[2], block=block
    )
    padding = None if call.padding is None else call.padding.sample(vote)
    kernel = attention_like(pattern, q, padded=padding is not None)
    return attend_in_order(kernel, q, k, v, call.scale, call.orders, padding)[0]


def _relative_error(x: Tensor, other: Tensor) -> Tensor:
    """|x - other|^2 / |x|^2, in float64."""
    x, other = x.double(), other.double()
    return (x - other).square().sum() / x.square().sum().clamp_min(1e-300)
