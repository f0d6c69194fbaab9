"""The output error that a plan of zones has on inputs that it was not made from.

Zones leave nothing out on average: what their draw does to a row is not a bias but a variance. A
block of octave k that holds the share E of its row adds E^2 (2^k - 1) to it, relative to the row's
output. The fit keeps the sum of that small on the calibration inputs; here it is measured on
others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calibatt_compiler.calibration.select.checks import MOST_FACTOR
from calibatt_compiler.calibration.validation.observed import check_observed, planned_step
from calibatt_compiler.plan import Plan
from calibatt_compiler.plan.zones import ZonePattern
from calibatt_compiler.plan.zones.quality import expected_errors

MARGIN = 0.25
"""A site is flagged if its error is above the expected one by more than this share of it."""

LEAST = 1e-6
"""Errors below it count as this: plans record six places."""


def row_variance(energy: Tensor, octaves: Tensor) -> Tensor:
    """Return the relative variance that the draw gives the output of each row.

    Args:
        energy: float (votes, heads, query_blocks, key_blocks), finite, at least 0.
        octaves: integers (heads, query_blocks, key_blocks), on the same device.

    Returns:
        float64 (votes, heads, query_blocks); 0 for a row without energy.
    """
    energy = energy.double()
    share = energy / energy.sum(-1, keepdim=True).clamp_min(1e-300)
    return (share.square() * (octaves.double().exp2() - 1)).sum(-1)


@dataclass(frozen=True)
class SiteZoneValidation:
    """The output error of one site: roots of mean variances, relative to a row's output.

    Attributes:
        site: its name.
        steps: the plan's steps that were observed.
        errors: at each of them, of the mean over inputs, heads and query blocks; measured on
            sums of energies, of all steps of a group together.
        expected: what the plan expected of its calibration inputs, over all steps, before any site
            was raised; None if it does not say.
        worst_input: of an input at a step, the largest; None if measured on sums.
        worst_head: of a head at a step, the largest.
        worst_row: of a query block of a head, at a step of an input, the largest; None if
            measured on sums.
    """

    site: str
    steps: tuple[int, ...]
    errors: tuple[float, ...]
    expected: float | None
    worst_input: float | None
    worst_head: float
    worst_row: float | None

    @property
    def error(self) -> float:
        """Root of the mean over the steps, too."""
        return _root_mean_square(self.errors)

    @property
    def worst_step(self) -> int:
        """The step of the largest error."""
        return self.steps[int(np.argmax(self.errors))]

    @property
    def ratio(self) -> float:
        """Error / expected error; NaN if none is known."""
        if self.expected is None:
            return float("nan")
        return max(self.error, LEAST) / max(self.expected, LEAST)


@dataclass(frozen=True)
class ZoneValidation:
    """The output error of a plan of zones on held-out inputs.

    Attributes:
        plan_digest: digest of the plan.
        inputs: how many inputs were observed.
        held_out: False if they are the very inputs that the plan was made from.
        margin: by what share of the expected error a site may be above it.
        sites: one for each site of the plan.
    """

    plan_digest: str
    inputs: int
    held_out: bool
    margin: float
    sites: tuple[SiteZoneValidation, ...]

    @property
    def flagged(self) -> tuple[SiteZoneValidation, ...]:
        """Sites that do not generalise: above the expected error by more than the margin.

        A site counts by its mean over inputs, steps, heads and query blocks.
        """
        return tuple(site for site in self.sites if site.ratio > 1 + self.margin)

    @property
    def error(self) -> float:
        """Root of the mean variance over sites, steps, inputs, heads and query blocks."""
        return _root_mean_square([site.error for site in self.sites])

    def raised(self) -> dict[str, float]:
        """Factors for the energies of flagged sites in another fit: the square of their ratio.

        See `zone_plan_from_run(raised=...)`. At one price the best rate of a block is in proportion
        to its energy, and its part of the variance to energy^2 / rate: to bring an error that is r
        times the expected one back to it, rates must be r^2 times as high. Inputs may differ in
        where their energy is, too, and octaves are steps: validate the new plan again.
        """
        return {site.site: min(round(site.ratio**2, 6), MOST_FACTOR) for site in self.flagged}

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain values, for JSON."""
        sites = [
            {
                **asdict(site),
                "error": site.error,
                "worst_step": site.worst_step,
                "ratio": None if site.expected is None else site.ratio,
                "flagged": site in self.flagged,
            }
            for site in self.sites
        ]
        return {
            "plan": self.plan_digest,
            "inputs": self.inputs,
            "held_out": self.held_out,
            "margin": self.margin,
            "error": self.error,
            "sites": sites,
        }


class OutputError:
    """Adds up the output error of a plan of zones, call by call: a few numbers a head.

    Args:
        plan: of zones at every site.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._totals = {
            name: np.zeros((plan.steps, site.heads)) for name, site in plan.sites.items()
        }
        self._votes = {name: np.zeros(plan.steps, np.int64) for name in plan.sites}
        self._worst_input = dict.fromkeys(plan.sites, 0.0)
        self._worst_row = dict.fromkeys(plan.sites, 0.0)
        self._summed: set[str] = set()

    def add(
        self,
        site: str,
        timestep: float,
        energy: Tensor,
        position: int,
        steps: int,
        lengths: tuple[int, int],
    ) -> None:
        """Judge the energies of one call by the zones that would have served it.

        Args:
            site: its name.
            timestep: what the model was given.
            energy: float (votes, heads, query_blocks, key_blocks); each vote is an input's.
            position: not looked at: zones have no threshold.
            steps: not looked at.
            lengths: tokens on the query and key side, perhaps of another text than the plan's.

        Raises:
            CalibrationError: the timestep is not of the plan's range.
        """
        step = planned_step(self.plan, timestep)
        octaves = torch.from_numpy(self._zones(site, step, lengths).map_octaves())
        variance = row_variance(energy, octaves.to(energy.device)).cpu().numpy()
        self._totals[site][step] += variance.mean(-1).sum(0)
        self._votes[site][step] += len(variance)
        by_input = float(variance.mean((1, 2)).max())
        self._worst_input[site] = max(self._worst_input[site], by_input)
        self._worst_row[site] = max(self._worst_row[site], float(variance.max()))

    def add_squares(
        self,
        site: str,
        timesteps: Sequence[float],
        squares: npt.NDArray[np.float64],
        lengths: tuple[int, int],
    ) -> None:
        """Judge mean squared energies of a step group by the zones that would have served it.

        Args:
            site: its name.
            timesteps: of the group.
            squares: float (heads, rows, columns), blocks without text.
            lengths: see `add`.

        Raises:
            CalibrationError: a timestep is not of the plan's range.
        """
        self._summed.add(site)
        found: dict[str, npt.NDArray[np.float64]] = {}
        for timestep in timesteps:
            step = planned_step(self.plan, timestep)
            zones = self._zones(site, step, lengths)
            if zones.digest not in found:
                inner = zones.map_octaves()[:, slice(*zones.rows), slice(*zones.columns)]
                variance = squares * (np.exp2(inner.astype(np.float64)) - 1)
                found[zones.digest] = variance.sum((1, 2)) / zones.query_blocks
            self._totals[site][step] += found[zones.digest]
            self._votes[site][step] += 1

    def _zones(self, site: str, step: int, lengths: tuple[int, int]) -> ZonePattern:
        patterns = self.plan.sites[site]
        zones = patterns.zones
        assert zones is not None
        if lengths == (patterns.query_length, patterns.key_length):
            return zones.group(zones.groups[step])
        return zones.fitted_group(zones.groups[step], lengths)

    def result(self, *, inputs: int, digest: str, margin: float) -> ZoneValidation:
        """Return the figures.

        Args:
            inputs: how many were observed.
            digest: of their prompts and seeds, as a plan records it.
            margin: see `ZoneValidation`.

        Raises:
            CalibrationError: a site of the plan was not observed.
        """
        check_observed(self._votes)
        expected = expected_errors(self.plan.metadata.quality)
        return ZoneValidation(
            plan_digest=self.plan.digest,
            inputs=inputs,
            held_out=digest != self.plan.metadata.inputs.digest,
            margin=margin,
            sites=tuple(self._site(name, expected.get(name)) for name in self._votes),
        )

    def _site(self, name: str, expected: float | None) -> SiteZoneValidation:
        seen = np.flatnonzero(self._votes[name])
        by_head = self._totals[name][seen] / self._votes[name][seen, None]
        summed = name in self._summed
        return SiteZoneValidation(
            site=name,
            steps=tuple(int(step) for step in seen),
            errors=tuple(math.sqrt(value) for value in by_head.mean(1)),
            expected=expected,
            worst_input=None if summed else math.sqrt(self._worst_input[name]),
            worst_head=math.sqrt(by_head.max()),
            worst_row=None if summed else math.sqrt(self._worst_row[name]),
        )


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in values) / len(values))
