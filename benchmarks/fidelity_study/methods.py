"""The methods compared, each at the same share of the dense key work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fidelity_study.patterns import Budget, Choices, Family, peer_plan, random_plan
from fidelity_study.plans import Form
from fidelity_study.serve import DenseBlocks, Method, Planned, oracle, router

from calibatt_compiler.plan import Plan

OURS, ORDERED, REPEATED = "ours", "ordered", "repeated"
POOLED = "pooled"
ZONES, FEW_ZONES = "zones", "few-zones"
ORACLE, ROUTER, RANDOM = "oracle", "router", "random"
FLOOR = "floor"

TITLES = {
    OURS: "calibrated plan (ours)",
    ORDERED: "calibrated plan in token order {order} (ours)",
    REPEATED: "calibrated, with row-shared heads (ours)",
    POOLED: "calibrated, 4 pooled keys a dropped block (ours)",
    ZONES: "octave zones (ours)",
    FEW_ZONES: "octave zones, {few} numbers a head (ours)",
    ORACLE: "per-input oracle (online)",
    ROUTER: "pooled top-k, SpargeAttn's selector (online)",
    "tiles": "sliding tiles (STA)",
    "radial": "radial decay (Radial Attention)",
    "heads": "spatial and temporal heads (SVG)",
    RANDOM: "random",
    FLOOR: "dense, by our kernel (the floor)",
}
"""All methods, in the order of tables."""

PEERS = ("tiles", "radial", "heads", ROUTER, RANDOM)
"""Those that know nothing of our plan but how much it keeps."""

FEW = 64
"""Numbers a head where these are to be few: of 40 heads, what a generated kernel can hold."""

GAMMA = 0.87
"""Similarity from which on a head may be repetitive: that of the paper."""

FORMS = {
    OURS: Form(),
    REPEATED: Form(gamma=GAMMA),
    POOLED: Form(pooled=4),
    ZONES: Form(zones=True),
    FEW_ZONES: Form(zones=True, numbers=FEW),
}
"""Plans of ours that come from one recording in raster order."""

RANDOM_SEED = 2026


@dataclass(frozen=True)
class MethodInputs:
    """What methods of one density are made from.

    Attributes:
        plans: of ours, by method.
        families: the peers' patterns.
        choices: by family, which variant each head takes.
        even: the peers keep the same number of blocks at each step of each site, instead of what
            our plan keeps there.
    """

    plans: Mapping[str, Plan]
    families: Mapping[str, Family]
    choices: Mapping[str, Choices]
    even: bool = False

    @property
    def budget(self) -> Budget:
        """What the peers may keep, by site and step."""
        return (Budget.even if self.even else Budget.of)(self.plans[OURS])


def make(name: str, inputs: MethodInputs) -> Method:
    """Return a method, ready to serve one video."""
    ours = inputs.plans[OURS]
    if name in inputs.plans:
        return Planned(inputs.plans[name])
    if name in inputs.families:
        family, choices = inputs.families[name], inputs.choices[name]
        return Planned(peer_plan(family, inputs.budget, choices, ours))
    others: dict[str, Callable[[], Method]] = {
        ORACLE: lambda: oracle(Budget.of(ours), ours),
        ROUTER: lambda: router(inputs.budget, ours),
        RANDOM: lambda: Planned(random_plan(inputs.budget, ours, RANDOM_SEED)),
        FLOOR: lambda: DenseBlocks(next(iter(ours.sites.values())).size.block_m),
    }
    return others[name]()
