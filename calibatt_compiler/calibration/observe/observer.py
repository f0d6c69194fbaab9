"""Observes the attention of a model: which calls count, at which step, and their energies."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from calibatt_compiler.calibration.config import CalibrationConfig
from calibatt_compiler.calibration.observe.attach import observed
from calibatt_compiler.calibration.observe.observation import (
    Branch,
    InputObservation,
    SamplerSchedule,
)
from calibatt_compiler.calibration.observe.repeated_samples import CallSamples
from calibatt_compiler.calibration.select.repetition_scores import AttentionCall
from calibatt_compiler.calibration.store.records import InputRecord, SiteSize
from calibatt_compiler.capture import CaptureInfo
from calibatt_compiler.errors import CalibrationError
from calibatt_compiler.kernels.common.dense import dense_attention
from calibatt_compiler.kernels.common.padding import KeyPadding
from calibatt_compiler.kernels.energy import attention_with_energy
from calibatt_compiler.model.families import text_position
from calibatt_compiler.plan.coordinates import OF_VIDEO, digest_of, grid_of
from calibatt_compiler.plan.order import RASTER, TokenOrder
from calibatt_compiler.plan.schema import FixedBy
from calibatt_compiler.plan.text import TextPosition, other_text
from calibatt_compiler.runtime.coordinates import video_part
from calibatt_compiler.runtime.token_order import Rearrangement, Rearrangements


@dataclass(frozen=True, kw_only=True)
class ObservedModel:
    """A module, how it is observed, and how its steps are followed.

    Attributes:
        module: not its compiled wrapper.
        config: settings of the calibration.
        schedule: asked at the first call of each input for the sampler's steps.
        on_step: receives the index of each new step, and T if known.
    """

    module: torch.nn.Module
    config: CalibrationConfig
    schedule: Callable[[], SamplerSchedule | None] = lambda: None
    on_step: Callable[[int, int | None], None] = lambda step, steps: None

    @property
    def text(self) -> TextPosition | None:
        """Where text tokens stand in joint attention."""
        return self.config.text or text_position(type(self.module))

    @contextmanager
    def shown_to(self, observer: Observer) -> Iterator[None]:
        """Compile the module so that an observer sees its attention; undo it at the end."""
        with observed(self.module, observer, self.config.inductor):
            yield


class Observer(ABC):
    """Implements `calibatt_compiler.capture.Recorder`; what becomes of the calls is its child's.

    Attributes:
        branch: which branch of guidance the model calls are now.
        reference: record of a finished input, which later ones must fit.

    Args:
        model: what is observed.
    """

    def __init__(self, model: ObservedModel) -> None:
        self.branch: Branch = "any"
        self.reference: InputRecord | None = None
        self._model = model
        self._config = model.config
        self._text = model.text
        self._grids: list[tuple[int, int, int]] = []
        self._skips: dict[str, str] = {}
        self._rearrangements = Rearrangements()
        self._sites: dict[str, SiteSize] = {}
        self._input: InputObservation | None = None

    @property
    def joint(self) -> bool:
        """Whether text and video share a sequence, whose length then is that of the text too."""
        return self._text is not None

    @contextmanager
    def calls_are(self, branch: Branch) -> Iterator[None]:
        """Take the calls within this context for calls of a branch of guidance."""
        previous, self.branch = self.branch, branch
        try:
            yield
        finally:
            self.branch = previous

    def on_model_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Look at a call of the model, before it runs: which samples does it hold?"""
        if self._input is not None:
            self._input.call = CallSamples.of(args, kwargs)

    def on_capture(self, capture: CaptureInfo) -> None:
        """Record the grid and the sites that can't be sparse."""
        for site in capture.sites:
            if site.skip is not None:
                self._skips[site.name] = site.skip
        lengths = [site.query_length for site in capture.sites if site.skip is None]
        grid = capture.grid
        # What a rule reads of an unknown family's latents may be no grid of tokens.
        if grid is not None and (capture.known or math.prod(grid) <= max(lengths, default=0)):
            self._note_grid(grid)

    def on_call(self, capture: CaptureInfo) -> None:
        """Record what fixes the tokens of an input's call."""
        if capture.fixed_by is not None and any(site.skip is None for site in capture.sites):
            self._fix(capture.fixed_by)

    def on_coordinates(self, name: str, coordinates: Tensor) -> None:
        """Record where tokens stand: of the grid, if they are in raster order."""
        run = self._input
        if run is None:
            return
        grid = self._config.grid or (self._grids[0] if self._grids else None)
        video = coordinates.numel() if grid is None else math.prod(grid)
        placed = video_part(name, coordinates, video, self._text)
        digest = None if placed is None else digest_of(placed)
        if placed is None or digest is None:
            return
        if name in OF_VIDEO and (found := grid_of(placed)) is not None:
            self._note_grid(found)
        run.coordinates.setdefault(name, set()).add(digest)
        if name in OF_VIDEO:
            self._check_layout(FixedBy(grid="call", coordinates={name: digest}))

    def _note_grid(self, grid: tuple[int, int, int]) -> None:
        if grid not in self._grids:
            self._grids.append(grid)

    def _fix(self, fixed_by: FixedBy) -> None:
        run = self._input
        if run is not None:
            self._check_layout(fixed_by)
            run.fixed_by = fixed_by if run.fixed_by is None else run.fixed_by.agreed(fixed_by)

    def _check_layout(self, now: FixedBy) -> None:
        """Raise `CalibrationError` if a call lays its tokens out otherwise than those before it."""
        run = self._input
        assert run is not None
        reference = None if self.reference is None else self.reference.fixed_by
        for before in (self._layout_of(run), reference):
            if before is not None and (what := before.contradicts(now)):
                raise _another_size(run, "the token layout of the calls before", what)

    def _layout_of(self, run: InputObservation) -> FixedBy | None:
        """Return what fixed the tokens of an input so far."""
        if run.fixed_by is None:
            return None
        alike = {name: min(found) for name, found in run.coordinates.items() if len(found) == 1}
        source: Literal["call", "settings", "length"] = "call" if self._grids else "length"
        if self._config.grid is not None:
            source = "settings"
        return run.fixed_by.model_copy(update={"coordinates": alike, "grid": source})

    @abstractmethod
    def attend(
        self,
        site: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        timestep: float,
        scale: float,
        mask: KeyPadding | Tensor | None = None,
    ) -> Tensor:
        """Compute dense attention and, where the call counts, observe it.

        Shapes: see `calibatt_compiler.capture.Recorder`.

        Raises:
            CalibrationError: sizes or timesteps that don't fit the run, or attention that is not
                finite.
        """

    def begin(self, name: str, about: Mapping[str, Any], samples: int | None) -> None:
        """Start an input.

        Args:
            name: of the input.
            about: JSON values that say what it is.
            samples: videos in it, if known for certain; a batch of twice as many is both
                branches.
        """
        self._input = InputObservation(name, about, samples, self.reference)

    def abandon(self) -> None:
        """Forget the input in progress, if there is one."""
        self._input = None

    def _counted(
        self,
        site: str,
        q: Tensor,
        k: Tensor,
        timestep: float,
        mask: KeyPadding | Tensor | None = None,
    ) -> tuple[InputObservation, SiteSize, int, slice] | None:
        """Return input, size, step and samples that a call counts for; None if it does not.

        Raises:
            CalibrationError: sizes or timesteps that don't fit the run.
        """
        run = self._input
        size = None if run is None or self._block(site) is None else self._size(run, site, q, k)
        if size is not None and isinstance(mask, Tensor):
            self._skips.setdefault(site, "masked: more than padded keys are cut")
            return None
        if run is None or size is None:
            return None
        step = self._step(run, site, timestep)
        counted = run.counted(self.branch, site, step, q.shape[0])
        if self._config.cfg == "both":
            counted = slice(0, None)
        if counted is None:
            return None
        if run.sizes.setdefault(site, size) != size:
            raise _another_size(run, run.sizes[site], size)
        return run, size, step, counted

    def _block(self, site: str) -> tuple[int, int] | None:
        """Tokens a query block and a key block of a site; None if it is not observed."""
        return self._config.block

    def _order(self) -> TokenOrder:
        """How tokens are laid out before they are cut into blocks."""
        return TokenOrder.parse(self._config.token_order)

    def _rearrangement(self, x: Tensor) -> Rearrangement | None:
        length = x.shape[2]
        if self._order() != RASTER and self._config.grid is None and not self._grids:
            raise CalibrationError(
                f"tokens can't be laid out in the order {self._order()} without their grid",
                expected="a model whose grid can be read, or CalibrationConfig(grid=...)",
                got="neither: the calls show only how many tokens there are",
                remedy="pass grid=(frames, height, width) in tokens, or leave token_order out",
            )
        return self._rearrangements.of(
            self._order(),
            self._grid(length),
            length,
            text_first=self._text == "first",
            device=x.device,
        )

    def _step(self, run: InputObservation, site: str, timestep: float) -> int:
        step = run.find_step(site, timestep)
        if step is None:
            if not run.timesteps:
                run.schedule = self._model.schedule()
            step = run.add_step(timestep, by_schedule=self._config.num_steps is None)
            self._model.on_step(step, self._steps(run))
        return step

    def _steps(self, run: InputObservation) -> int | None:
        """T of the threshold formula, if it is known before the input ends."""
        if self._config.num_steps is not None:
            return self._config.num_steps
        if run.schedule is not None:
            return len(run.schedule.timesteps)
        return self.reference.schedule_steps if self.reference else None

    def _grid(self, length: int) -> tuple[int, int, int]:
        """The latent grid; of an unknown model family, one frame of one row of all tokens."""
        if self._config.grid is not None:
            return self._config.grid
        return self._grids[0] if self._grids else (1, 1, length)

    def _size(self, run: InputObservation, site: str, q: Tensor, k: Tensor) -> SiteSize | None:
        """Check the sizes of a call against the run; None if it attends from less than a video."""
        if len(self._grids) > 1 and self._config.grid is None:
            raise _another_size(run, self._grids[0], self._grids[-1])
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
        if not self._sites and self.reference is not None:
            self._sites.update({known.name: known for known in self.reference.sites})
        known = self._sites.setdefault(site, size)
        if not self._alike(known, size):
            raise _another_size(run, known, size)
        return size

    def _alike(self, known: SiteSize, size: SiteSize) -> bool:
        """Whether two sizes of a site are equal but for the length of the text."""
        lengths = (size.query_length, size.key_length)
        planned = (known.query_length, known.key_length)
        if lengths == planned:
            return size == known
        same = {"query_length": planned[0], "key_length": planned[1]}
        video = math.prod(self._grid(size.query_length))
        return (
            self._text is not None
            and size.model_copy(update=same) == known
            and other_text(planned, lengths, video)
        )


class EnergyObserver(Observer):
    """Observes the block energies of each call; what becomes of them is its child's."""

    def attend(
        self,
        site: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        timestep: float,
        scale: float,
        mask: KeyPadding | Tensor | None = None,
    ) -> Tensor:
        """Compute dense attention and, where the call counts, observe its energies."""
        call = self._counted(site, q, k, timestep, mask)
        block = self._block(site)
        if call is None or block is None or isinstance(mask, Tensor):
            return dense_attention(q, k, v, scale, mask)
        run, size, step, counted = call
        orders = [self._rearrangement(x) for x in (q, k)]
        observed = [
            x[counted] if order is None else order.apply(x[counted])
            for x, order in zip((q, k, v), (orders[0], orders[1], orders[1]), strict=True)
        ]
        padding = None if mask is None else mask.part(counted)
        laid = (
            padding if orders[1] is None or padding is None else padding.ordered(orders[1].tokens)
        )
        out, energy = attention_with_energy(
            *observed, block=block, scale=scale, queries=1 / self._config.queries, padding=laid
        )
        if orders[0] is not None:
            out = orders[0].undo(out)
        seen = AttentionCall(
            q[counted], k[counted], v[counted], out, scale, (orders[0], orders[1]), padding
        )
        if counted.start:
            rest = slice(0, counted.start)
            other_mask = None if mask is None else mask.part(rest)
            other = dense_attention(q[rest], k[rest], v[rest], scale, other_mask)
            out = torch.cat([other.transpose(1, 2), out.transpose(1, 2)]).transpose(1, 2)
        if not bool(energy.isfinite().all()):
            raise not_finite(site, step)
        run.votes[site, step] += energy.shape[0]
        self._observe(run, size, step, energy, seen)
        return out

    @abstractmethod
    def _observe(
        self, run: InputObservation, size: SiteSize, step: int, energy: Tensor, call: AttentionCall
    ) -> None:
        """Receive a call; energies are float32 (votes, heads, query_blocks, key_blocks)."""


def not_finite(site: str, step: int) -> CalibrationError:
    """Return what to raise for attention that is not finite."""
    return CalibrationError(
        f"attention at site {site}, step {step} is not finite",
        expected="finite attention weights",
        got="NaN or infinity",
        remedy="check that the model makes sound videos in this dtype without calibatt",
    )


def _another_size(run: InputObservation, expected: object, got: object) -> CalibrationError:
    return CalibrationError(
        f"input {run.name} has another size than the inputs before it",
        expected=expected,
        got=got,
        remedy="a plan serves one size of video: calibrate each size on its own",
    )
