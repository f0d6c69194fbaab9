"""Settings of a comparison: prompts, densities, thresholds, methods."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fidelity_study.methods import FEW, ORDERED, PEERS, TITLES

from calibatt_compiler.evaluation.cases import Case


@dataclass(frozen=True)
class Setting:
    """Everything that results depend on, beside the model.

    Attributes:
        arguments: of the pipeline, common to all videos.
        calibration: prompts and seeds that plans are made from.
        held_out: others, that all is measured on.
        densities: key work / that of dense attention.
        block: tokens a query block and a key block.
        C: threshold of the first step of our plans.
        k: how fast it falls.
        rho: share of the inputs that must agree.
        token_order: a second order for our plan, such as `2x4x4`.
        even: see `methods.MethodInputs`.
        only: names of the methods to compare, of `methods.TITLES`; None: all.
        inductor: compile what is around attention.
    """

    arguments: Mapping[str, Any]
    calibration: Sequence[Case]
    held_out: Sequence[Case]
    densities: Sequence[float]
    block: int
    C: float
    k: float
    rho: float = 0.5
    token_order: str | None = None
    even: bool = False
    only: Sequence[str] | None = None
    inductor: bool = True

    @property
    def methods(self) -> list[str]:
        """Names of what is compared."""
        offered = [name for name in TITLES if name != ORDERED or self.token_order is not None]
        return [name for name in offered if self.only is None or name in self.only]

    def title(self, method: str) -> str:
        """Return what a method is called in tables."""
        title = TITLES[method].format(order=self.token_order, few=FEW)
        return f"{title}, steps alike" if self.even and method in PEERS else title

    def key(self, method: str, density: float, case: Case) -> str:
        """Return the name of a result."""
        name = f"{method} {self.token_order}" if method == ORDERED else method
        if self.even and method in PEERS:
            name += " even"
        return f"{name}|{density:g}|{name_of(case)}"


def name_of(case: Case) -> str:
    """Return a short name of a prompt and seed, fit for a file."""
    return f"{case.seed}-{hashlib.sha256(case.prompt.encode()).hexdigest()[:8]}"
