"""Settings of a calibration, checked where they are given.

Four parts, each a frozen dataclass that can be used alone: what is observed, how blocks are
selected, how the run runs, and where it lies. `CalibrationConfig` is all of them, so that whoever
needs one part can be given the whole, and every setting is a keyword of its own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, TypeGuard, get_args

from calibatt_compiler.arguments import is_one_of, require
from calibatt_compiler.calibration.zone_target import (
    BUDGET,
    DENSITY,
    STEP_GROUPS,
    ZoneSelection,
    ZoneTarget,
)
from calibatt_compiler.errors import OptionError, PlanError
from calibatt_compiler.plan.order import TokenOrder
from calibatt_compiler.plan.refine import SHARE_STEPS, Refiner
from calibatt_compiler.plan.thresholds import Thresholds, default_thresholds

AUTO = "auto"
"""Value of `token_order` that asks for a survey."""

LEAST_GAMMA = 0.5
"""Heads of less similarity are not scored any further."""

Form = Literal["masks", "zones"]
"""What a plan holds of each head: kept blocks, or rates that are constant over runs of blocks."""


@dataclass(frozen=True, kw_only=True)
class ObservationConfig:
    """What is observed of a model; finished inputs depend on all of it.

    Attributes:
        block: tokens a query block, tokens a key block; multiples of 16.
        queries: energies are means over every so many-th query of a block: 1 takes all, 4 the
            queries 0, 4, 8, ... of each; it must divide `block[0]`. docs/energies.md says what
            that does to the masks.
        token_order: how the grid's tokens are laid out before they are cut into blocks: `raster`,
            as the model has them; frames x height x width of a tile, such as `2x8x8`; the
            cross-section of strips along one axis, such as `2x8xall` (see `TokenOrder`); or `auto`:
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
        anchor_rows: rows a frame that a row-shared head computes: copy errors are recorded for
            them, if there is a `gamma`.
        similarity_inputs: how many inputs, the first ones, are scored for `gamma`.
    """

    block: tuple[int, int] = (128, 128)
    queries: int = 1
    token_order: str = "raster"
    cfg: Literal["conditional", "both"] = "conditional"
    num_steps: int | None = None
    grid: tuple[int, int, int] | None = None
    text: Literal["first", "last"] | None = None
    component: str = "transformer"
    anchor_rows: int = 5
    similarity_inputs: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", _sizes("block", self.block, 2))
        if any(size % 16 or size > 1024 for size in self.block):
            raise _error("block", "multiples of 16, up to 1024", self.block)
        if self.grid is not None:
            object.__setattr__(self, "grid", _sizes("grid", self.grid, 3))
        for name in ("num_steps", "queries", "anchor_rows", "similarity_inputs"):
            value = getattr(self, name)
            if not (_integer(value) and value >= 1) and not (name == "num_steps" and value is None):
                raise _error(name, "an integer of at least 1", value)
        if self.block[0] % self.queries:
            raise _error("queries", f"a divisor of {self.block[0]}", self.queries)
        for name, choices in (("cfg", ("conditional", "both")), ("text", (None, "first", "last"))):
            if not is_one_of(getattr(self, name), choices):
                raise _error(name, f"one of {choices}", getattr(self, name))
        if not (isinstance(self.component, str) and self.component.isidentifier()):
            raise _error("component", "the name of a pipeline's module", self.component)
        try:
            if not is_one_of(self.token_order, (AUTO,)):
                TokenOrder.parse(self.token_order)
        except (PlanError, TypeError) as error:
            expected = "raster, a tile such as 2x8x8, strips such as 2x8xall, or auto"
            raise _error("token_order", expected, self.token_order) from error


class _WithoutSamples:
    """Refuses by name the setting that asked for weighted samples."""

    def __new__(cls, **settings: object) -> Self:
        if "sample_power" in settings:
            raise OptionError(
                "weighted samples were removed",
                expected="zones, the default and better: see docs/decisions/0016",
                got=f"sample_power={settings['sample_power']!r}",
                remedy="make plans without it; those made before are still served",
            )
        return super().__new__(cls)


@dataclass(frozen=True, kw_only=True)
class SelectionConfig(_WithoutSamples):
    """How blocks are selected, while inputs are recorded and from what a run has stored.

    Attributes:
        A: share of attention mass to keep at late steps, in (0, 1]. Lower is sparser.
        C: share to keep at the first, noisiest step, in (0, 1].
        k: how fast the threshold falls from C to A over the steps. While recording, `A`, `C` and
            `k` left None are 0.84, 0.99 and 16 (the paper's for Wan at 50 steps), or 0.763, 0.863
            and 5.64 (its 4-step models) if the sampler takes 8 steps or fewer. Of a stored run,
            None is what it was recorded with; other values need its energies.
        rho: a block is kept if this share of the inputs, or more, keeps it; in [0, 1].
        share_steps: consecutive steps of a site whose masks agree at least this much
            (intersection over union, in (0, 1]) share one pattern, the OR of theirs; 0.97 is the
            paper's. None, or 1: only equal masks are shared. `calibatt_compiler.plan.share_steps`
            states the rule and does the same to a finished plan.
        merge_budget: density, in [0, 1), that may be added to each pattern by filling the
            smallest gaps between its intervals: fewer, longer intervals run faster. None: gaps
            stay. `calibatt_compiler.plan.merge_intervals` does the same to a finished plan.
        pooled: keys that each dropped block is pooled to: it then takes part as so many mean keys
            instead of not at all, which costs `pooled / block[1]` of dense attention; 0 drops it,
            see arXiv 2603.05503.
        gamma: a head may be row-shared, that is compute a few rows of each frame and copy the
            others, if its rows attend alike by this score or more; in [0.5, 1], 0.87 in
            arXiv 2603.05503. `select.repetition` states the rule. None: no head is, and nothing is
            recorded for it.
        form: `zones`: rates that are constant over runs of blocks, of which each step draws a
            weighted sample (`plan.zones`); `masks`: blocks that are kept, as in the paper. Zones
            take none of the settings above, masks none of those below. None: `masks` if one of
            theirs is given, else `zones`.
        density: of a plan of zones, expected kept blocks / all blocks, in (0, 1]. Default 0.25,
            unless `speed_up` or `error` is given instead.
        speed_up: wanted instead: predicted dense time / time of a step; needs `attention_share`.
        error: wanted instead: predicted error of a row's attention output, relative to it.
        attention_share: share of a dense step's time that the attention calls of the plan take.
        step_groups: into how many parts a schedule is cut whose steps share zones.
        zone_numbers: numbers that the zones of an attention call may take at a step group, at
            least two a head; 2,048 is what a generated kernel holds.
    """

    A: float | None = None
    C: float | None = None
    k: float | None = None
    rho: float = 0.5
    share_steps: float | None = SHARE_STEPS
    merge_budget: float | None = None
    pooled: int = 0
    gamma: float | None = None
    form: Form | None = None
    density: float | None = None
    speed_up: float | None = None
    error: float | None = None
    attention_share: float | None = None
    step_groups: int = STEP_GROUPS
    zone_numbers: int = BUDGET

    def __post_init__(self) -> None:
        for name in ("A", "C"):
            value = getattr(self, name)
            if value is not None and not (_number(value) and 0 < value <= 1):
                raise _error(name, "a share of attention mass in (0, 1]", value)
        if self.k is not None and not (_number(self.k) and self.k >= 0):
            raise _error("k", "a number of at least 0", self.k)
        if not (_number(self.rho) and 0 <= self.rho <= 1):
            raise _error("rho", "a share of the inputs in [0, 1]", self.rho)
        self.refiner()  # checks the ranges of its two
        if not (_integer(self.pooled) and self.pooled >= 0):
            raise _error("pooled", "an integer of at least 0", self.pooled)
        gamma = self.gamma
        if gamma is not None and not (_number(gamma) and LEAST_GAMMA <= gamma <= 1):
            raise _error("gamma", f"a similarity in [{LEAST_GAMMA}, 1], or None", gamma)
        self._check_form()

    def _check_form(self) -> None:
        """Raise `OptionError` unless zones can be made as asked for, or are not asked for."""
        if self.form is not None and not is_one_of(self.form, get_args(Form)):
            raise _error("form", "masks, zones or None", self.form)
        for name, least in (("step_groups", 1), ("zone_numbers", 2)):
            value = getattr(self, name)
            if not (_integer(value) and value >= least):
                raise _error(name, f"an integer of at least {least}", value)
        form = "zones" if self.zoned else "masks"
        for name in self._of_masks() if self.zoned else _changed(self, _OF_ZONES):
            default = getattr(type(self), name)
            raise _error(name, f"{default!r} with form={form!r}", getattr(self, name))
        if self.zoned:
            self.zones()  # checks the ranges

    def _of_masks(self) -> list[str]:
        """Names of the settings given that say nothing of zones."""
        names = (each.name for each in fields(SelectionConfig))
        return _changed(self, [name for name in names if name not in (*_OF_ZONES, "form")])

    @property
    def zoned(self) -> bool:
        """Whether a plan of zones is made."""
        return self.form == "zones" or (self.form is None and not self._of_masks())

    @classmethod
    def of(cls, config: SelectionConfig, **changes: Any) -> Self:
        """Return this part of larger settings, with changes by name."""
        found = {each.name: getattr(config, each.name) for each in fields(cls)}
        if not config.zoned:
            found["form"] = "masks"  # perhaps for a setting that is no part of this
        return cls(**found | changes)

    def zones(self) -> ZoneSelection:
        """Return how zones are chosen; the default density filled in.

        Raises:
            OptionError: a value out of range.
        """
        wanted = {name: getattr(self, name) for name in ("density", "speed_up", "error")}
        for name, value in (*wanted.items(), ("attention_share", self.attention_share)):
            if value is not None and not _number(value):
                raise _error(name, "a number, or None", value)
        if all(value is None for value in wanted.values()):
            wanted["density"] = DENSITY
        target = ZoneTarget(**wanted, attention_share=self.attention_share)
        return ZoneSelection(target, self.step_groups, self.zone_numbers)

    def thresholds(self, steps: int) -> Thresholds:
        """Return A, C and k for a sampler of `steps` steps, the defaults filled in."""
        return self.completed(default_thresholds(steps))

    def completed(self, others: Thresholds) -> Thresholds:
        """Return A, C and k, those that are None taken from `others`."""
        return Thresholds(
            others.A if self.A is None else self.A,
            others.C if self.C is None else self.C,
            others.k if self.k is None else self.k,
        )

    def refiner(self) -> Refiner:
        """Return what shares steps and merges intervals of the masks."""
        return Refiner(self.share_steps, self.merge_budget)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How the run runs.

    Attributes:
        inductor: compile the model with Inductor while recording. Default: on a GPU yes, else no.
        progress: show progress bars. Default: if the error stream is a terminal.
        distributed: within an initialised process group of torch.distributed, `calibrate` shares
            the inputs among its ranks, all of which must make the same call. False: this process
            calibrates alone.
    """

    inductor: bool | None = None
    progress: bool | None = None
    distributed: bool = True

    def __post_init__(self) -> None:
        for name in ("inductor", "progress"):
            _check_switch(name, getattr(self, name), optional=True)
        _check_switch("distributed", self.distributed)


@dataclass(frozen=True, kw_only=True)
class StorageConfig:
    """Where the run lies, and what stays of it.

    Attributes:
        run_folder: where finished inputs are kept; default `<out>.calibration` beside the plan,
            without `out` a temporary folder.
        keep_energies: keep block energies of finished inputs too, so that `plan_from_run` and
            `run.plan(A=..., C=..., k=...)` can select again: True keeps them as float32, 32 times
            the size of the masks; `coarse` in a byte each, within 4.4 %, 8 times the size of the
            masks. While an input runs they are on disk.
        keep_run: leave that folder when the plan is written, so that `rho` can be changed, or
            inputs be added at the end, without running the first ones again.
        restart: throw away what an earlier run left there.
    """

    run_folder: str | os.PathLike[str] | None = None
    keep_energies: bool | Literal["coarse"] = False
    keep_run: bool = True
    restart: bool = False

    def __post_init__(self) -> None:
        if not is_one_of(self.keep_energies, (True, False, "coarse")):
            raise _error("keep_energies", "True, False or 'coarse'", self.keep_energies)
        for name in ("keep_run", "restart"):
            _check_switch(name, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig(ObservationConfig, SelectionConfig, RunConfig, StorageConfig):
    """How a model is calibrated: all settings of the four parts, which describe them.

    `ObservationConfig` says what is observed, `SelectionConfig` how blocks are selected,
    `RunConfig` how the run runs, `StorageConfig` where it lies.

    Raises:
        OptionError: a value of the wrong type or out of range.
    """

    def __post_init__(self) -> None:
        for part in CalibrationConfig.__bases__:
            part.__post_init__(self)  # type: ignore[attr-defined]
        width = self.block[1]
        if self.pooled and width % self.pooled:
            raise _error("pooled", f"0 or a divisor of {width}", self.pooled)

    def _of_masks(self) -> list[str]:
        """Names of the settings given that say nothing of zones, for which sums are kept."""
        return [*super()._of_masks(), *_changed(self, ["keep_energies"])]


_OF_ZONES = ("density", "speed_up", "error", "attention_share", "step_groups", "zone_numbers")
"""Settings of `SelectionConfig` that say nothing of masks."""


def _changed(config: SelectionConfig, names: Iterable[str]) -> list[str]:
    """Those settings that are not the default."""
    found = []
    for name in names:
        value, default = getattr(config, name), getattr(type(config), name)
        if value is not default and not (_number(value) and value == default):
            found.append(name)
    return found


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _sizes(name: str, value: object, length: int) -> tuple[int, ...]:
    sizes = tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(sizes) != length or not all(_integer(size) and size >= 1 for size in sizes):
        raise _error(name, f"{length} positive integers", value)
    return sizes


def _check_switch(name: str, value: object, *, optional: bool = False) -> None:
    if not (isinstance(value, bool) or (optional and value is None)):
        raise _error(name, "True, False or None" if optional else "True or False", value)


def _error(name: str, expected: str, got: object) -> OptionError:
    return OptionError(
        f"calibration setting {name!r} is out of range",
        expected=expected,
        got=repr(got),
        remedy="leave it out for the default; the parts of CalibrationConfig describe each setting",
    )


def checked_config(config: object) -> CalibrationConfig:
    """Return settings, the defaults for None.

    Raises:
        OptionError: it is something else.
    """
    if config is None:
        return CalibrationConfig()
    require(isinstance(config, CalibrationConfig), "config", config, "a CalibrationConfig, or None")
    assert isinstance(config, CalibrationConfig)
    return config
