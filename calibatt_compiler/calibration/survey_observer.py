"""Measures candidate token orders on the attention calls of one input."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calibatt_compiler.calibration.config import CalibrationConfig
from calibatt_compiler.calibration.observation import InputObservation, Schedule
from calibatt_compiler.calibration.observer import Observer, not_finite
from calibatt_compiler.calibration.orders import (
    Error,
    OrderSurvey,
    Tally,
    candidates,
    surveyed_steps,
)
from calibatt_compiler.calibration.records import SiteSize
from calibatt_compiler.calibration.selection import covering_mask, pack, select
from calibatt_compiler.calibration.text import TextPosition, text_blocks
from calibatt_compiler.errors import CalibrationError, OptionError
from calibatt_compiler.plan import BlockPattern
from calibatt_compiler.plan.order import RASTER, TokenOrder
from calibatt_compiler.runtime.order import Rearrangement

SAMPLE = 16
"""Query blocks of a call whose output is computed under each order."""

_HALVINGS = 12
"""How often the range of thresholds is halved in search of a density."""


@dataclass(frozen=True)
class _Mask:
    """Masks of the sampled query blocks of one call.

    Attributes:
        bits: uint8 (votes, heads, rows, ceil(key_blocks / 8)).
        lengths: query and key tokens of the call.
        shape: of its energies.
    """

    bits: npt.NDArray[np.uint8]
    lengths: tuple[int, int]
    shape: tuple[int, ...]

    def fits(self, lengths: tuple[int, int], shape: tuple[int, ...]) -> bool:
        """Whether another call is of the same sizes."""
        return lengths == self.lengths and tuple(shape) == self.shape

    def mask(self, device: torch.device) -> Tensor:
        """Return them as bool (votes, heads, rows, key_blocks)."""
        bits = np.unpackbits(self.bits, axis=-1, count=self.shape[-1], bitorder="little")
        return torch.from_numpy(bits).bool().to(device)


@dataclass(frozen=True)
class _Call:
    """The samples of one attention call that count.

    Attributes:
        site: its name.
        place: of the diffusion step in the schedule.
        q: (votes, heads, Sq, D).
        k: (votes, heads, Sk, D).
        v: likewise.
        out: dense output, like q.
        scale: factor on the scores.
        threshold: share of attention mass that the step keeps.
        video: video tokens of its sequences.
        text: where text stands.
    """

    site: str
    place: int
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    scale: float
    threshold: float
    video: int
    text: TextPosition | None

    def ordered(self, of_queries: Rearrangement | None, of_keys: Rearrangement | None) -> _Call:
        """Return the same call with its tokens in another order."""

        def lay(x: Tensor, order: Rearrangement | None) -> Tensor:
            return x if order is None else order.apply(x)

        return replace(
            self,
            q=lay(self.q, of_queries),
            k=lay(self.k, of_keys),
            v=lay(self.v, of_keys),
            out=lay(self.out, of_queries),
        )


class SurveyObserver(Observer):
    """Counts the blocks that each candidate order needs, and measures the error of its output.

    The error is that of a later input's output under the masks of the first input; of the first
    input's own output if there is no other, or none with text of the same length. At most steps
    attention is dense and nothing is measured.

    Args:
        config: settings; `token_order` does not count.
        text: where the module's text tokens stand in joint attention.
        schedule: asked at the first call of each input for the sampler's steps.
        on_step: told, at each new step, its index and T.
        steps: tells which of T steps are measured at.
    """

    def __init__(
        self,
        config: CalibrationConfig,
        text: TextPosition | None,
        *,
        schedule: Callable[[], Schedule | None] = lambda: None,
        on_step: Callable[[int, int | None], None] = lambda step, steps: None,
        steps: Callable[[int], tuple[int, ...]] = surveyed_steps,
    ) -> None:
        super().__init__(config, text, schedule=schedule, on_step=on_step)
        self._surveyed = steps
        self._seen: set[int] = set()
        self._now = RASTER
        self._masks: dict[tuple[str, str, int], _Mask] = {}
        self._tallies: defaultdict[str, defaultdict[str, Tally]] = defaultdict(
            lambda: defaultdict(Tally)
        )

    def attend(
        self, site: str, q: Tensor, k: Tensor, v: Tensor, timestep: float, scale: float
    ) -> Tensor:
        """Compute dense attention and, at a surveyed step, measure each order.

        Shapes as in `calibatt_compiler.capture.Recorder`.

        Raises:
            CalibrationError: sizes that don't fit the run, or attention that is not finite.
            OptionError: the number of steps or the grid is not known.
        """
        from calibatt_compiler.kernels.attention import dense_attention

        out = dense_attention(q, k, v, scale)
        counted = self._counted(site, q, k, timestep)
        if counted is None:
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
            q, k, v, counted_out = (x[samples] for x in (q, k, v, out))
            self._compare(
                _Call(
                    site=site,
                    place=place,
                    q=q,
                    k=k,
                    v=v,
                    out=counted_out,
                    scale=scale,
                    threshold=self._config.thresholds(steps).at(place, steps),
                    video=math.prod(grid),
                    text=self._text,
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

    def result(self, about: object) -> OrderSurvey:
        """Choose.

        Args:
            about: what the inputs were.
        """
        return OrderSurvey.of(about, sorted(self._seen), self._tallies)

    def _order(self) -> TokenOrder:
        return self._now

    def _compare(self, call: _Call, orders: Iterable[TokenOrder]) -> None:
        """Measure a call under each order, raster first: its density is that of all errors."""
        density = None
        for order in orders:
            self._now = order
            in_order = call.ordered(self._rearrangement(call.q), self._rearrangement(call.k))
            tally, density = self._measure(in_order, density)
            tallies = self._tallies[str(order)]
            tallies[call.site] = tallies[call.site] + tally

    def _measure(self, call: _Call, density: float | None) -> tuple[Tally, float]:
        """Measure a call whose tokens are in the order that counts.

        Args:
            call: operands.
            density: of the masks that the output is computed by; None: that of the threshold.

        Returns:
            What is counted, and the density.
        """
        from calibatt_compiler.kernels.energy import block_energy

        block, lengths = self._config.block, (call.q.shape[2], call.k.shape[2])
        energy = block_energy(call.q, call.k, block=block, scale=call.scale)
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
        key = (str(self._now), call.site, call.place)
        known = self._masks.get(key)
        if known is not None:
            if known.fits(lengths, energy.shape):
                tally.others = self._error(call, rows, known.mask(energy.device))
            return tally, density or 0.0
        chosen = mask[:, :, rows]
        if density is None:
            density = chosen.double().mean().item()
        else:
            always = text_blocks(lengths[1], call.video, block[1], call.text)
            chosen = at_density(energy[:, :, rows], density, always)
        self._masks[key] = _Mask(pack(chosen), lengths, tuple(energy.shape))
        tally.own = self._error(call, rows, chosen)
        return tally, density

    def _error(self, call: _Call, rows: Tensor, mask: Tensor) -> Error:
        """Return the error of some query blocks' output under their masks.

        Args:
            call: operands.
            rows: int64 (rows,), the query blocks.
            mask: bool (votes, heads, rows, key_blocks).
        """
        block, length = self._config.block, call.q.shape[2]
        within = torch.arange(block[0], device=rows.device)
        tokens = (rows[:, None] * block[0] + within).flatten()
        tokens = tokens[tokens < length]
        q, out = (x.index_select(2, tokens) for x in (call.q, call.out))
        error = 0.0
        for vote, of_vote in enumerate(mask):
            one = slice(vote, vote + 1)
            pattern = BlockPattern.from_mask(
                of_vote,
                query_length=len(tokens),
                key_length=call.k.shape[2],
                block=block,
                pooled=self._config.pooled,
            )
            sparse = attend_by(pattern, q[one], call.k[one], call.v[one], call.scale)
            error += (sparse.double() - out[one].double()).square().sum().item()
        return Error(error, out.double().square().sum().item())

    def _observe(self, run: InputObservation, size: SiteSize, step: int, energy: Tensor) -> None:
        raise AssertionError("a survey observes no single energies")


def sampled_rows(length: int, video: int, block: int, text: TextPosition | None) -> Tensor:
    """Return up to `SAMPLE` query blocks, evenly spread over those without text, int64.

    The last block, if it is a ragged one, is taken only where there is no other.
    """
    blocks = -(-length // block)
    with_text = text_blocks(length, video, block, text)
    free = torch.ones(blocks, dtype=torch.bool) if with_text is None else ~with_text
    if length % block and bool(free[:-1].any()):
        free[-1] = False
    found = free.nonzero().squeeze(1)
    if not len(found):
        found = torch.arange(max(1, length // block))
    count = min(SAMPLE, len(found))
    return found[(torch.arange(count) * 2 + 1) * len(found) // (2 * count)]


def at_density(energy: Tensor, density: float, always: Tensor | None) -> Tensor:
    """Return covering masks of one threshold, the largest that keeps at most a share of blocks.

    Args:
        energy: float (votes, heads, rows, key_blocks), finite.
        density: share of all blocks.
        always: as in `covering_mask`; these and one block a row are kept in any case.
    """
    always = None if always is None else always.to(energy.device)
    low, high = 0.0, 1.0
    best = covering_mask(energy, 2.0**-_HALVINGS, always)[0]
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        mask, _ = covering_mask(energy, middle, always)
        if mask.double().mean().item() <= density:
            low, best = middle, mask
        else:
            high = middle
    return best


def attend_by(pattern: BlockPattern, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attend by a pattern, with the kernel that tables serve here, else by definition."""
    from calibatt_compiler.kernels.attention import make_attention, triton_serves
    from calibatt_compiler.kernels.tiles import MAX_HEAD_DIM

    fast = q.device.type == "cpu" or (
        triton_serves(q.device, q.dtype) and q.shape[-1] <= MAX_HEAD_DIM
    )
    kernel = make_attention(
        pattern,
        lowering="table" if fast else "reference",
        device=q.device,
        dtype=q.dtype,
        head_dim=q.shape[-1],
    )
    return kernel(q, k, v, scale=scale)


def _unknown(what: str, setting: str) -> OptionError:
    return OptionError(
        f"token orders can't be surveyed without the {what}",
        expected=f"CalibrationConfig({setting})",
        got="None, and the model does not tell",
        remedy="give it, or name an order with token_order=...",
    )
