"""Observes the attention of a model: energies in, packed masks out, site by site."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calibatt_compiler.calibration.config import CalibrationConfig
from calibatt_compiler.calibration.records import InputRecord, SiteSize
from calibatt_compiler.calibration.schedule import Thresholds
from calibatt_compiler.calibration.selection import best_share, pack, select
from calibatt_compiler.calibration.spool import Spool
from calibatt_compiler.calibration.text import TextPosition
from calibatt_compiler.capture import CaptureInfo
from calibatt_compiler.errors import CalibrationError
from calibatt_compiler.plan.schema import ModelIdentity

log = logging.getLogger("calibatt")

Branch = Literal["any", "unknown", "conditional", "unconditional", "batched"]
"""Which branch of classifier-free guidance a model call is.

`any`: every sample counts. `unknown`: a pipeline that does not say; its first call at a timestep
is taken for the conditional one. `batched`: unconditional samples first, then conditional ones.
"""

BEST = 0.2
"""Fraction of key blocks that `best_share` is taken over."""


@dataclass(frozen=True)
class Schedule:
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
class _Mass:
    """Means of one site and step, summed up vote by vote."""

    kept: float = 0.0
    best: float = 0.0


@dataclass
class _Input:
    """What is known of the input in progress."""

    name: str
    about: Mapping[str, Any]
    samples: int | None
    schedule: Schedule | None = None
    timesteps: list[float] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    bits: dict[tuple[str, int], list[npt.NDArray[np.uint8]]] = field(default_factory=dict)
    energies: dict[tuple[str, int], list[npt.NDArray[np.float32]]] = field(default_factory=dict)
    mass: dict[tuple[str, int], _Mass] = field(default_factory=dict)
    votes: Counter[tuple[str, int]] = field(default_factory=Counter)
    unguided_only: bool = True


class AttentionRecorder:
    """Implements `calibatt_compiler.capture.Recorder`.

    Energies of a call live until its masks are packed; where T is not known yet (the first input
    of a bare module) they wait on disk.

    Args:
        config: settings of the calibration.
        model: identity of the module.
        text: where the module's text tokens stand in joint attention.
        spool: where energies wait if T is not known.
        schedule: asked at the first call of each input for the sampler's steps.
        known: timesteps of the inputs that are finished, if any are.
        on_step: told, at each new step, its index and T if known.
    """

    def __init__(
        self,
        config: CalibrationConfig,
        model: ModelIdentity | None,
        text: TextPosition | None,
        spool: Spool,
        *,
        schedule: Callable[[], Schedule | None] = lambda: None,
        on_step: Callable[[int, int | None], None] = lambda step, steps: None,
    ) -> None:
        self.config = config
        self.model = model
        self.text = config.text or text
        self.branch: Branch = "any"
        self.reference: InputRecord | None = None
        self._spool = spool
        self._schedule = schedule
        self._on_step = on_step
        self._grids: list[tuple[int, int, int]] = []
        self._skips: dict[str, str] = {}
        self._sites: dict[str, SiteSize] = {}
        self._input: _Input | None = None

    def on_capture(self, capture: CaptureInfo) -> None:
        """Take note of the grid and of the sites that can't be sparse."""
        if capture.grid is not None and capture.grid not in self._grids:
            self._grids.append(capture.grid)
        for site in capture.sites:
            if site.skip is not None:
                self._skips[site.name] = site.skip

    def attend(  # noqa: PLR0917 - the protocol's order
        self, site: str, q: Tensor, k: Tensor, v: Tensor, timestep: float, scale: float
    ) -> Tensor:
        """Compute dense attention and, where the call counts, select its blocks.

        Shapes as in `calibatt_compiler.capture.Recorder`.

        Raises:
            CalibrationError: sizes or timesteps that don't fit the run, or attention that is not
                finite.
        """
        from calibatt_compiler.kernels.attention import dense_attention
        from calibatt_compiler.kernels.energy import attention_with_energy

        run = self._input
        if run is None:
            return dense_attention(q, k, v, scale)
        if self.branch == "unconditional":
            run.unguided_only = False
        step = self._step(run, site, timestep)
        size = self._size(run, site, q, k)
        counted = self._counted(run, site, step, q.shape[0]) if size is not None else None
        if size is None or counted is None:
            return dense_attention(q, k, v, scale)
        out, energy = attention_with_energy(
            q[counted], k[counted], v[counted], block=self.config.block, scale=scale
        )
        if counted.start:
            rest = slice(0, counted.start)
            other = dense_attention(q[rest], k[rest], v[rest], scale)
            out = torch.cat([other.transpose(1, 2), out.transpose(1, 2)]).transpose(1, 2)
        self._observe(run, size, step, energy)
        return out

    def begin(self, name: str, about: Mapping[str, Any], samples: int | None) -> None:
        """Start an input.

        Args:
            name: of the input.
            about: JSON values that say what it is.
            samples: videos in it, if known; a batch of twice as many is both CFG branches.
        """
        self._input = _Input(name, about, samples)
        self._spool.clear()

    def abandon(self) -> None:
        """Forget the input in progress."""
        self._input = None
        self._spool.clear()

    def finish(self) -> tuple[InputRecord, dict[str, npt.NDArray[Any]]]:
        """End the input; return its record and its arrays by name.

        Raises:
            CalibrationError: nothing was observed, or not every site at every step.
        """
        run = self._input
        assert run is not None
        self._check_complete(run)
        steps = self._steps(run) or len(run.timesteps)
        thresholds = self.config.thresholds(steps)
        for site, step, energy in self._spool.drain():
            self._select(run, self._sites[site], step, torch.from_numpy(energy), steps)
        arrays: dict[str, npt.NDArray[Any]] = {}
        for (site, step), votes in run.bits.items():
            arrays[f"{site}@{step}"] = np.concatenate(votes)
        for (site, step), energies in run.energies.items():
            arrays[f"{site}@{step}/energy"] = np.concatenate(energies)
        record = self._record(run, steps, thresholds)
        self._input = None
        self._spool.clear()
        return record, arrays

    def _record(self, run: _Input, steps: int, thresholds: Thresholds) -> InputRecord:
        names = list(dict.fromkeys(site for site, _ in run.votes))
        sites = tuple(self._sites[name] for name in names)
        order = range(len(run.timesteps))
        schedule = run.schedule
        sigmas = schedule.sigmas if schedule else None
        return InputRecord(
            name=run.name,
            about=dict(run.about),
            model=self.model,
            grid=self._grid(sites[0].query_length),
            text=self.text,
            block=self.config.block,
            scheduler=schedule.name if schedule else None,
            timesteps=tuple(run.timesteps),
            sigmas=tuple(sigmas[i] for i in run.positions) if sigmas else None,
            positions=tuple(run.positions),
            schedule_steps=steps,
            thresholds={"A": thresholds.A, "C": thresholds.C, "k": thresholds.k},
            unguided_only=run.unguided_only,
            sites=sites,
            votes={name: tuple(run.votes[name, step] for step in order) for name in names},
            kept_mass={
                name: tuple(run.mass[name, i].kept / run.votes[name, i] for i in order)
                for name in names
            },
            best_share={
                name: tuple(run.mass[name, i].best / run.votes[name, i] for i in order)
                for name in names
            },
        )

    def _step(self, run: _Input, site: str, timestep: float) -> int:
        """Return the step of a timestep: its rank by first appearance in the input."""
        if not math.isfinite(timestep):
            raise CalibrationError(
                f"the timestep at site {site} is not one number",
                expected="all samples of a call at the same diffusion step",
                got=timestep,
                remedy="calibrate with inputs whose samples and tokens share their timestep",
            )
        if timestep in run.timesteps:
            return run.timesteps.index(timestep)
        step = len(run.timesteps)
        if self.reference is not None and timestep not in self.reference.timesteps[step : step + 1]:
            expected = self.reference.timesteps
            raise CalibrationError(
                f"input {run.name} has other timesteps than the inputs before it",
                expected=f"{expected[step] if step < len(expected) else 'no more'} at step {step} "
                f"of {len(expected)}",
                got=timestep,
                remedy="run all inputs with the same sampler and number of steps",
            )
        if step == 0:
            run.schedule = self._schedule()
        run.timesteps.append(timestep)
        use_schedule = run.schedule is not None and self.config.num_steps is None
        run.positions.append(
            run.schedule.position(timestep, step) if run.schedule and use_schedule else step
        )
        self._on_step(step, self._steps(run))
        return step

    def _steps(self, run: _Input) -> int | None:
        """T of the threshold formula, if it is known before the input ends."""
        if self.config.num_steps is not None:
            return self.config.num_steps
        if run.schedule is not None:
            return len(run.schedule.timesteps)
        return self.reference.schedule_steps if self.reference else None

    def _grid(self, length: int) -> tuple[int, int, int]:
        """The latent grid; of an unknown model family, one frame of one row of all tokens."""
        if self.config.grid is not None:
            return self.config.grid
        return self._grids[0] if self._grids else (1, 1, length)

    def _size(self, run: _Input, site: str, q: Tensor, k: Tensor) -> SiteSize | None:
        """Check the sizes of a call against the run; None if it attends from less than a video."""
        if len(self._grids) > 1:
            raise self._other_size(run, self._grids[0], self._grids[-1])
        size = SiteSize(
            name=site,
            heads=q.shape[1],
            head_dim=q.shape[3],
            query_length=q.shape[2],
            key_length=k.shape[2],
        )
        if math.prod(self._grid(size.query_length)) > size.query_length:
            self._skips.setdefault(site, "fewer queries than video tokens")
            return None
        known = self._sites
        if not known and self.reference is not None:
            known.update({record.name: record for record in self.reference.sites})
        if known.setdefault(site, size) != size:
            raise self._other_size(run, known[site], size)
        return size

    @staticmethod
    def _other_size(run: _Input, expected: object, got: object) -> CalibrationError:
        return CalibrationError(
            f"input {run.name} has another size than the inputs before it",
            expected=expected,
            got=got,
            remedy="a plan serves one size of video: calibrate each size on its own",
        )

    def _counted(self, run: _Input, site: str, step: int, batch: int) -> slice | None:
        """Return the samples of a call whose attention counts, or None if none does."""
        if self.config.cfg == "both" or self.branch == "any":
            return slice(0, None)
        if self.branch == "unconditional":
            return None
        if self.branch == "unknown" and run.votes[site, step]:
            return None
        # An unknown branch: only a known number of samples tells two branches from two videos.
        may_double = self.branch == "batched" or run.samples is not None
        doubled = batch == 2 * run.samples if run.samples else batch % 2 == 0
        if self.branch in ("batched", "unknown") and may_double and doubled:
            run.unguided_only = False
            return slice(batch // 2, None)
        return slice(0, None)

    def _observe(self, run: _Input, size: SiteSize, step: int, energy: Tensor) -> None:
        if not bool(energy.isfinite().all()):
            raise CalibrationError(
                f"attention at site {size.name}, step {step} is not finite",
                expected="finite attention weights",
                got="NaN or infinity",
                remedy="check that the model makes sound videos in this dtype without calibatt",
            )
        run.votes[size.name, step] += energy.shape[0]
        steps = self._steps(run)
        if steps is None:
            self._spool.put(size.name, step, energy.float().cpu().numpy())
        else:
            self._select(run, size, step, energy, steps)

    def _select(self, run: _Input, size: SiteSize, step: int, energy: Tensor, steps: int) -> None:
        threshold = self.config.thresholds(steps).at(run.positions[step], steps)
        video = math.prod(self._grid(size.query_length))
        mask, kept = select(
            energy,
            threshold,
            lengths=(size.query_length, size.key_length),
            video=video,
            block=self.config.block,
            text=self.text,
        )
        run.bits.setdefault((size.name, step), []).append(pack(mask))
        if self.config.keep_energies:
            stored = energy.float().cpu().numpy()
            run.energies.setdefault((size.name, step), []).append(stored)
        mass = run.mass.setdefault((size.name, step), _Mass())
        shares = torch.stack([kept, best_share(energy, BEST)]).mean((-1, -2)).sum(-1).tolist()
        mass.kept += shares[0]
        mass.best += shares[1]

    def _check_complete(self, run: _Input) -> None:
        if not run.votes:
            counts = Counter(self._skips.values())
            raise CalibrationError(
                f"no attention call of input {run.name} was observed",
                expected="at least one self-attention call of the model",
                got=f"{len(self._skips)} skipped ({dict(counts)})"
                if counts
                else "no captured call",
                remedy="call the module itself within run.input(), on the conditional branch; "
                "with CALIBATT_DEBUG_DIR the captured graphs are written down",
            )
        names = {site for site, _ in run.votes}
        steps = range(len(run.timesteps))
        missing = [
            (name, step) for name in sorted(names) for step in steps if not run.votes[name, step]
        ]
        reference = self.reference
        if reference is not None:
            known = {site.name for site in reference.sites}
            missing += [(name, 0) for name in sorted(known ^ names)]
            if not missing and len(reference.timesteps) != len(run.timesteps):
                missing = [("any site", len(run.timesteps))]
        if missing:
            site, step = missing[0]
            raise CalibrationError(
                f"input {run.name} was not observed whole",
                expected=f"each of {len(names)} sites at each of {len(run.timesteps)} steps, the "
                "same for all inputs",
                got=f"{len(missing)} missing, first: {site} at step {step}",
                remedy="run every input over the whole schedule; a cache that leaves out layers "
                "or steps must be off while calibrating",
            )
