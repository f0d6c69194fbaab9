"""How much attention mass the masks of a plan keep on inputs that it was not made from."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from calibatt_compiler.calibration.validation.observed import check_observed, planned_step
from calibatt_compiler.plan import Plan
from calibatt_compiler.plan.text import fit_pattern
from calibatt_compiler.plan.thresholds import Thresholds

MARGIN = 0.02
"""A site is flagged if it keeps less than its threshold by more than this share of mass."""


def kept_share(energy: Tensor, mask: Tensor) -> Tensor:
    """Return the share of its energy that each row keeps under a mask.

    Args:
        energy: float (votes, heads, query_blocks, key_blocks), finite, at least 0.
        mask: bool (heads, query_blocks, key_blocks), on the same device; True is kept.

    Returns:
        float64 (votes, heads, query_blocks); 1 for a row without energy, which loses nothing.
    """
    energy = energy.double()
    total = energy.sum(-1)
    kept = (energy * mask).sum(-1)
    return (kept / total.clamp_min(1e-300)).where(total > 0, 1.0)


@dataclass(frozen=True)
class SiteValidation:
    """What one site keeps, as shares of attention mass.

    Attributes:
        site: its name.
        steps: the plan's steps that were observed.
        kept: at each of them, mean over inputs, heads and query blocks.
        thresholds: at each of them, the share to keep; None if the plan records no thresholds.
        mean: of `kept`.
        worst_head: least mean over inputs and query blocks that any head has at any step.
        worst_row: least share that any query block of any head keeps, at any step of any input.
        repetitive: heads that copy rows, summed over the steps: they drop nothing that could be
            kept, so all other figures are of the other heads, at steps that have any.
    """

    site: str
    steps: tuple[int, ...]
    kept: tuple[float, ...]
    thresholds: tuple[float, ...] | None
    mean: float
    worst_head: float
    worst_row: float
    repetitive: int = 0

    @property
    def worst_step(self) -> int:
        """The step that is furthest below its threshold; without thresholds, that keeps least."""
        return self.steps[int(np.argmax(self._missing()))]

    @property
    def shortfall(self) -> float:
        """Threshold minus mean share kept, at the worst step; negative if all steps keep more.

        NaN if the plan records no thresholds.
        """
        return max(self._missing()) if self.thresholds else float("nan")

    def _missing(self) -> list[float]:
        wanted = self.thresholds or (1.0,) * len(self.kept)
        return [want - kept for want, kept in zip(wanted, self.kept, strict=True)]


@dataclass(frozen=True)
class Validation:
    """What a plan keeps on held-out inputs.

    Attributes:
        plan_digest: digest of the plan.
        inputs: how many inputs were observed.
        held_out: False if they are the very inputs that the plan was made from.
        margin: share of mass that a site may be below its threshold.
        sites: one for each site of the plan that has a head which is not row-shared.
        repetitive: heads that copy rows, summed over all sites and observed steps.
    """

    plan_digest: str
    inputs: int
    held_out: bool
    margin: float
    sites: tuple[SiteValidation, ...]
    repetitive: int = 0

    @property
    def flagged(self) -> tuple[SiteValidation, ...]:
        """Sites that do not generalise: at some step, below the threshold by more than the margin.

        A step counts by its mean over inputs, heads and query blocks.
        """
        return tuple(site for site in self.sites if site.shortfall > self.margin)

    @property
    def mean(self) -> float:
        """Share of mass kept, mean over sites and steps; 1 if all heads are row-shared."""
        means = [site.mean for site in self.sites]
        return sum(means) / len(means) if means else 1.0

    def raised(self) -> dict[str, float]:
        """What the flagged sites lack, to be added to their thresholds in another selection.

        See `plan_from_run(raised=...)`. Agreement between inputs decides too which blocks stay, so
        the new plan need not keep exactly that much more: validate it again.
        """
        return {site.site: round(site.shortfall, 6) for site in self.flagged}

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain values, for JSON."""
        sites = [
            {
                **asdict(site),
                "worst_step": site.worst_step,
                "shortfall": site.shortfall if site.thresholds else None,
                "flagged": site in self.flagged,
            }
            for site in self.sites
        ]
        return {
            "plan": self.plan_digest,
            "inputs": self.inputs,
            "held_out": self.held_out,
            "margin": self.margin,
            "mean": self.mean,
            "repetitive": self.repetitive,
            "sites": sites,
        }


class KeptMass:
    """Adds up what a plan keeps, call by call: a few numbers a head, no energies.

    Args:
        plan: whose masks are judged.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._thresholds = Thresholds.recorded(plan.metadata.thresholds)
        shapes = {name: (plan.steps, site.heads) for name, site in plan.sites.items()}
        self._total = {name: np.zeros(shape) for name, shape in shapes.items()}
        self._worst = {name: np.ones(shape) for name, shape in shapes.items()}
        self._copying = {name: np.zeros(shape, np.bool_) for name, shape in shapes.items()}
        self._votes = {name: np.zeros(plan.steps, np.int64) for name in shapes}
        self._wanted = {name: np.zeros(plan.steps) for name in shapes}

    def add(
        self,
        site: str,
        timestep: float,
        energy: Tensor,
        position: int,
        steps: int,
        lengths: tuple[int, int] | None = None,
    ) -> None:
        """Judge the energies of one call by the mask that would have served it.

        Args:
            site: its name.
            timestep: what the model was given.
            energy: float (votes, heads, query_blocks, key_blocks).
            position: place of the step in the sampler's schedule, t of the threshold formula.
            steps: T of the formula.
            lengths: tokens on the query and key side, where text is of another length than the
                plan's; the mask is completed as it would be for inference.

        Raises:
            CalibrationError: the timestep is not of the plan's range.
        """
        step = planned_step(self.plan, timestep)
        patterns, where = self.plan.sites[site], self.plan.text_position
        pattern = patterns.at(step)
        if lengths is not None and where is not None:
            video = math.prod(self.plan.grid)
            pattern = fit_pattern(pattern, lengths, video=video, position=where)
        shares = kept_share(energy, pattern.mask().to(energy.device)).cpu().numpy()
        self._total[site][step] += shares.mean(-1).sum(0)
        self._worst[site][step] = np.minimum(self._worst[site][step], shares.min((0, 2)))
        self._votes[site][step] += len(shares)
        if pattern.repetitive is not None:
            self._copying[site][step] = pattern.repetitive
        if self._thresholds is not None:
            self._wanted[site][step] = self._thresholds.at(position, steps)

    def result(self, *, inputs: int, digest: str, margin: float) -> Validation:
        """Return the figures.

        Args:
            inputs: how many were observed.
            digest: of their prompts and seeds, as a plan records it.
            margin: see `Validation`.

        Raises:
            CalibrationError: a site of the plan was not observed.
        """
        check_observed(self._votes)
        return Validation(
            plan_digest=self.plan.digest,
            inputs=inputs,
            held_out=digest != self.plan.metadata.inputs.digest,
            margin=margin,
            sites=tuple(site for site in map(self._site, self._votes) if site is not None),
            repetitive=sum(self._repetitive(name) for name in self._votes),
        )

    def _repetitive(self, name: str) -> int:
        return int(self._copying[name][self._votes[name] > 0].sum())

    def _site(self, name: str) -> SiteValidation | None:
        others = ~self._copying[name]
        seen = np.flatnonzero((self._votes[name] > 0) & others.any(1))
        if not len(seen):
            return None
        judged = others[seen]
        by_head = self._total[name][seen] / self._votes[name][seen, None]
        kept = (by_head * judged).sum(-1) / judged.sum(-1)
        wanted = self._wanted[name][seen]
        return SiteValidation(
            site=name,
            steps=tuple(int(step) for step in seen),
            kept=tuple(float(value) for value in kept),
            thresholds=tuple(float(v) for v in wanted) if self._thresholds else None,
            mean=float(kept.mean()),
            worst_head=float(by_head[judged].min()),
            worst_row=float(self._worst[name][seen][judged].min()),
            repetitive=self._repetitive(name),
        )
