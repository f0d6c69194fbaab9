"""One attention call of a survey: the query blocks that are sampled, the error of their output."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calibatt_compiler.calibration.order_search.candidates import SquaredError
from calibatt_compiler.calibration.select.selection import covering_mask
from calibatt_compiler.kernels.attention import attention_like
from calibatt_compiler.kernels.common.padding import KeyPadding
from calibatt_compiler.plan import BlockPattern
from calibatt_compiler.plan.text import TextPosition, text_blocks
from calibatt_compiler.runtime.token_order import Rearrangement

SAMPLE = 16
"""Query blocks of a call whose output is computed under each order."""

_HALVINGS = 12
"""How often the range of thresholds is halved in search of a density."""


@dataclass(frozen=True)
class SampledMasks:
    """Masks of the sampled query blocks of one call.

    Attributes:
        bits: uint8 (votes, heads, rows, ceil(key_blocks / 8)).
        lengths: query and key tokens of the call.
        shape: of its energies.
    """

    bits: npt.NDArray[np.uint8]
    lengths: tuple[int, int]
    shape: tuple[int, ...]

    def fits(self, lengths: tuple[int, int], shape: tuple[int, ...]) -> bool:
        """Whether another call is of the same sizes."""
        return lengths == self.lengths and tuple(shape) == self.shape

    def mask(self, device: torch.device) -> Tensor:
        """Return them as bool (votes, heads, rows, key_blocks)."""
        bits = np.unpackbits(self.bits, axis=-1, count=self.shape[-1], bitorder="little")
        return torch.from_numpy(bits).bool().to(device)


@dataclass(frozen=True)
class SurveyCall:
    """The samples of one attention call that count.

    Attributes:
        site: its name.
        place: of the diffusion step in the schedule.
        number: of the site's calls at this step, from 0: both branches may be observed.
        q: (votes, heads, Sq, D).
        k: (votes, heads, Sk, D).
        v: of that shape.
        out: dense output, like q.
        scale: factor on the scores.
        threshold: share of attention mass that the step keeps.
        video: video tokens of its sequences.
        text: where text stands.
        padding: what a mask says of the keys, in the order of these.
    """

    site: str
    place: int
    number: int
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    scale: float
    threshold: float
    video: int
    text: TextPosition | None
    padding: KeyPadding | None = None

    def ordered(
        self, of_queries: Rearrangement | None, of_keys: Rearrangement | None
    ) -> SurveyCall:
        """Return the same call with its tokens in another order."""

        def lay(x: Tensor, order: Rearrangement | None) -> Tensor:
            return x if order is None else order.apply(x)

        return replace(
            self,
            q=lay(self.q, of_queries),
            k=lay(self.k, of_keys),
            v=lay(self.v, of_keys),
            out=lay(self.out, of_queries),
            padding=self.padding
            if self.padding is None or of_keys is None
            else self.padding.ordered(of_keys.tokens),
        )

    def error(
        self, rows: Tensor, masks: Tensor, block: tuple[int, int], pooled: int
    ) -> SquaredError:
        """Return the error of some query blocks' output under their masks.

        Args:
            rows: int64 (rows,), the query blocks.
            masks: bool (votes, heads, rows, key_blocks).
            block: tokens a query block, tokens a key block.
            pooled: keys that each dropped block is pooled to.
        """
        within = torch.arange(block[0], device=rows.device)
        tokens = (rows[:, None] * block[0] + within).flatten()
        tokens = tokens[tokens < self.q.shape[2]]
        q, out = (x.index_select(2, tokens) for x in (self.q, self.out))
        square = 0.0
        for vote, mask in enumerate(masks):
            one = slice(vote, vote + 1)
            pattern = BlockPattern.from_mask(
                mask,
                query_length=len(tokens),
                key_length=self.k.shape[2],
                block=block,
                pooled=pooled,
            )
            # Of the queries, some blocks are here.
            padding = self.padding and replace(self.padding.sample(vote), rows=False)
            kernel = attention_like(pattern, q, padded=padding is not None)
            operands = (q[one], self.k[one], self.v[one])
            sparse = kernel(*operands, scale=self.scale, padding=padding)
            if padding is not None and self.padding and self.padding.rows:
                cut = ~padding.valid[:, None, tokens, None]
                sparse = sparse.masked_fill(cut, 0)
            square += (sparse.double() - out[one].double()).square().sum().item()
        return SquaredError(square, out.double().square().sum().item())


def sampled_rows(length: int, video: int, block: int, text: TextPosition | None) -> Tensor:
    """Return up to `SAMPLE` query blocks, evenly spread over those without text, int64.

    The last block, if it is a ragged one, is taken only where there is no other.
    """
    blocks = -(-length // block)
    with_text = text_blocks(length, video, block, text)
    free = torch.ones(blocks, dtype=torch.bool) if with_text is None else ~with_text
    if length % block and bool(free[:-1].any()):
        free[-1] = False
    found = free.nonzero().squeeze(1)
    if not len(found):
        found = torch.arange(max(1, length // block))
    count = min(SAMPLE, len(found))
    return found[(torch.arange(count) * 2 + 1) * len(found) // (2 * count)]


def at_density(energy: Tensor, density: float, always: Tensor | None) -> Tensor:
    """Return covering masks of one threshold, the largest that keeps at most a share of blocks.

    Args:
        energy: float (votes, heads, rows, key_blocks), finite.
        density: share of all blocks.
        always: see `covering_mask`; these and one block a row are kept in any case.
    """
    always = None if always is None else always.to(energy.device)
    low, high = 0.0, 1.0
    best = covering_mask(energy, 2.0**-_HALVINGS, always)[0]
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        mask, _ = covering_mask(energy, middle, always)
        if mask.double().mean().item() <= density:
            low, best = middle, mask
        else:
            high = middle
    return best
