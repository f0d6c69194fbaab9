"""Settings of a search, checked where they are given, and which form of plan it searches."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from calibatt_compiler.calibration.config import CalibrationConfig, Form
from calibatt_compiler.calibration.tuning.study import SearchSpace
from calibatt_compiler.errors import OptionError

TRIALS = 40
"""Of a search of masks, which have four numbers or more."""

ZONE_TRIALS = 12
"""Of a search of zones, which have one."""


@dataclass(frozen=True)
class TuningConfig:
    """How plans are searched.

    The form of `CalibrationConfig` says which, zones or masks; None is masks if `proxy` or a part
    of `space` that is of masks is given, or a setting of the calibration that is.

    Attributes:
        trials: how many plans are tried, those of an earlier, interrupted search included. Default:
            12 of zones, whose density alone is searched; 40 of masks.
        videos: how many of the inputs are generated in each trial; the first ones.
        proxy: go by the share of attention mass that a plan of masks keeps on the inputs instead,
            from the recorded energies: no video is generated. It can't see what pooling gains,
            nor what copied rows cost. It says nothing of zones, which leave nothing out on average.
        space: where to look.
        seed: of a search of masks. The same seed and the same fidelities give the same trials;
            those of zones are not left to chance.
        speed_up: choose the most faithful plan that is predicted to make a step at least so much
            faster than dense.
        fidelity: choose the fastest plan of at least this PSNR in dB; by proxy, this share kept.

    Raises:
        OptionError: a value out of range, or settings that exclude one another.
    """

    trials: int | None = None
    videos: int = 1
    proxy: bool = False
    space: SearchSpace = field(default_factory=SearchSpace)
    seed: int = 0
    speed_up: float | None = None
    fidelity: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("trials", 1), ("videos", 1), ("seed", 0)):
            value = getattr(self, name)
            if name == "trials" and value is None:
                continue
            if not isinstance(value, int) or value < least:
                raise _error(name, f"an integer of at least {least}", value)
        if not isinstance(self.proxy, bool):
            raise _error("proxy", "True or False", self.proxy)
        if not isinstance(self.space, SearchSpace):
            raise _error("space", "a SearchSpace", self.space)
        if self.proxy and self.space.pooled != (0,):
            raise _error("pooled", "0 with the proxy, which sees dropped mass only", self.space)
        if self.proxy and self.space.gamma != (None,):
            raise _error("gamma", "None with the proxy, which sees dropped mass only", self.space)
        if self.speed_up is not None and self.fidelity is not None:
            raise _error("speed_up", "one goal: a speed-up or a fidelity", "both")

    def number(self, *, zoned: bool) -> int:
        """Return how many plans are tried, of zones or of masks."""
        if self.trials is not None:
            return self.trials
        return ZONE_TRIALS if zoned else TRIALS

    def of_masks(self) -> list[str]:
        """Names of the settings given that say nothing of zones."""
        return sorted((self.space.given() - {"density"}) | ({"proxy"} if self.proxy else set()))


def with_form(config: CalibrationConfig, tuning: TuningConfig) -> CalibrationConfig:
    """Return settings of the calibration whose form is that of the search, given by name.

    Raises:
        OptionError: settings of the one form with the other, or that a search can't judge.
    """
    wanted = tuning.of_masks()
    if config.form is None:
        form: Form = "masks" if wanted or not config.zoned else "zones"
        return with_form(replace(config, form=form), tuning)
    if config.form == "zones":
        if tuning.proxy:
            raise OptionError(
                "kept mass says nothing of zones, which leave nothing out on average",
                expected="proxy=False with zones",
                got="proxy=True",
                remedy="leave it out, or calibrate with error=..., which needs no search",
            )
        if wanted:
            got = getattr(tuning.space, wanted[0])
            raise _error(wanted[0], "the default in a search of zones", got)
        if tuning.seed:
            raise _error("seed", "0: a search of zones takes nothing by chance", tuning.seed)
        return config
    if "density" in tuning.space.given():
        raise _error("density", "the default in a search of masks", tuning.space.density)
    for name in ("pooled", "gamma"):
        value, choices = getattr(config, name), getattr(tuning.space, name)
        if value not in choices:
            raise OptionError(
                f"{name} is not in the search space",
                expected=f"one of {choices}",
                got=value,
                remedy=f"set SearchSpace({name}=...) for it",
            )
    return config


def _error(name: str, expected: str, got: object) -> OptionError:
    return OptionError(
        f"setting {name!r} of a search is out of range",
        expected=expected,
        got=repr(got),
        remedy="TuningConfig describes each setting",
    )
