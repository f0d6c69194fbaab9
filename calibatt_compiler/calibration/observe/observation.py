"""What one input in progress has shown so far, and whether it fits the inputs before it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from calibatt_compiler.calibration.observe.repeated_samples import CallSamples
from calibatt_compiler.calibration.select.repetition_scores import ARRAY, Scores
from calibatt_compiler.calibration.store.records import InputRecord, SiteSize
from calibatt_compiler.errors import CalibrationError
from calibatt_compiler.plan.schema import FixedBy

Branch = Literal["any", "unknown", "conditional", "unconditional", "paired", "batched"]
"""Which branch of classifier-free guidance a model call is.

`any`: every sample counts. `batched`: unconditional samples first, then conditional ones.
`paired`: like `batched` where guidance is on, which it is if both halves of the batch hold the same
noise; else all conditional. `unknown`: a pipeline that does not say; its first call at a timestep
is taken for the conditional one, or for a paired one.
"""

Key = tuple[str, int]
"""Site name and step."""


@dataclass(frozen=True)
class SamplerSchedule:
    """What a pipeline's scheduler says of the steps to come.

    Attributes:
        timesteps: distinct values, in sampling order.
        sigmas: noise levels of the same steps, if known.
        name: class of the scheduler.
    """

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...] | None = None
    name: str | None = None

    def position(self, timestep: float, order: int) -> int:
        """Place of a timestep in the schedule; `order` where the model counts otherwise."""
        nearest = min(range(len(self.timesteps)), key=lambda i: abs(self.timesteps[i] - timestep))
        distance = abs(self.timesteps[nearest] - timestep)
        # bfloat16, which some pipelines pass timesteps in, rounds by this much.
        return nearest if distance <= 2.0**-8 * abs(timestep) else order


@dataclass
class InputObservation:
    """One input in progress.

    Attributes:
        name: of the input.
        about: JSON values that say what it is.
        samples: videos in it, if known for certain; a batch of twice as many is both branches.
        reference: record of a finished input that this one must fit, if there is one.
        schedule: the sampler's steps, if known.
        timesteps: what the model was given, by first appearance.
        positions: place of each in the schedule.
        sizes: sizes of each site's calls; text may be of another length than in `reference`.
        bits: packed masks by site and step, one array a call.
        energies: energies by site and step, mapped from disk, if they are kept.
        kept_mass: share of attention mass that the masks keep, summed over votes.
        best_share: share in the best key blocks, summed over votes.
        scores: of spatial repetition, by site and step, one array a call, if they are taken.
        scored: whether they are.
        votes: masks by site and step.
        guided: whether a call of an unconditional branch was seen.
        batched: whether a call held both branches.
        call: what the model's call under way says of its samples, if it could be read.
        fixed_by: what fixed the tokens of all its calls, but for coordinates.
        coordinates: of tokens, by argument the digests that were seen.
    """

    name: str
    about: Mapping[str, Any]
    samples: int | None
    reference: InputRecord | None
    schedule: SamplerSchedule | None = None
    timesteps: list[float] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    sizes: dict[str, SiteSize] = field(default_factory=dict)
    bits: dict[Key, list[npt.NDArray[np.uint8]]] = field(default_factory=dict)
    energies: dict[Key, npt.NDArray[Any]] = field(default_factory=dict)
    scores: dict[Key, list[Scores]] = field(default_factory=dict)
    scored: bool = False
    kept_mass: Counter[Key] = field(default_factory=Counter)
    best_share: Counter[Key] = field(default_factory=Counter)
    votes: Counter[Key] = field(default_factory=Counter)
    guided: bool = False
    batched: bool = False
    call: CallSamples | None = None
    fixed_by: FixedBy | None = None
    coordinates: dict[str, set[str]] = field(default_factory=dict)

    def find_step(self, site: str, timestep: float) -> int | None:
        """Return the step of a timestep, or None if it is a new one.

        Raises:
            CalibrationError: the timestep is not one number, or not that of the inputs before.
        """
        if not math.isfinite(timestep):
            raise CalibrationError(
                f"the timestep at site {site} is not one number",
                expected="all samples of a call at the same diffusion step",
                got=timestep,
                remedy="calibrate with inputs whose samples share their timestep",
            )
        if timestep in self.timesteps:
            return self.timesteps.index(timestep)
        step = len(self.timesteps)
        expected = self.reference.timesteps if self.reference else (timestep,) * (step + 1)
        if timestep not in expected[step : step + 1]:
            raise CalibrationError(
                f"input {self.name} has other timesteps than the inputs before it",
                expected=f"{expected[step] if step < len(expected) else 'no more'} at step {step} "
                f"of {len(expected)}",
                got=timestep,
                remedy="run all inputs with the same sampler and number of steps",
            )
        return None

    def add_step(self, timestep: float, *, by_schedule: bool) -> int:
        """Append a new step and return its index."""
        step = len(self.timesteps)
        self.timesteps.append(timestep)
        schedule = self.schedule if by_schedule else None
        self.positions.append(schedule.position(timestep, step) if schedule else step)
        return step

    def counted(self, branch: Branch, site: str, step: int, batch: int) -> slice | None:
        """Return the samples of a call on the conditional branch, or None if there are none.

        Raises:
            CalibrationError: samples of both branches can't be told apart.
        """
        if branch in ("any", "conditional"):
            return slice(0, None)
        if branch == "unconditional" or (branch == "unknown" and self.votes[site, step]):
            self.guided = True
            return None
        if not self._holds_both(branch, batch):
            return slice(0, None)
        self.guided = self.batched = True
        if batch % 2:
            raise CalibrationError(
                f"samples of both branches of guidance can't be told apart at site {site}",
                expected="attention over a batch, unconditional samples first",
                got=f"a batch of {batch}",
                remedy="calibrate without guidance: guidance_scale=1",
            )
        return slice(batch // 2, None)

    def _holds_both(self, branch: Branch, batch: int) -> bool:
        """Whether a call holds both branches. Attention may see the model's batch folded."""
        call = self.call
        if self.samples is not None:
            for size in (call.batch if call else batch, batch):
                if size == self.samples:
                    return False
                twice = size == 2 * self.samples
                if twice and (branch == "batched" or call is None or call.copies % 2 == 0):
                    return True
            if branch == "batched":
                raise CalibrationError(
                    f"a batch of input {self.name} is neither one branch of guidance nor both",
                    expected=f"{self.samples} samples, or {2 * self.samples}",
                    got=call.batch if call else batch,
                    remedy="say how many videos are generated at once: run.input(samples=...)",
                )
        if branch == "batched" or call is None:
            return branch != "unknown" and batch % 2 == 0
        if call.copies > 2:
            raise CalibrationError(
                f"a batch of input {self.name} holds more than two branches",
                expected="unconditional samples, then conditional ones",
                got=f"each sample {call.copies} times",
                remedy="calibrate without guidance: guidance_scale=1",
            )
        return call.copies == 2

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Masks, energies and scores by name, as the run folder stores them."""
        arrays: dict[str, npt.NDArray[Any]] = {}
        for (site, step), bits in self.bits.items():
            arrays[f"{site}@{step}"] = bits[0] if len(bits) == 1 else np.concatenate(bits)
        for (site, step), energies in self.energies.items():
            arrays[f"{site}@{step}/energy"] = energies
        for (site, step), scores in self.scores.items():
            arrays[f"{site}@{step}/{ARRAY}"] = np.concatenate(scores, axis=1)
        return arrays

    def check_complete(self, skips: Mapping[str, str]) -> None:
        """Check that each site was observed at each step.

        Args:
            skips: sites that can't be observed, with the reason.

        Raises:
            CalibrationError: nothing was observed, or not all, or not what the inputs before show.
        """
        if not self.votes:
            counts = dict(Counter(skips.values()))
            raise CalibrationError(
                f"no attention call of input {self.name} was observed",
                expected="at least one self-attention call of the model",
                got=f"{len(skips)} skipped: {counts}" if counts else "no captured call",
                remedy="call the module itself within run.input(), on the conditional branch; "
                "with CALIBATT_DEBUG_DIR the captured graphs are written down",
            )
        names = {site for site, _ in self.votes}
        steps = len(self.timesteps)
        if self.reference is not None:
            names |= {site.name for site in self.reference.sites}
            steps = max(steps, len(self.reference.timesteps))
        missing = [
            (name, step)
            for name in sorted(names)
            for step in range(steps)
            if not self.votes[name, step]
        ]
        if missing:
            site, step = missing[0]
            raise CalibrationError(
                f"input {self.name} was not observed whole",
                expected=f"each of {len(names)} sites at each of {steps} steps",
                got=f"{len(missing)} missing, first: {site} at step {step}",
                remedy="run every input over the whole schedule; a cache that leaves out layers "
                "or steps must be off while calibrating",
            )
