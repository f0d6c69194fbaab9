"""Measures candidate token orders on the attention calls of inputs."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from calibatt_compiler.calibration.observe.observer import ObservedModel, Observer, not_finite
from calibatt_compiler.calibration.order_search.candidates import (
    Tally,
    candidates,
    survey_of,
    surveyed_steps,
)
from calibatt_compiler.calibration.order_search.measure import (
    SampledMasks,
    SurveyCall,
    at_density,
    sampled_rows,
)
from calibatt_compiler.calibration.select.selection import pack, select
from calibatt_compiler.calibration.store.order_survey import OrderSurvey
from calibatt_compiler.errors import CalibrationError, OptionError
from calibatt_compiler.kernels.common.dense import dense_attention
from calibatt_compiler.kernels.common.padding import KeyPadding
from calibatt_compiler.kernels.energy import block_energy
from calibatt_compiler.plan.order import RASTER, TokenOrder
from calibatt_compiler.plan.text import text_blocks


class SurveyObserver(Observer):
    """Counts the blocks that each candidate order needs, and measures the error of its output.

    The error is that of a later input's output under the masks of the first input; of the first
    input's own output if there is no other, or none with text of the same length. At most steps
    attention is dense and nothing is measured.

    Args:
        model: what is observed; its `token_order` does not count.
        steps: tells which of T steps are measured at.
    """

    def __init__(
        self, model: ObservedModel, steps: Callable[[int], tuple[int, ...]] = surveyed_steps
    ) -> None:
        super().__init__(model)
        self._surveyed = steps
        self._seen: set[int] = set()
        self._now = RASTER
        self._finished = 0
        self._calls: Counter[tuple[str, int]] = Counter()
        self._masks: dict[tuple[str, str, int, int], SampledMasks] = {}
        self._tallies: defaultdict[str, defaultdict[str, Tally]] = defaultdict(
            lambda: defaultdict(Tally)
        )

    def begin(self, name: str, about: Mapping[str, Any], samples: int | None) -> None:
        """Start an input; arguments: see `Observer.begin`."""
        super().begin(name, about, samples)
        self._calls.clear()

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
        """Compute dense attention and, at a surveyed step, measure each order.

        Shapes: see `calibatt_compiler.capture.Recorder`.

        Raises:
            CalibrationError: sizes that don't fit the run, or attention that is not finite.
            OptionError: the number of steps or the grid is not known.
        """
        out = dense_attention(q, k, v, scale, mask)
        counted = self._counted(site, q, k, timestep, mask)
        if counted is None or isinstance(mask, Tensor):
            return out
        run, size, step, samples = counted
        run.votes[site, step] += q[samples].shape[0]
        place, steps = run.positions[step], self._steps(run)
        if steps is None:
            raise _unknown("number of steps", "num_steps=...")
        if place in self._surveyed(steps):
            self._seen.add(place)
            grid = self._grid(size.query_length)
            if math.prod(grid[:2]) == 1:
                raise _unknown("grid of tokens", "grid=(frames, height, width)")
            number = self._calls[site, place]
            self._calls[site, place] += 1
            q, k, v, counted_out = (x[samples] for x in (q, k, v, out))
            self._compare(
                SurveyCall(
                    site=site,
                    place=place,
                    number=number,
                    q=q,
                    k=k,
                    v=v,
                    out=counted_out,
                    scale=scale,
                    threshold=self._config.thresholds(steps).at(place, steps),
                    video=math.prod(grid),
                    text=self._text,
                    padding=None if mask is None else mask.part(samples),
                ),
                candidates(grid, self._config.block),
            )
        return out

    def finish(self) -> None:
        """End an input.

        Raises:
            CalibrationError: nothing was observed, or not every site at every step, or no step
                that is surveyed.
        """
        run = self._input
        assert run is not None
        run.check_complete(self._skips)
        if not self._tallies:
            raise CalibrationError(
                "the survey of token orders met none of its steps",
                expected=f"calls at some of steps {self._surveyed(self._steps(run) or 1)}",
                got=f"calls at steps {run.positions}",
                remedy="name an order with --token-order, CalibrationConfig(token_order=...)",
            )
        self.abandon()
        self._finished += 1

    def result(self, about: object) -> OrderSurvey:
        """Choose.

        Args:
            about: what the inputs were.
        """
        return survey_of(about, sorted(self._seen), self._tallies)

    def _order(self) -> TokenOrder:
        return self._now

    def _compare(self, call: SurveyCall, orders: Iterable[TokenOrder]) -> None:
        """Measure a call under each order, raster first: its density is that of all errors."""
        density = None
        for order in orders:
            self._now = order
            in_order = call.ordered(self._rearrangement(call.q), self._rearrangement(call.k))
            tally, density = self._measure(in_order, density)
            tallies = self._tallies[str(order)]
            tallies[call.site] = tallies[call.site] + tally

    def _measure(self, call: SurveyCall, density: float | None) -> tuple[Tally, float]:
        """Measure a call whose tokens are in the order that counts.

        Args:
            call: operands.
            density: of the masks that the first input's output is computed by; None: that of the
                threshold.

        Returns:
            What is counted, and the density.
        """
        block, pooled = self._config.block, self._config.pooled
        lengths = (call.q.shape[2], call.k.shape[2])
        energy = block_energy(call.q, call.k, block=block, scale=call.scale, padding=call.padding)
        if not bool(energy.isfinite().all()):
            raise not_finite(call.site, call.place)
        mask, _ = select(
            energy,
            call.threshold,
            lengths=lengths,
            video=call.video,
            block=block,
            text=call.text,
        )
        tally = Tally(int(mask.sum()), mask.numel())
        rows = sampled_rows(lengths[0], call.video, block[0], call.text).to(mask.device)
        key = (str(self._now), call.site, call.place, call.number)
        if self._finished:
            known = self._masks.get(key)
            if known is not None and known.fits(lengths, energy.shape):
                tally.others = call.error(rows, known.mask(energy.device), block, pooled)
            return tally, 0.0
        chosen = mask[:, :, rows]
        if density is None:
            density = chosen.double().mean().item()
        else:
            always = text_blocks(lengths[1], call.video, block[1], call.text)
            chosen = at_density(energy[:, :, rows], density, always)
        self._masks[key] = SampledMasks(pack(chosen), lengths, tuple(energy.shape))
        tally.own = call.error(rows, chosen, block, pooled)
        return tally, density


def _unknown(what: str, setting: str) -> OptionError:
    return OptionError(
        f"token orders can't be surveyed without the {what}",
        expected=f"CalibrationConfig({setting})",
        got="None, and the model does not tell",
        remedy="give it, or name an order with token_order=...",
    )
