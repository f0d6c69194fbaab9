"""One compiled model for all methods: each attention call goes to the method that is on.

The model is compiled once in recording mode (`calibatt_compiler.capture.Recorder`), and what it
reports to is exchanged. Plans are served by the same sites and kernels as with
`torch.compile(backend="calibatt")`; lists of blocks are tables, so that nothing is compiled for
one pattern.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from dino_study.choose import top
from dino_study.measure import pooled_scores
from fidelity_study.patterns import Budget
from torch import Tensor

from calibatt_compiler.capture import CaptureInfo, Recorder
from calibatt_compiler.kernels.attention import make_attention
from calibatt_compiler.kernels.common.dense import dense_attention
from calibatt_compiler.kernels.energy import block_energy
from calibatt_compiler.kernels.protocol import AttentionKernel
from calibatt_compiler.kernels.request import KernelRequest, KernelSettings
from calibatt_compiler.options import Lowering
from calibatt_compiler.plan import BlockPattern, Plan
from calibatt_compiler.runtime.site import DENSE_FULL, SparseSite

LOWERING: Lowering = "table"


class Method(Protocol):
    """What serves all attention calls of a model."""

    def attend(
        self, site: str, q: Tensor, k: Tensor, v: Tensor, timestep: float, scale: float
    ) -> Tensor:
        """Attention of a call; arguments and result: see `calibatt_compiler.capture.Recorder`."""

    def density(self) -> float:
        """Key work of the calls served so far / that of dense attention."""


class Switch(Recorder):
    """The recorder that a model is compiled with; hands each call on to the method that is on."""

    def __init__(self) -> None:
        self.method: Method = Dense()

    def on_capture(self, capture: CaptureInfo) -> None:
        """Sites are known from the plan."""

    def attend(
        self, site: str, q: Tensor, k: Tensor, v: Tensor, timestep: float, scale: float
    ) -> Tensor:
        """Let the method serve the call."""
        return self.method.attend(site, q, k, v, timestep, scale)


class Dense:
    """Stock attention."""

    def attend(
        self, site: str, q: Tensor, k: Tensor, v: Tensor, timestep: float, scale: float
    ) -> Tensor:
        """Dense attention."""
        return dense_attention(q, k, v, scale)

    def density(self) -> float:
        """One."""
        return 1.0


class DenseBlocks:
    """Dense attention by our own kernel, all blocks kept.

    How far its videos are from those of stock attention is the floor of every distance: neither is
    more right than the other.
    """

    def __init__(self, block: int) -> None:
        self._block = block
        self._kernels: dict[tuple[int, ...], AttentionKernel] = {}

    def attend(
        self, site: str, q: Tensor, k: Tensor, v: Tensor, timestep: float, scale: float
    ) -> Tensor:
        """Attention with all blocks."""
        key = (q.shape[1], q.shape[2], k.shape[2])
        if key not in self._kernels:
            heads, queries, keys = key
            rows, columns = (-(-length // self._block) for length in (queries, keys))
            pattern = BlockPattern.from_mask(
                torch.ones(heads, rows, columns, dtype=torch.bool),
                query_length=queries,
                key_length=keys,
                block=(self._block, self._block),
            )
            self._kernels[key] = make_attention(
                KernelRequest(
                    pattern, lowering=LOWERING, device=q.device, dtype=q.dtype, head_dim=q.shape[-1]
                )
            )
        return self._kernels[key](q, k, v, scale=scale)

    def density(self) -> float:
        """One."""
        return 1.0


class Planned:
    """Attention by a plan, as the backend serves it."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._sites: dict[str, SparseSite] = {}

    def attend(
        self, site: str, q: Tensor, k: Tensor, v: Tensor, timestep: float, scale: float
    ) -> Tensor:
        """Attention by the pattern of the site's step."""
        if site not in self._sites:
            self._sites[site] = SparseSite(
                self._plan,
                site,
                KernelSettings(
                    lowering=LOWERING, device=q.device, dtype=q.dtype, head_dim=q.shape[-1]
                ),
            )
        return self._sites[site].attend(q, k, v, timestep, scale)

    def density(self) -> float:
        """Density of the plan, pooled keys included.

        Raises:
            RuntimeError: a call was served dense although the plan is sparse there.
        """
        for name, site in self._sites.items():
            dense = [kind for kind in site.calls if kind.startswith("dense")]
            if set(dense) - {DENSE_FULL}:
                raise RuntimeError(f"{name} was not served by its plan: {dict(site.calls)}")
        return computed_density(self._plan)


def computed_density(plan: Plan) -> float:
    """Density of a plan with the pooled keys counted, at most 1 for each site and step."""
    found = [
        min(1.0, site.density_at(step) + pooled_share(site.patterns[0]))
        for site in plan.sites.values()
        for step in range(plan.steps)
    ]
    return sum(found) / len(found)


def pooled_share(pattern: BlockPattern) -> float:
    """Share of the dense key work that a pattern's pooled keys take."""
    return pattern.computed_density - pattern.density


class Online:
    """Attention by a mask that each call makes of its own operands.

    Args:
        select: (q, k, site, step, scale) of one sample, (1, H, S, D), to bool (H, R, C).
        budget: blocks that each site may keep at each step.
        plan: whose steps and blocks are taken.
    """

    def __init__(
        self,
        select: Callable[[Tensor, Tensor, str, int, float], Tensor],
        budget: Budget,
        plan: Plan,
    ) -> None:
        self._select = select
        self._budget = budget
        self._plan = plan
        self._kept = self._all = 0

    def attend(
        self, site: str, q: Tensor, k: Tensor, v: Tensor, timestep: float, scale: float
    ) -> Tensor:
        """Sparse attention, sample by sample."""
        step = self._plan.step_of(timestep)
        if step is None:
            raise RuntimeError(f"{site} was called at timestep {timestep}, which is not the plan's")
        total = self._budget.heads * self._budget.blocks**2
        self._all += total * len(q)
        if self._budget.kept[site][step] == total:
            self._kept += total * len(q)
            return dense_attention(q, k, v, scale)
        size = self._plan.sites[site].size
        parts = []
        for one in zip(q.split(1), k.split(1), v.split(1), strict=True):
            mask = self._select(one[0], one[1], site, step, scale)
            pattern = BlockPattern.from_mask(
                mask,
                query_length=size.query_length,
                key_length=size.key_length,
                block=(size.block_m, size.block_n),
            )
            self._kept += pattern.kept
            kernel = make_attention(
                KernelRequest(
                    pattern, lowering=LOWERING, device=q.device, dtype=q.dtype, head_dim=q.shape[-1]
                )
            )
            parts.append(kernel(*one, scale=scale))
        return torch.cat([part.transpose(1, 2) for part in parts]).transpose(1, 2)

    def density(self) -> float:
        """Kept blocks of the calls so far / all blocks."""
        return self._kept / self._all


def entry(energy: Tensor) -> Tensor:
    """Return the share of each row's energy that is in blocks ranked before this one.

    A block belongs to the row's smallest set that covers a threshold exactly if this is below it.

    Args:
        energy: float (..., C), at least 0; of equal ones the lower index ranks first.

    Returns:
        float64 (..., C).
    """
    order = energy.argsort(dim=-1, descending=True, stable=True)
    ranked = energy.double().gather(-1, order)
    before = ranked.cumsum(-1) - ranked
    share = before / ranked.sum(-1, keepdim=True)
    return torch.empty_like(share).scatter_(-1, order, share.clamp_min(0))


def covering(energy: Tensor, kept: int) -> Tensor:
    """Return the covering mask that keeps so many blocks: one threshold for all rows.

    Args:
        energy: float (H, R, C).
        kept: blocks, at least one a row.

    Returns:
        bool (H, R, C) with exactly `kept` blocks.
    """
    first = entry(energy).flatten().argsort(stable=True)[:kept]
    mask = torch.zeros(energy.numel(), dtype=torch.bool, device=energy.device)
    mask[first] = True
    return mask.view(energy.shape)


def oracle(budget: Budget, plan: Plan) -> Online:
    """The same selection as calibration's, made from the very attention of each call."""

    def select(q: Tensor, k: Tensor, site: str, step: int, scale: float) -> Tensor:
        size = plan.sites[site].size
        energy = block_energy(q, k, block=(size.block_m, size.block_n), scale=scale)[0]
        return covering(energy, budget.kept[site][step])

    return Online(select, budget, plan)


def router(budget: Budget, plan: Plan) -> Online:
    """SpargeAttn's selector (arXiv 2502.18137): the highest scores of mean query and mean key.

    The same number of blocks in every row; without its test of how alike a block's tokens are.
    """

    def select(q: Tensor, k: Tensor, site: str, step: int, scale: float) -> Tensor:
        score = pooled_scores(q.float(), k.float(), plan.sites[site].size.block_m)
        return top(score, budget.counts(site, step).to(q.device))

    return Online(select, budget, plan)
