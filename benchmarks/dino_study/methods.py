"""The methods compared, each at the same share of the dense key work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from dino_study import choose, weigh
from dino_study.form import Form
from dino_study.measure import Method, input_energy, pooled_scores
from dino_study.order import block_centres
from dino_study.record import Record
from torch import Tensor

from calibatt_compiler.calibration.select.zones.site import ZoneMap, fit_zones
from calibatt_compiler.calibration.zone_target import BUDGET, ZoneTarget
from calibatt_compiler.plan.zones.drawing import seed_of

PAPER = "paper: agreement of covering sets"
HIGHEST = "highest energy"
RANDOM = "random"
ORACLE = "per-input oracle"
ROUTER = "pooled top-k at run time"
HALF = "0.5 highest, stratified sample, inverse rate"
UNWEIGHTED = "p ~ sqrt(energy), weight 1"
EACH = "p ~ energy^0.65, weight 1/p"
POOLED = "highest + {} pooled a block"
A_ROW = "p ~ sqrt(energy), mass ratio a row"
MIXED = "p ~ energy^0.65 + {} pooled a block, half each"
ZONES = "octave zones"
FEW_ZONES = "octave zones, 64 numbers a head"

CORE = (
    PAPER,
    ZONES,
    FEW_ZONES,
    HIGHEST,
    HALF,
    UNWEIGHTED,
    A_ROW,
    EACH,
    POOLED.format(1),
    POOLED.format(4),
    MIXED.format(1),
    MIXED.format(4),
    ORACLE,
    ROUTER,
)
"""Those whose final features are compared too, the most telling ones first."""


@dataclass(frozen=True)
class Setting:
    """What a catalogue is made for."""

    record: Record
    order: Tensor
    grid: tuple[int, int]
    block: int
    density: float
    """Kept blocks, sampled ones included, plus pooled keys, over all keys."""
    seed: int = 7

    @property
    def count(self) -> int:
        """Key blocks a row, at least 1."""
        return max(1, round(self.density * self.record.energies.shape[-1]))


def fixed(
    name: str, exact: Tensor, pooled: Tensor | None = None, keys: int = 1, cost: float = 0.0
) -> Method:
    """Return a method that is the same for all inputs; `cost` comes on top of the exact blocks."""
    exact = exact.float()
    forms = tuple(
        Form(exact[layer], None if pooled is None else pooled[layer].float(), keys)
        for layer in range(len(exact))
    )
    return Method(name, forms, float((exact > 0).float().mean()) + cost)


def plain(setting: Setting) -> list[Method]:
    """Masks without weights: calibrated ones, peers' patterns, choices made at run time."""
    energy, count = setting.record.mean, setting.count
    noise = torch.rand(energy.shape, generator=torch.Generator().manual_seed(setting.seed))
    index = torch.arange(energy.shape[-1])
    window = -(index[:, None] - index).abs().float()
    centres = block_centres(setting.order, setting.grid, setting.block)
    tiles = -(centres[:, None] - centres).abs().amax(-1)
    methods = [
        fixed(PAPER, choose.agreed(setting.record.energies, setting.density)),
        fixed("highest energy, one share for all rows", choose.covering(energy, setting.density)),
        fixed(HIGHEST, choose.top(energy, count)),
        fixed(RANDOM, choose.top(noise, count)),
        fixed("sliding window", choose.top(window.expand(energy.shape), count)),
        fixed("neighbouring tiles", choose.top(tiles.expand(energy.shape), count)),
    ]
    for name, score in ((ORACLE, input_energy), (ROUTER, pooled_scores)):
        methods.append(Method(name, partial(_online, score, count, setting.block), _share(setting)))
    if setting.record.gram is not None:
        change = setting.record.gram.diagonal(dim1=-2, dim2=-1)
        methods.append(fixed("highest |P (V - o)|", choose.top(change, count)))
    return methods


def _share(setting: Setting) -> float:
    return setting.count / setting.record.energies.shape[-1]


def _online(
    score: Callable[[Tensor, Tensor, int], Tensor],
    count: int,
    block: int,
    layer: int,
    q: Tensor,
    k: Tensor,
) -> Form:
    return Form(choose.top(score(q, k, block), count).float())


def splits(setting: Setting) -> list[Method]:
    """Part highest, the rest a sample of what is left, with one weight for a row's whole sample.

    Strata are of blocks of like energy; a sample that is spread takes every n-th block in the order
    of the sequence.
    """
    energy, gram = setting.record.mean, setting.record.gram
    total = torch.full(energy.shape[:-1], setting.count)
    methods = []
    for share in (0.9, 0.75, 0.5):
        best = (total * share).round().long()
        s = choose.top(energy, best)
        samples = {
            "stratified": choose.stratified(energy, ~s, total - best, setting.seed),
            "spread": choose.proportional((~s).float(), total - best, setting.seed)[0],
        }
        for how, t in samples.items():
            d = ~(s | t)
            name = f"{share:g} highest, {how} sample"
            methods.append(fixed(f"{name}, inverse rate", s + t * weigh.inverse_rate(t, d)))
            ratio = weigh.mass_ratio(energy * t, energy * (t | d))
            methods.append(fixed(f"{name}, mass ratio", s + t * ratio))
            if gram is not None:
                for by_head in (False, True):
                    w = weigh.fitted(gram, energy, t, d, by_head=by_head)
                    unit = "head" if by_head else "row"
                    methods.append(fixed(f"{name}, fitted a {unit}", s + t * w))
    return methods


def samples(setting: Setting) -> list[Method]:
    """Systematic samples with unequal probabilities, and what their weights are worth."""
    energy, gram = setting.record.mean, setting.record.gram
    total = torch.full(energy.shape[:-1], setting.count)
    methods = []
    for power in (0.5, 0.65, 1.0):
        t, p = choose.proportional(energy**power, total, setting.seed)
        name = EACH if power == 0.65 else f"p ~ energy^{power:g}, weight 1/p"
        methods.append(fixed(name, t / p.float()))
    t, p = choose.proportional(energy.sqrt(), total, setting.seed)
    sure = t & (p >= 0.999)
    tail, dropped = t & ~sure, ~t
    methods.append(fixed(UNWEIGHTED, t))
    ratio = weigh.mass_ratio(energy * tail, energy * (tail | dropped))
    methods.append(fixed(A_ROW, sure + tail * ratio))
    if gram is not None:
        for by_head in (False, True):
            w = weigh.fitted(gram, energy, tail, dropped, by_head=by_head)
            unit = "head" if by_head else "row"
            methods.append(fixed(f"p ~ sqrt(energy), fitted a {unit}", sure + tail * w))
        each = weigh.fitted_each(gram, energy, t, 1 / p.float(), 1.0)
        methods.append(fixed("p ~ sqrt(energy), fitted a block", each))
    return methods


def pooled(setting: Setting) -> list[Method]:
    """Exact blocks, and keys pooled from the others; all pooled keys count, used or not.

    The mixed form keeps a sample of probabilities p and lets samples and pooled keys speak for one
    half of the tail each: weight 1 + (1/p - 1) / 2 where a block is kept, its pooled keys with
    weight 1/2 where not. On average over samples every block then counts once.
    """
    energy = setting.record.mean
    total = torch.ones(energy.shape[:-1], dtype=torch.int64)
    methods = []
    for keys in (1, 2, 4, 8):
        cost = keys / setting.block
        count = round((setting.density - cost) * energy.shape[-1])
        if count < 1:
            continue
        s = choose.top(energy, count)
        methods.append(fixed(POOLED.format(keys), s, ~s, keys, cost))
        if keys in (1, 4):
            t, p = choose.proportional(energy**0.65, count * total, setting.seed)
            exact = t * (0.5 + 0.5 / p.float())
            methods.append(fixed(MIXED.format(keys), exact, 0.5 * ~t, keys, cost))
    return methods


def zones(setting: Setting) -> list[Method]:
    """The product's own form: one price over all layers, one step's draw of each layer."""
    squares = setting.record.energies.double().square().mean(0).numpy()
    heads, tokens = squares.shape[1], len(setting.order)

    def method(name: str, numbers: int) -> Method:
        maps = [
            ZoneMap(
                heads,
                (tokens, tokens),
                (setting.block, setting.block),
                partial(squares.__getitem__, layer),
                steps=1,
                seed=seed_of(layer),
            )
            for layer in range(len(squares))
        ]
        fitted = fit_zones(maps, ZoneTarget(density=setting.density), budget=numbers)
        drawn = [pattern.draw(setting.seed) for pattern in fitted.patterns]
        weights = [torch.from_numpy(pattern.log_weights()).exp() for pattern in drawn]
        masks = [pattern.mask() for pattern in drawn]
        return fixed(name, torch.stack([m * w for m, w in zip(masks, weights, strict=True)]))

    return [method(ZONES, BUDGET), method(FEW_ZONES, 64 * heads)]


def catalogue(setting: Setting) -> list[Method]:
    """Return all methods for one setting."""
    return [*plain(setting), *zones(setting), *splits(setting), *samples(setting), *pooled(setting)]
