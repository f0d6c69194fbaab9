"""Observes the attention of a model: energies in, packed masks out, call by call."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from calibatt_compiler.calibration.observe.observation import InputObservation
from calibatt_compiler.calibration.observe.observer import EnergyObserver, ObservedModel
from calibatt_compiler.calibration.select.repetition_scores import (
    AttentionCall,
    at_other_share,
    copies_of,
    measure,
)
from calibatt_compiler.calibration.select.selection import best_share, pack, select
from calibatt_compiler.calibration.store.energies import EnergyBuffer
from calibatt_compiler.calibration.store.records import InputRecord, SiteSize
from calibatt_compiler.calibration.store.uint8_energies import encode
from calibatt_compiler.errors import CalibrationError
from calibatt_compiler.model.families import identify
from calibatt_compiler.plan.order import TokenOrder
from calibatt_compiler.plan.text import fit_mask

BEST = 0.2
"""Fraction of key blocks that `best_share` is taken over."""

_PROBE = 0.84
"""Threshold of the mask whose error is measured where that of the step is not known yet."""


class AttentionRecorder(EnergyObserver):
    """Selects the blocks of each call and gives back the packed masks of an input.

    Energies of a call live until its masks are packed; where T is not known yet (the first input
    of a bare module) they wait on disk, and so do those that are kept, until the input is stored.

    Args:
        model: what is observed.
        buffer: where energies wait.
    """

    def __init__(self, model: ObservedModel, buffer: EnergyBuffer) -> None:
        super().__init__(model)
        self._identity = identify(model.module)
        self._buffer = buffer

    def begin(
        self, name: str, about: Mapping[str, Any], samples: int | None, *, scored: bool = False
    ) -> None:
        """Start an input.

        Args:
            name: of the input.
            about: JSON values that say what it is.
            samples: videos in it, if known; a batch of twice as many is both branches.
            scored: measure spatial repetition too.
        """
        super().begin(name, about, samples)
        assert self._input is not None
        self._input.scored = scored
        self._buffer.clear()

    def abandon(self) -> None:
        """Forget the input in progress, if there is one."""
        super().abandon()
        self._buffer.clear()

    def finish(self) -> tuple[InputRecord, dict[str, npt.NDArray[Any]]]:
        """End the input; return its record and its arrays by name.

        Raises:
            CalibrationError: nothing was observed, or not every site at every step.
        """
        run = self._input
        assert run is not None
        run.check_complete(self._skips)
        steps = self._steps(run) or len(run.timesteps)
        for site, step, energy in self._buffer.drain():
            self._select(run, run.sizes[site], step, torch.from_numpy(energy), steps)
        self._input = None
        return self._record(run, steps), run.arrays()

    def _record(self, run: InputObservation, steps: int) -> InputRecord:
        names = list(dict.fromkeys(site for site, _ in run.votes))
        order = range(len(run.timesteps))
        thresholds = self._config.thresholds(steps)
        sigmas = run.schedule.sigmas if run.schedule else None

        def means(sums: Mapping[tuple[str, int], float]) -> dict[str, tuple[float, ...]]:
            return {
                name: tuple(sums[name, step] / run.votes[name, step] for step in order)
                for name in names
            }

        return InputRecord(
            name=run.name,
            about=dict(run.about),
            model=self._identity,
            grid=self._grid(self._sites[names[0]].query_length),
            text=self._text,
            block=self._config.block,
            token_order=str(TokenOrder.parse(self._config.token_order)),
            scheduler=run.schedule.name if run.schedule else None,
            timesteps=tuple(run.timesteps),
            sigmas=tuple(sigmas[position] for position in run.positions) if sigmas else None,
            positions=tuple(run.positions),
            schedule_steps=steps,
            thresholds={"A": thresholds.A, "C": thresholds.C, "k": thresholds.k},
            guided=run.guided,
            batched=run.batched,
            sites=tuple(self._sites[name] for name in names),
            votes={name: tuple(run.votes[name, step] for step in order) for name in names},
            kept_mass=means(run.kept_mass),
            best_share=means(run.best_share),
            anchor_rows=self._config.anchor_rows if run.scored else 0,
            fixed_by=self._layout_of(run),
        )

    def _observe(
        self, run: InputObservation, size: SiteSize, step: int, energy: Tensor, call: AttentionCall
    ) -> None:
        steps = self._steps(run)
        if steps is not None:
            self._select(run, size, step, energy, steps, call)
            return
        self._buffer.put(size.name, step, energy.float().cpu().numpy())
        # The operands can't wait for the threshold: its error follows from that of another.
        if run.scored:
            self._score(run, size, step, call, *self._covering(energy, size, _PROBE))

    def _covering(self, energy: Tensor, size: SiteSize, threshold: float) -> tuple[Tensor, Tensor]:
        return select(
            energy,
            threshold,
            lengths=(size.query_length, size.key_length),
            video=math.prod(self._grid(size.query_length)),
            block=self._config.block,
            text=self._text,
        )

    def _score(
        self,
        run: InputObservation,
        size: SiteSize,
        step: int,
        call: AttentionCall,
        mask: Tensor,
        kept: Tensor,
    ) -> None:
        grid, rows = self._grid(size.query_length), self._config.anchor_rows
        copies = copies_of(grid, size.query_length, self._text, rows)
        if copies is not None:
            scores = measure(call, mask, kept, copies, self._config.block)
            run.scores.setdefault((size.name, step), []).append(scores)

    def _select(
        self,
        run: InputObservation,
        size: SiteSize,
        step: int,
        energy: Tensor,
        steps: int,
        call: AttentionCall | None = None,
    ) -> None:
        key = (size.name, step)
        threshold = self._config.thresholds(steps).at(run.positions[step], steps)
        mask, kept = self._covering(energy, size, threshold)
        if call is not None and run.scored:
            self._score(run, size, step, call, mask, kept)
        elif key in run.scores:
            which = len(run.bits.get(key, []))
            run.scores[key][which] = at_other_share(run.scores[key][which], kept)
        run.bits.setdefault(key, []).append(pack(self._fitted(mask, size)))
        if self._config.keep_energies:
            host = energy.float().cpu().numpy()
            coarse = self._config.keep_energies == "coarse"
            run.energies[key] = self._buffer.keep(
                encode(host) if coarse else host, run.energies.get(key)
            )
        shares = torch.stack([kept, best_share(energy, BEST)]).mean((-1, -2)).sum(-1).tolist()
        run.kept_mass[key] += shares[0]
        run.best_share[key] += shares[1]

    def _fitted(self, mask: Tensor, size: SiteSize) -> Tensor:
        """Carry a mask over to the text length of the first input, which that of the plan is."""
        known = self._sites[size.name]
        if size == known:
            return mask
        if self._config.keep_energies:
            raise CalibrationError(
                "energies of inputs with different text lengths can't be kept together",
                expected=f"{known.query_length} tokens at site {size.name}, those of input 1",
                got=f"{size.query_length}",
                remedy="use prompts of one length in tokens, or leave keep_energies out",
            )
        assert self._text is not None
        return fit_mask(
            mask,
            (size.query_length, size.key_length),
            (known.query_length, known.key_length),
            video=math.prod(self._grid(size.query_length)),
            block=self._config.block,
            position=self._text,
        )
