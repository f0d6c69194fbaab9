"""Times the first step of an input, from which the cost of a whole run is estimated."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch

from calibatt_compiler.calibration.observe.pipelines import FirstStepDone, generate


class FirstStepClock:
    """Takes the time at the first step's attention and at its end, and ends the input there.

    Args:
        device: of the model; a GPU is waited for.

    Attributes:
        ticks: times so far, in seconds.
    """

    def __init__(self, device: torch.device) -> None:
        self.ticks: list[float] = []
        self._device = device

    def tick(self) -> None:
        """Take the time."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.ticks.append(time.perf_counter())

    def on_step(self, step: int, steps: int | None) -> None:
        """Receive a new step, as `ObservedModel.on_step`."""
        self.tick()
        if step == 1:
            raise FirstStepDone

    def run(self, pipe: Any, seed: int, arguments: Mapping[str, Any]) -> None:
        """Generate until the first step is done, or the whole input if it has no other."""
        with suppress(FirstStepDone):
            generate(pipe, seed, arguments)
            self.tick()
