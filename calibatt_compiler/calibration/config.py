"""Settings of a calibration, checked where they are given."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Literal, TypeGuard

from calibatt_compiler.errors import OptionError, PlanError
from calibatt_compiler.plan.order import TokenOrder
from calibatt_compiler.plan.refine import SHARE_STEPS, Refiner
from calibatt_compiler.plan.thresholds import Thresholds, default_thresholds

AUTO = "auto"
"""Value of `CalibrationConfig.token_order` that asks for a survey."""

LEAST_GAMMA = 0.5
"""Heads of less similarity are not scored any further."""


@dataclass(frozen=True)
class CalibrationConfig:
    """How a model is calibrated.

    Attributes:
        block: tokens a query block, tokens a key block; multiples of 16.
        A: share of attention mass to keep at late steps, in (0, 1]. Lower is sparser.
        C: share to keep at the first, noisiest step, in (0, 1].
        k: how fast the threshold falls from C to A over the steps. `A`, `C` and `k` left None are
            0.84, 0.99 and 16 (the paper's for Wan at 50 steps), or 0.763, 0.863 and 5.64 (its
            4-step models) if the sampler takes 8 steps or fewer.
        rho: a block is kept if this share of the inputs, or more, keeps it; in [0, 1].
        share_steps: consecutive steps of a site whose masks agree at least this much
            (intersection over union, in (0, 1]) share one pattern, the OR of theirs; 0.97 is the
            paper's. None, or 1: only equal masks are shared. `calibatt_compiler.plan.share_steps`
            states the rule and does the same to a finished plan. With `sample_power` each step
            has a sample of its own: errors of one that steps share would add up.
        merge_budget: density, in [0, 1), that may be added to each pattern by filling the
            smallest gaps between its intervals: fewer, longer intervals run faster. None: gaps
            stay. `calibatt_compiler.plan.merge_intervals` does the same to a finished plan.
        pooled: keys that each dropped block is pooled to: it then takes part as so many mean keys
            instead of not at all, which costs `pooled / block[1]` of dense attention; 0 drops it,
            as in arXiv 2603.05503.
        sample_power: keep of each row not the blocks of most energy but as many drawn by chance,
            in proportion to this power of their mean energy, each weighted by the inverse of its
            chance: nothing is left out on average. `benchmarks/RESULTS.md` compares powers; 1
            served a video model best. Needs `keep_energies`; None keeps the highest.
        gamma: a head may be repetitive, that is compute a few rows of each frame and copy the
            others, if its rows attend alike by this score or more; in [0.5, 1], 0.87 in
            arXiv 2603.05503. `calibration.forms` states the rule. None: no head is, and nothing is
            recorded for it.
        anchor_rows: rows a frame that a repetitive head computes.
        similarity_inputs: how many inputs, the first ones, are scored for `gamma`.
        queries: energies are means over every so many-th query of a block: 1 takes all, 4 the
            queries 0, 4, 8, ... of each; it must divide `block[0]`. docs/energies.md says what
            that does to the masks.
        token_order: how the grid's tokens are laid out before they are cut into blocks: `raster`,
            as the model has them; frames x height x width of a tile, such as `2x8x8`; the
            cross-section of ropes along one axis, such as `2x8xall` (see `TokenOrder`); or `auto`:
            `calibrate` runs its first two inputs once more, measures such orders on them, and takes
            the sparsest that pays (`order_search.candidates.choose`), else `raster`. For a bare
            module `calibration.survey` does that.
        cfg: which branch of classifier-free guidance is observed: `conditional` or `both`. The
            plan serves both in any case.
        num_steps: T of the threshold formula. Default: the number of distinct timesteps of the
            pipeline's scheduler, or of the first input for a bare module.
        grid: latent tokens (frames, height, width) after patching, for models whose family is
            not known.
        text: where text tokens stand in the sequence of such a model: `first`, `last` or None.
        component: which module of the pipeline is calibrated; `transformer_2` is the low-noise
            model of Wan 2.2.
        inductor: compile the model with Inductor while recording. Default: on a GPU yes, else no.
        run_folder: where finished inputs are kept; default `<out>.calibration` beside the plan,
            without `out` a temporary folder.
        keep_energies: keep block energies of finished inputs too, so that `plan_from_run` and
            `run.plan(A=..., C=..., k=...)` can select again and samples can be drawn: True keeps
            them as float32, 32 times the size of the masks; `coarse` in a byte each, within 4.4 %,
            8 times the size of the masks. While an input runs they are on disk.
        keep_run: leave that folder when the plan is written, so that `rho` can be changed, or
            inputs be added at the end, without running the first ones again.
        restart: throw away what an earlier run left there.
        progress: show progress bars. Default: if the error stream is a terminal.
        distributed: within an initialised process group of torch.distributed, `calibrate` shares
            the inputs among its ranks, all of which must make the same call. False: this process
            calibrates alone.

    Raises:
        OptionError: a value of the wrong type or out of range.
    """

    block: tuple[int, int] = (128, 128)
    A: float | None = None
    C: float | None = None
    k: float | None = None
    rho: float = 0.5
    share_steps: float | None = SHARE_STEPS
    merge_budget: float | None = None
    pooled: int = 0
    sample_power: float | None = None
    gamma: float | None = None
    anchor_rows: int = 5
    similarity_inputs: int = 1
    queries: int = 1
    token_order: str = "raster"
    cfg: Literal["conditional", "both"] = "conditional"
    num_steps: int | None = None
    grid: tuple[int, int, int] | None = None
    text: Literal["first", "last"] | None = None
    component: str = "transformer"
    inductor: bool | None = None
    run_folder: str | os.PathLike[str] | None = None
    keep_energies: bool | Literal["coarse"] = False
    keep_run: bool = True
    restart: bool = False
    progress: bool | None = None
    distributed: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", _sizes("block", self.block, 2))
        if any(size % 16 or size > 1024 for size in self.block):
            raise _error("block", "multiples of 16, up to 1024", self.block)
        if self.grid is not None:
            object.__setattr__(self, "grid", _sizes("grid", self.grid, 3))
        for name in ("A", "C"):
            value = getattr(self, name)
            if value is not None and not (_number(value) and 0 < value <= 1):
                raise _error(name, "a share of attention mass in (0, 1]", value)
        if self.k is not None and not (_number(self.k) and self.k >= 0):
            raise _error("k", "a number of at least 0", self.k)
        check_rho(self.rho)
        _check_form(self)
        _check_repetition(self)
        Refiner(self.share_steps, self.merge_budget)  # checks their ranges
        if self.num_steps is not None and not (_integer(self.num_steps) and self.num_steps >= 1):
            raise _error("num_steps", "an integer of at least 1", self.num_steps)
        for name, choices in (("cfg", ("conditional", "both")), ("text", (None, "first", "last"))):
            if getattr(self, name) not in choices:
                raise _error(name, f"one of {choices}", getattr(self, name))
        if not (isinstance(self.keep_energies, bool) or self.keep_energies == "coarse"):
            raise _error("keep_energies", "True, False or 'coarse'", self.keep_energies)
        for name in ("inductor", "progress", "keep_run", "restart", "distributed"):
            optional = name in ("inductor", "progress")
            value = getattr(self, name)
            if not (isinstance(value, bool) or (optional and value is None)):
                raise _error(name, "True, False or None" if optional else "True or False", value)
        if not (isinstance(self.component, str) and self.component.isidentifier()):
            raise _error("component", "the name of a pipeline's module", self.component)

    def thresholds(self, steps: int) -> Thresholds:
        """Return A, C and k for a sampler of `steps` steps, the defaults filled in."""
        default = default_thresholds(steps)
        return Thresholds(
            default.A if self.A is None else self.A,
            default.C if self.C is None else self.C,
            default.k if self.k is None else self.k,
        )


def _check_form(config: CalibrationConfig) -> None:
    """Raise `OptionError` unless blocks can be pooled and tokens ordered as they are to be."""
    width = config.block[1]
    if not (_integer(config.pooled) and config.pooled >= 0) or (
        config.pooled and width % config.pooled
    ):
        raise _error("pooled", f"0 or a divisor of {width}", config.pooled)
    power = config.sample_power
    if power is not None and not (_number(power) and 0 <= power <= 2):
        raise _error("sample_power", "a power in [0, 2], or None", power)
    if power is not None and not config.keep_energies:
        raise _error("sample_power", "keep_energies=True beside it", "keep_energies=False")
    check_sample(power, config.merge_budget)
    if not (_integer(config.queries) and config.queries >= 1) or config.block[0] % config.queries:
        raise _error("queries", f"a divisor of {config.block[0]}", config.queries)
    try:
        if config.token_order != AUTO:
            TokenOrder.parse(config.token_order)
    except (PlanError, TypeError) as error:
        expected = "raster, a tile such as 2x8x8, ropes such as 2x8xall, or auto"
        raise _error("token_order", expected, config.token_order) from error


def _check_repetition(config: CalibrationConfig) -> None:
    """Raise `OptionError` unless heads can be scored and rows copied as they are to be."""
    check_gamma(config.gamma)
    for name in ("anchor_rows", "similarity_inputs"):
        value = getattr(config, name)
        if not (_integer(value) and value >= 1):
            raise _error(name, "an integer of at least 1", value)


def check_sample(power: object, merge_budget: object) -> None:
    """Raise `OptionError` if gaps are to be filled where blocks are drawn by chance."""
    if power is not None and merge_budget is not None:
        raise _error("sample_power", "no merge_budget beside it", f"merge_budget={merge_budget}")


def check_rho(rho: object) -> None:
    """Raise `OptionError` unless `rho` is a share in [0, 1]."""
    if not (_number(rho) and 0 <= rho <= 1):
        raise _error("rho", "a share of the inputs in [0, 1]", rho)


def check_gamma(gamma: object) -> None:
    """Raise `OptionError` unless `gamma` is a similarity in [0.5, 1], or None."""
    if gamma is not None and not (_number(gamma) and LEAST_GAMMA <= gamma <= 1):
        raise _error("gamma", f"a similarity in [{LEAST_GAMMA}, 1], or None", gamma)


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _sizes(name: str, value: object, length: int) -> tuple[int, ...]:
    sizes = tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(sizes) != length or not all(_integer(size) and size >= 1 for size in sizes):
        raise _error(name, f"{length} positive integers", value)
    return sizes


def _error(name: str, expected: str, got: object) -> OptionError:
    return OptionError(
        f"calibration setting {name!r} is out of range",
        expected=expected,
        got=repr(got),
        remedy="leave it out for the default; CalibrationConfig describes each setting",
    )
