"""What `attention.py` measures: sizes, masks of a wanted density, operands laid out as usual."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calibatt_compiler.plan.pattern import BlockPattern

MASKS = ("banded", "ragged", "random", "mixed", "dense")
ZONES = "zones"
"""Beside the masks: what each step draws from zones, see `zone_cases`."""


@dataclass(frozen=True)
class Size:
    """Sequence and heads of one model size; `frame` is tokens a latent frame."""

    name: str
    tokens: int
    frame: int
    heads: int = 40
    head_dim: int = 128
    block: tuple[int, int] = (128, 128)


SIZES = {
    "480p": Size("480p", 32760, 1560),
    "720p": Size("720p", 75600, 3600),
    "tiny": Size("tiny", 700, 200, heads=3, head_dim=64),
}


@dataclass(frozen=True)
class Case:
    """One problem: a size, a kind of mask and its density.

    Of a mixed mask every third head is dense, and the density is that of the others.
    """

    size: Size
    mask: str
    density: float

    @property
    def name(self) -> str:
        """Such as "480p banded 0.20"."""
        return f"{self.size.name} {self.mask} {self.density:.2f}"


def make_pattern(case: Case) -> BlockPattern:
    """The blocks with the lowest cost in each head, as many as the density asks for.

    banded: cost is the distance to the nearest diagonal a whole number of frames away, and the
    first key blocks cost nothing. ragged: the same with noise, smooth along the diagonals, as
    calibrated masks look. random: noise alone.
    """
    size = case.size
    rows = -(-size.tokens // size.block[0])
    columns = -(-size.tokens // size.block[1])
    row = torch.arange(rows)[:, None] * size.block[0]
    column = torch.arange(columns)[None] * size.block[1]
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(size.heads, rows, columns, dtype=torch.bool)
    for head in range(size.heads):
        if case.mask == "dense" or (case.mask == "mixed" and head % 3 == 0):
            mask[head] = True
            continue
        noise = torch.rand(rows, columns, generator=generator)
        frame = size.frame * (1 + head % 4 / 8)
        offset = (column - row).abs().float()
        to_band = (offset / frame - (offset / frame).round()).abs() * frame
        cost = to_band + offset * (0.05 + 0.05 * (head % 3))
        cost[:, : 1 + head % 2] = 0
        if case.mask == "ragged":
            smooth = torch.nn.functional.avg_pool2d(noise[None, None], 3, 1, 1)[0, 0]
            cost = cost + 6 * size.block[1] * (smooth + 0.3 * noise)
        if case.mask == "random":
            cost = noise
        cost = cost + 1e-3 * noise  # no ties
        kept = max(1, round(case.density * rows * columns))
        mask[head] = cost <= cost.flatten().kthvalue(kept).values
        diagonal = (torch.arange(rows) * size.block[0] // size.block[1]).clamp(max=columns - 1)
        mask[head, torch.arange(rows), diagonal] = True
    return BlockPattern.from_mask(
        mask, query_length=size.tokens, key_length=size.tokens, block=size.block
    )


def make_operands(
    size: Size, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (1, H, S, D), permuted views of (1, S, H, D)."""
    torch.manual_seed(0)
    shape = (1, size.tokens, size.heads, size.head_dim)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype).transpose(1, 2) for _ in range(3))
    return q, k, v
