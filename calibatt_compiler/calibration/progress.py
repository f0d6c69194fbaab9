"""Progress of a calibration: inputs, steps within the input, time left."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from calibatt_compiler.terminal import PlainConsole, description

_MEMORY = 6 * 3600.0
"""Seconds of the past that the time left is estimated from: one step may take minutes."""


class CalibrationProgress:
    """Two bars on the error stream: all inputs with the time left, and the steps of one.

    Args:
        inputs: how many there are in all.
        done: how many are finished already.
        shown: show bars; None: if the error stream is a terminal.
        count: tells how many are finished, where other processes finish some too.
        what: the inputs are.
    """

    def __init__(
        self,
        inputs: int,
        done: int,
        shown: bool | None,
        count: Callable[[], int] | None = None,
        *,
        what: str = "inputs",
    ) -> None:
        console = PlainConsole(stderr=True)
        self._progress = Progress(
            description(),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            disable=not (console.is_terminal if shown is None else shown),
            speed_estimate_period=_MEMORY,
        )
        self._done = done
        self._count = count
        self._inputs = self._progress.add_task(what, total=inputs, completed=done)
        self._steps = self._progress.add_task("steps", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def step(self, step: int, steps: int | None) -> None:
        """Note that a step of the current input begins."""
        if step == 0:
            self._progress.reset(self._steps, total=steps)
        self._progress.update(self._steps, completed=step, total=steps)
        if self._count is not None:
            self._done = self._count()
        if steps:
            # A part of an input: the time left is known before the first one is finished.
            self._progress.update(self._inputs, completed=self._done + min(step / steps, 1.0))

    def waiting(self) -> None:
        """Note what other processes have finished meanwhile."""
        if self._count is not None:
            self._progress.update(self._inputs, completed=self._count())

    def finished(self) -> None:
        """Note that an input is finished."""
        self._done = self._done + 1 if self._count is None else self._count()
        self._progress.update(self._inputs, completed=self._done)
        total = self._progress.tasks[self._steps].total
        if total is not None:
            self._progress.update(self._steps, completed=total)
