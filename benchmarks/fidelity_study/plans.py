"""Our plans at any wanted density, all from one recording."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from fidelity_study.serve import computed_density, entry

from calibatt_compiler.calibration import Thresholds, plan_from_run, zone_plan_from_run
from calibatt_compiler.calibration.store.records import InputRecord
from calibatt_compiler.calibration.store.run_folder import RunStore
from calibatt_compiler.plan import Plan

NEAR = 0.005
"""How far a plan's density may be from the wanted one."""


TRIES = 6
"""Plans that are made to come near it, where the density is not known beforehand."""


class NoPlanError(Exception):
    """A form has no plan of the wanted density."""


@dataclass(frozen=True)
class Form:
    """A kind of plan of ours.

    Attributes:
        pooled: keys that each dropped block is pooled to; their cost is part of the density.
        gamma: see `CalibrationConfig`; what row-shared heads spare is given to the others.
        zones: octave zones instead of masks.
        numbers: that zones may have a head; None: as calibration does.
    """

    pooled: int = 0
    gamma: float | None = None
    zones: bool = False
    numbers: int | None = None


class Recording:
    """What a calibration has left in its run folder, with energies.

    Args:
        folder: of the run.
        C: threshold of the first step; above it where even A = C is too sparse.
        k: how fast the threshold falls to A, which is chosen by density.
        rho: share of the inputs that must agree.
    """

    def __init__(self, folder: Path, *, C: float, k: float, rho: float) -> None:
        self._folder = folder
        self._store = RunStore(folder)
        self._names = self._store.names()
        self._first, self._k, self._rho = C, k, rho

    @property
    def _record(self) -> InputRecord:
        return self._store.record(self._names[0])

    @cached_property
    def _levels(self) -> list[npt.NDArray[np.float64]]:
        """For each step, sorted: the thresholds above which the blocks of all sites are kept.

        An input keeps a block if the threshold is above its `entry`; so many inputs agree as have
        theirs below it.
        """
        levels = []
        for step in range(len(self._record.timesteps)):
            by_site = [self._site_levels(size.name, step) for size in self._record.sites]
            levels.append(np.sort(np.concatenate(by_site)))
        return levels

    def _site_levels(self, site: str, step: int) -> npt.NDArray[np.float64]:
        energies = [
            torch.from_numpy(self._store.energy(self._store.record(name), site, step))
            for name in self._names
        ]
        entries = entry(torch.cat(energies))
        needed = max(1, math.ceil(self._rho * len(entries) - 1e-9))
        found: npt.NDArray[np.float64] = entries.kthvalue(needed, dim=0).values.flatten().numpy()
        return found

    def _thresholds(self, late: float) -> Thresholds:
        return Thresholds(A=late, C=max(self._first, late), k=self._k)

    def _predicted(self, late: float, pooled: float) -> float:
        """Density at A = `late`; rows in which no block is agreed on keep one more."""
        record, thresholds, found = self._record, self._thresholds(late), []
        for levels, position in zip(self._levels, record.positions, strict=True):
            share = thresholds.at(position, record.schedule_steps)
            kept = float(np.searchsorted(levels, share)) / len(levels)
            found.append(min(1.0, kept + pooled))
        return sum(found) / len(found)

    def plan(self, density: float, form: Form) -> Plan:
        """Return the plan of a form whose computed density comes nearest to the wanted one.

        Raises:
            NoPlanError: the thresholds of the first steps, or the pooled keys, alone take more.
        """
        if form.zones:
            return self._zones(density, form.numbers)
        wanted, nearest = density, math.inf
        for _ in range(1 if form.gamma is None else TRIES):
            plan = self._made(wanted, form)
            found = computed_density(plan)
            if abs(found - density) <= NEAR + 1 / self._blocks:
                return plan
            nearest = min(nearest, found, key=lambda value: abs(value - density))
            wanted = min(1.0, wanted + density - found)
        raise NoPlanError(
            f"no plan of density {density:g}, the nearest has {nearest:.3f}: a lower --C or a "
            "higher --k (thresholds of early steps) would leave more to late ones"
        )

    def _zones(self, density: float, numbers: int | None) -> Plan:
        """Make the plan of zones of a density."""
        budget = {} if numbers is None else {"numbers": numbers * self._record.sites[0].heads}
        return zone_plan_from_run(self._folder, density=density, **budget)

    def _made(self, density: float, form: Form) -> Plan:
        """Make the plan of the threshold at which the agreed blocks have a density."""
        pooled = form.pooled / self._record.block[1]
        low, high = 1e-6, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (
                (middle, high) if self._predicted(middle, pooled) < density else (low, middle)
            )
        chosen = self._thresholds(high)
        return plan_from_run(
            self._folder,
            rho=self._rho,
            A=chosen.A,
            C=chosen.C,
            k=chosen.k,
            pooled=form.pooled,
            gamma=form.gamma,
        )

    @property
    def _blocks(self) -> int:
        site = self._record.sites[0]
        return -(-site.key_length // self._record.block[1])
