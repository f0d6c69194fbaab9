"""Which variant of a peer's pattern each head takes at each step: that of the least output error.

Sparse VideoGen profiles its heads so at run time, Sliding Tile Attention searches its windows so
beforehand. Here one calibration input runs densely; at each attention call the output of some
queries is computed under each variant's mask and compared with their dense output.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from fidelity_study.patterns import Budget, Choices, Family, nearest
from torch import Tensor

from calibatt_compiler.kernels.common.dense import dense_attention
from calibatt_compiler.plan import Plan

QUERIES = 64
"""Queries sampled at each call."""


class Key(NamedTuple):
    """What an error is of."""

    density: float
    family: str
    variant: str


@dataclass(frozen=True)
class Blocks:
    """Where tokens stand in an order: blocks of the sampled queries, and of all keys."""

    of_query: Tensor
    of_key: Tensor


class Profile:
    """Serves dense attention and measures all variants beside it; see `serve.Method`.

    Args:
        families: by name.
        budgets: by density.
        plan: whose steps and blocks are taken.
        seed: of the sampled queries, the same ones at all calls.
    """

    def __init__(
        self,
        families: Mapping[str, Family],
        budgets: Mapping[float, Budget],
        plan: Plan,
        seed: int = 0,
    ) -> None:
        self._families = families
        self._budgets = budgets
        self._plan = plan
        self._tokens = next(iter(plan.sites.values())).query_length
        generator = torch.Generator().manual_seed(seed)
        self._sample = torch.randperm(self._tokens, generator=generator)[:QUERIES].sort().values
        self._errors: dict[Key, dict[tuple[str, int], Tensor]] = defaultdict(dict)
        self._blocks = {name: self._find(family) for name, family in families.items()}

    def attend(
        self, site: str, q: Tensor, k: Tensor, v: Tensor, timestep: float, scale: float
    ) -> Tensor:
        """Dense attention; both branches of guidance count."""
        step = self._plan.step_of(timestep)
        if step is None:
            raise RuntimeError(f"{site} was called at timestep {timestep}, which is not the plan's")
        scores = q[:, :, self._sample.to(q.device)].float() @ k.float().mT * scale
        p = (scores - scores.amax(-1, keepdim=True)).exp()
        values = v.float()
        dense = p @ values / p.sum(-1, keepdim=True)
        for density, budget in self._budgets.items():
            counts = budget.counts(site, step)
            for name, family in self._families.items():
                blocks = self._blocks[name]
                for variant, rank in family.variants.items():
                    rows = nearest(rank, counts)[:, blocks.of_query].to(p.device)
                    kept = p * rows[:, :, blocks.of_key.to(p.device)]
                    out = kept @ values / kept.sum(-1, keepdim=True).clamp_min(1e-30)
                    error = (out - dense).square().sum((0, 2, 3)).cpu()
                    at = self._errors[Key(density, name, variant)]
                    at[site, step] = at.get((site, step), torch.zeros_like(error)) + error
        return dense_attention(q, k, v, scale)

    def density(self) -> float:
        """One: the calls are served dense."""
        return 1.0

    def choices(self, density: float, family: str) -> Choices:
        """Return the variant of the least error by site, step and head."""
        names = list(self._families[family].variants)
        found: dict[str, list[list[str]]] = {}
        for site in self._plan.sites:
            found[site] = []
            for step in range(self._plan.steps):
                errors = [self._errors[Key(density, family, n)][site, step] for n in names]
                best = torch.stack(errors).argmin(0).tolist()
                found[site].append([names[index] for index in best])
        return found

    def _find(self, family: Family) -> Blocks:
        order = family.order.tokens(self._plan.grid)
        tokens = torch.arange(self._tokens) if order is None else torch.from_numpy(order)
        block = next(iter(self._plan.sites.values())).size.block_m
        of_token = torch.empty_like(tokens)
        of_token[tokens] = torch.arange(len(tokens)) // block
        return Blocks(of_token[self._sample], of_token)
