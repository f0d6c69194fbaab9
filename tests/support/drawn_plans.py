"""Plans of every form at random, and attention by them expanded to tokens."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator
from random import Random
from typing import Any
from unittest import mock

import numpy as np
import torch
from copied_rows import copy_rows
from model_families import Family, Grid

from calibatt_compiler.kernels.reference.attention import ReferenceAttention
from calibatt_compiler.plan import AnchorRows, BlockPattern, Plan, Sampler, SitePatterns
from calibatt_compiler.plan.order import RASTER, TokenOrder
from calibatt_compiler.plan.text import fit_pattern, text_blocks

STOCK = torch.nn.functional.scaled_dot_product_attention
FORMS = ("masks", "masks", "zones", "zones", "weights", "pooled", "copies")
ORDERS = ("raster", "raster", "2x4xall", "1x2x3", "2x2x2")


def draw_plan(
    family: Family, grid: Grid, text: int, timesteps: tuple[float, ...], draw: Random, form: str
) -> Plan:
    """Draw a plan of a form for a family's sites, with 2 heads.

    Args:
        family: of the model.
        grid: tokens of the video.
        text: text tokens in the sequence.
        timesteps: of the steps.
        draw: random numbers.
        form: one of `FORMS`.
    """
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    block = draw.choice((16, 32, 48))
    length, video = family.length(grid, text), math.prod(grid)
    blocks = -(-length // block)
    kept = torch.eye(blocks, dtype=torch.bool)
    if family.text:
        rows = text_blocks(length, video, block, family.text)
        assert rows is not None
        kept |= rows | rows[:, None]
    density = draw.choice((0.1, 0.3, 0.6))
    policy: Any = f"dense_{family.text}" if family.text else "none"
    size = (len(timesteps), 2, blocks, blocks)
    if form == "zones":
        octaves = {}
        for name in family.sites:
            drawn = torch.randint(0, draw.choice((2, 4, 8)), size[1:], generator=generator)
            octaves[name] = torch.where(kept, 0, drawn)[None]
        lengths = dict.fromkeys(family.sites, (length, length)) if family.text else None
        return Plan.from_zones(
            octaves, grid, timesteps, (block, block), lengths=lengths, text=policy
        )
    order = TokenOrder.parse(draw.choice(ORDERS)) if form != "pooled" else RASTER
    first = length - video if family.text == "first" else 0
    copies = repetitive = None
    if form == "copies":
        copies = AnchorRows(grid, draw.randint(1, 3), first, order)
        repetitive = np.array([True, draw.random() < 0.3])
    pooled = draw.choice((1, 2, 4)) if form == "pooled" and not family.text else 0
    sites = {}
    for name in family.sites:
        masks = (torch.rand(size, generator=generator) < density) | kept
        weights = 1 + 30 * torch.rand(size, generator=generator)
        sites[name] = SitePatterns.share(
            [
                BlockPattern.from_mask(
                    mask,
                    query_length=length,
                    key_length=length,
                    block=(block, block),
                    weight=weight if form == "weights" else None,
                    pooled=pooled,
                    repetitive=repetitive,
                    copies=copies,
                )
                for mask, weight in zip(masks, weights, strict=True)
            ]
        )
    sampler = Sampler(timesteps=timesteps)
    return Plan.create(sites, grid=grid, sampler=sampler, text_policy=policy, token_order=order)


def pattern_at(plan: Plan, site: str, step: int, length: int) -> BlockPattern:
    """What a site keeps at a step, its text completed for a sequence of this length."""
    patterns = plan.sites[site]
    if patterns.query_length == length:
        return patterns.at(step)
    to = (length, length)
    if patterns.zones is not None:
        return patterns.zones.fitted(step, to)
    position = plan.text_position
    assert position is not None
    return fit_pattern(patterns.at(step), to, video=math.prod(plan.grid), position=position)


def attend_expanded(
    plan: Plan, site: str, step: int,
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Stock SDPA in the plan's token order, its blocks expanded to tokens; then rows copied."""
    length, video = query.shape[2], math.prod(plan.grid)
    pattern = pattern_at(plan, site, step, length)
    first = length - video if plan.text_position == "first" else 0
    found = plan.token_order.tokens(plan.grid, length=length, first=first)
    tokens = torch.arange(length) if found is None else torch.from_numpy(found)
    ordered = [x[:, :, tokens] for x in (query, key, value)]
    out = torch.empty_like(query)
    if pattern.pooled:
        out[:, :, tokens] = ReferenceAttention(pattern)(*ordered)
        return out
    bias = torch.where(pattern.mask(), torch.from_numpy(pattern.log_weights()), -math.inf)
    keys = bias.repeat_interleave(pattern.block_n, 2)[..., :length]
    bias = pattern.rows_to_tokens(keys)[None].to(query.dtype)
    if mask is not None:  # which keys are text and which padding
        if mask.dtype == torch.bool:
            mask = torch.where(mask, 0.0, -math.inf).to(query.dtype)
        bias = bias + mask.expand(*mask.shape[:2], length, length)[:, :, tokens][..., tokens]
    out[:, :, tokens] = STOCK(*ordered, attn_mask=bias)
    return copy_rows(out, plan, pattern)


@contextlib.contextmanager
def served(model: torch.nn.Module, plan: Plan, step: int, sites: Collection[str]) -> Iterator[None]:
    """Let an eager model attend by the plan in these sites, each known by its module."""
    running: list[str] = []
    seen: set[str] = set()

    def attend(
        query: Any, key: Any, value: Any, attn_mask: Any = None, *more: Any, **options: Any
    ) -> Any:
        name = running[-1] if running else None
        if name not in sites or query.shape[2] != key.shape[2]:
            return STOCK(query, key, value, attn_mask, *more, **options)
        seen.add(name)
        return attend_expanded(plan, name, step, query, key, value, attn_mask)

    handles = []
    for name in plan.sites:
        module = model.get_submodule(name)
        handles += [
            module.register_forward_pre_hook(lambda *_, name=name: running.append(name)),
            module.register_forward_hook(lambda *_: running.pop() and None),
        ]
    try:
        with mock.patch("torch.nn.functional.scaled_dot_product_attention", attend):
            yield
    finally:
        for handle in handles:
            handle.remove()
    assert seen == set(sites), f"the reference missed {set(sites) - seen}"
