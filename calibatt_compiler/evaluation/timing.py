"""Time of a denoising step, several compiled variants of one model side by side."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from calibatt_compiler.errors import PipelineError

MIN_ROUNDS = 5


@dataclass(frozen=True)
class DenoisingStep:
    """What a pipeline hands its model at one step: two calls where it runs guidance in turn.

    Attributes:
        timestep: as the model is given it.
        calls: positional and keyword arguments of each call. Tensors are the pipeline's own, not
            copies: a copy could have other strides, for which the model would be compiled again.
    """

    timestep: float
    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]


@dataclass(frozen=True)
class StepTimes:
    """Measured times.

    Attributes:
        steps: index of each measured step in the sampler's schedule.
        seconds: for each variant, for each round, for each of `steps`: seconds of a whole step.
    """

    steps: tuple[int, ...]
    seconds: Mapping[str, tuple[tuple[float, ...], ...]]

    def median(self, variant: str) -> float:
        """Seconds of a step: mean over the steps of a round, median over the rounds."""
        return statistics.median(statistics.fmean(row) for row in self.seconds[variant])

    def ratio(self, dense: str, sparse: str) -> float:
        """Time of `dense` / time of `sparse`, taken round by round; the median over the rounds."""
        pairs = zip(self.seconds[dense], self.seconds[sparse], strict=True)
        return statistics.median(sum(a) / sum(b) for a, b in pairs)

    def by_step(self, variant: str) -> list[float]:
        """Seconds of each of `steps`, median over the rounds."""
        return [statistics.median(column) for column in zip(*self.seconds[variant], strict=True)]


class StepWatch:
    """Sees each call of a pipeline's model and groups the calls into denoising steps."""

    def __init__(self, on_step: Callable[[int], None], keep: bool) -> None:
        self._on_step = on_step
        self._keep = keep
        self._timestep: float | None = None
        self.count = 0
        self.steps: list[DenoisingStep] = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record a call; a forward pre-hook of the model."""
        timestep = _timestep(module, args, kwargs)
        if timestep != self._timestep:
            self._on_step(self.count)
            self._timestep = timestep
            self.count += 1
            if self._keep:
                self.steps.append(DenoisingStep(timestep, ()))
        if self._keep:
            last = self.steps[-1]
            self.steps[-1] = DenoisingStep(timestep, (*last.calls, (args, kwargs)))


@contextmanager
def watching(
    module: nn.Module, on_step: Callable[[int], None] = lambda _: None, *, keep: bool = False
) -> Iterator[StepWatch]:
    """Watch the calls of a (compiled) model.

    Args:
        module: what the pipeline calls.
        on_step: called before the first call of each step, with the step's index; what it raises
            ends the pipeline's run.
        keep: collect the steps' inputs in `StepWatch.steps`.
    """
    watch = StepWatch(on_step, keep)
    handle = module.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        yield watch
    finally:
        handle.remove()


def spread(total: int, count: int) -> tuple[int, ...]:
    """Choose `count` of `total` steps, at the middles of equal parts of the schedule."""
    count = min(total, count)
    return tuple(int((index + 0.5) * total / count) for index in range(count))


@torch.no_grad()
def time_steps(
    variants: Mapping[str, nn.Module],
    steps: Mapping[int, DenoisingStep],
    *,
    rounds: int,
    device: torch.device,
    on_step: Callable[[], None] = lambda: None,
) -> StepTimes:
    """Time whole denoising steps of all variants, interleaved.

    In each round each step is run by each variant in turn, and the variant that goes first moves
    on with the rounds, so that what else the machine does meets all alike. A first round is not
    counted.

    Args:
        variants: compiled models by label.
        steps: inputs by index in the schedule.
        rounds: how many to count; at least 5.
        device: where the models are.
        on_step: called after each step of all variants.

    Raises:
        PipelineError: fewer than 5 rounds, or no steps.
    """
    if rounds < MIN_ROUNDS or not steps:
        raise PipelineError(
            "nothing that could be called a measurement",
            expected=f"at least {MIN_ROUNDS} rounds and one step",
            got=f"{rounds} rounds, {len(steps)} steps",
            remedy=f"ask for {MIN_ROUNDS} rounds or more",
        )
    labels = list(variants)
    seconds: dict[str, list[tuple[float, ...]]] = {label: [] for label in labels}
    for number in range(rounds + 1):
        order = labels[number % len(labels) :] + labels[: number % len(labels)]
        current: dict[str, list[float]] = {label: [] for label in labels}
        for step in steps.values():
            for label in order:
                current[label].append(_run(variants[label], step, device))
            on_step()
        if number:
            for label in labels:
                seconds[label].append(tuple(current[label]))
    return StepTimes(tuple(steps), {label: tuple(rows) for label, rows in seconds.items()})


def _run(module: nn.Module, step: DenoisingStep, device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    for args, kwargs in step.calls:
        module(*args, **kwargs)
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _timestep(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    inner = getattr(module, "_orig_mod", module)
    given = inspect.signature(inner.forward).bind_partial(*args, **kwargs).arguments
    timestep = given.get("timestep")
    if not isinstance(timestep, torch.Tensor):
        raise PipelineError(
            "the model is not called with a timestep",
            expected="an argument `timestep`, a tensor",
            got=f"arguments {', '.join(given)} of {type(inner).__name__}",
            remedy="use the pipeline of a diffusion transformer",
        )
    # The largest: where each token has its own (image to video), the given frames have 0.
    return float(timestep.max())
