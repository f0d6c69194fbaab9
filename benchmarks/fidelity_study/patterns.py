"""Masks of the static peers at a given number of kept blocks, and how that number is shared out.

All of them keep the diagonal and the same number of blocks in every row of a site at a step, but
for a rest of one where the number does not divide. H heads, R query blocks, C key blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from fidelity_study.geometry import (
    Grid,
    Measure,
    block_tile,
    places,
    radial,
    ranks,
    spatial,
    temporal,
    tiles_apart,
    whole_frame,
    with_sink,
)
from torch import Tensor

from calibatt_compiler.plan import Plan, SitePatterns
from calibatt_compiler.plan.order import RASTER, TokenOrder
from calibatt_compiler.plan.pattern import BlockPattern


@dataclass(frozen=True)
class Budget:
    """How many blocks each site may keep at each step.

    Attributes:
        kept: by site, one number a step, over all heads.
        heads: of every site.
        blocks: query blocks, as many as key blocks.
    """

    kept: Mapping[str, Sequence[int]]
    heads: int
    blocks: int

    @classmethod
    def of(cls, plan: Plan) -> Budget:
        """Return what a plan keeps; its sites must be alike."""
        sizes = {(s.heads, s.query_length, s.key_length) for s in plan.sites.values()}
        size = next(iter(plan.sites.values())).size
        if len(sizes) != 1 or size.query_blocks != size.key_blocks:
            raise SystemExit(f"sites of different sizes can't share a budget: {sizes}")
        kept = {
            name: [site.kept_at(step) for step in range(plan.steps)]
            for name, site in plan.sites.items()
        }
        return cls(kept, size.heads, size.query_blocks)

    @classmethod
    def even(cls, plan: Plan) -> Budget:
        """Return as many blocks as a plan keeps in all, the same at each step of each site."""
        own = cls.of(plan)
        total = sum(sum(by_step) for by_step in own.kept.values())
        shares = row_counts(total, len(own.kept), plan.steps).tolist()
        return cls(dict(zip(own.kept, shares, strict=True)), own.heads, own.blocks)

    def counts(self, site: str, step: int) -> Tensor:
        """Return the blocks of each row, int64 (H, R)."""
        return row_counts(self.kept[site][step], self.heads, self.blocks)

    def density(self) -> float:
        """Kept blocks / all blocks."""
        steps = [kept for by_step in self.kept.values() for kept in by_step]
        return sum(steps) / (len(steps) * self.heads * self.blocks**2)


def row_counts(kept: int, heads: int, rows: int) -> Tensor:
    """Share kept blocks out evenly over all rows, int64 (heads, rows); what is left is spread."""
    index = torch.arange(heads * rows + 1)
    return (index * kept // (heads * rows)).diff().view(heads, rows)


def nearest(rank: Tensor, counts: Tensor) -> Tensor:
    """Keep the first `counts` (H, R) of ranks (R, C) or (H, R, C); bool (H, R, C)."""
    return rank < counts.unsqueeze(-1)


def random_ranks(heads: int, blocks: int, seed: int) -> Tensor:
    """Return ranks in an order by chance, the diagonal first, int64 (heads, blocks, blocks)."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(heads, blocks, blocks, generator=generator)
    noise.diagonal(dim1=1, dim2=2).fill_(-1.0)
    return noise.argsort(-1).argsort(-1)


@dataclass(frozen=True)
class Family:
    """A peer's kind of pattern: some variants, of which each head takes one at each step.

    Attributes:
        order: of the tokens that blocks are cut from.
        variants: ranks (R, C) by name.
    """

    order: TokenOrder
    variants: Mapping[str, Tensor]


def families(grid: Grid, block: int) -> dict[str, Family]:
    """Return the peers' patterns by name.

    - `tiles`: Sliding Tile Attention (arXiv 2502.04507): tokens in tiles of one block each, a
      window of tiles around the query's; windows of four shapes, as its search has by head.
    - `radial`: Radial Attention, the window scaled to the number of blocks; its release scales the
      windows of other frames alone and keeps the query's own frame whole: offered too.
    - `heads`: spatial and temporal heads of Sparse VideoGen.

    The first frame as a sink, which the last two have, takes a larger share of a short video than
    of theirs: they are offered with and without.
    """
    tile = block_tile(block)
    in_tiles = TokenOrder(tile)
    frames, height, width = (-(-size // side) for size, side in zip(grid, tile, strict=True))
    shapes = {
        "cube": (1.0, 1.0, 1.0),
        "even": (frames, height, width),
        "long": (4 * frames, height, width),
        "wide": (frames, 4 * height, 4 * width),
    }

    def raster(measures: Mapping[str, Measure]) -> Family:
        at = places(grid, RASTER)
        sunk = {f"{name} with sink": with_sink(measure) for name, measure in measures.items()}
        both = {**measures, **sunk}
        return Family(RASTER, {name: ranks(measure, at, block) for name, measure in both.items()})

    at = places(grid, in_tiles)
    windows = {name: ranks(tiles_apart(tile, s), at, block) for name, s in shapes.items()}
    return {
        "tiles": Family(in_tiles, windows),
        "radial": raster({"all": radial(grid), "own whole": whole_frame(radial(grid))}),
        "heads": raster({"spatial": spatial(grid), "temporal": temporal(grid)}),
    }


Choices = Mapping[str, Sequence[Sequence[str]]]
"""By site, step and head: the name of a variant."""


def peer_plan(family: Family, budget: Budget, choices: Choices, like: Plan) -> Plan:
    """Return the plan of a family whose heads have chosen their variants."""

    def ranks_of(site: str, step: int) -> Tensor:
        return torch.stack([family.variants[name] for name in choices[site][step]])

    return plan_of(ranks_of, budget, like, family.order)


def random_plan(budget: Budget, like: Plan, seed: int) -> Plan:
    """Return a plan of blocks drawn by chance, anew for each site, step and head."""
    numbers = {name: number for number, name in enumerate(budget.kept)}

    def ranks_of(site: str, step: int) -> Tensor:
        own = seed + 1_000_003 * numbers[site] + 1009 * step
        return random_ranks(budget.heads, budget.blocks, own)

    return plan_of(ranks_of, budget, like, RASTER)


def plan_of(
    ranks_of: Callable[[str, int], Tensor], budget: Budget, like: Plan, order: TokenOrder
) -> Plan:
    """Return a plan from ranks by site and step.

    Args:
        ranks_of: int64 (H, R, C) of a site at a step.
        budget: how many of them are kept.
        like: a plan of the same video, sampler and block size.
        order: of the tokens that blocks are cut from.
    """
    sites = {}
    for name, site in like.sites.items():
        block = (site.patterns[0].block_m, site.patterns[0].block_n)
        by_step = [
            BlockPattern.from_mask(
                nearest(ranks_of(name, step), budget.counts(name, step)),
                query_length=site.query_length,
                key_length=site.key_length,
                block=block,
            )
            for step in range(like.steps)
        ]
        sites[name] = SitePatterns.share(by_step, site.head_dim)
    sampler = like.metadata.sampler
    return Plan.create(
        sites, grid=like.grid, sampler=sampler, model=like.metadata.model, token_order=order
    )
