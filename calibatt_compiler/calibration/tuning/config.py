"""Settings of a search for thresholds, checked where they are given."""

from __future__ import annotations

from dataclasses import dataclass, field

from calibatt_compiler.calibration.tuning.study import SearchSpace
from calibatt_compiler.errors import OptionError

TRIALS = 40


@dataclass(frozen=True)
class TuningConfig:
    """How thresholds are searched.

    Attributes:
        trials: how many plans are tried, those of an earlier, interrupted search included.
        videos: how many of the inputs are generated in each trial; the first ones.
        proxy: go by the share of attention mass that a plan keeps on the inputs instead, from the
            recorded energies: no video is generated. It can't see what pooling gains,
            nor what copied rows cost.
        space: where to look.
        seed: of the search. The same seed and the same fidelities give the same trials.
        speed_up: choose the most faithful plan that is predicted to make a step at least so much
            faster than dense.
        fidelity: choose the fastest plan of at least this PSNR in dB; by proxy, this share kept.

    Raises:
        OptionError: a value out of range, or settings that exclude one another.
    """

    trials: int = TRIALS
    videos: int = 1
    proxy: bool = False
    space: SearchSpace = field(default_factory=SearchSpace)
    seed: int = 0
    speed_up: float | None = None
    fidelity: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("trials", 1), ("videos", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise _error(name, f"an integer of at least {least}", value)
        if self.proxy and self.space.pooled != (0,):
            raise _error("pooled", "0 with the proxy, which sees dropped mass only", self.space)
        if self.proxy and self.space.gamma != (None,):
            raise _error("gamma", "None with the proxy, which sees dropped mass only", self.space)
        if self.speed_up is not None and self.fidelity is not None:
            raise _error("speed_up", "one goal: a speed-up or a fidelity", "both")


def _error(name: str, expected: str, got: object) -> OptionError:
    return OptionError(
        f"setting {name!r} of a search is out of range",
        expected=expected,
        got=repr(got),
        remedy="TuningConfig describes each setting",
    )
