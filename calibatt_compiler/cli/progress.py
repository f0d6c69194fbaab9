"""Progress on the terminal, on the error stream, so that results can be piped."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class TerminalProgress:
    """One bar a stage; without a terminal, a line when a stage begins and one when it is over.

    Attributes:
        console: where it is shown.
        seconds: how long each stage took, by what it did.

    Implements `calibatt_compiler.evaluation.compare.Progress`; a context manager.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.seconds: dict[str, float] = {}
        self._task: TaskID | None = None
        self._began = 0.0

    def __enter__(self) -> TerminalProgress:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._finish()
        self._bars.stop()

    def start(self, what: str, total: int | None) -> None:
        """Begin a stage; the one before is over."""
        self._finish()
        if not self.console.is_terminal:
            self.console.print(what, highlight=False)
        self._began = time.perf_counter()
        self._task = self._bars.add_task(what, total=total)

    def advance(self) -> None:
        """One part of the stage is done."""
        if self._task is not None:
            self._bars.advance(self._task)

    def _finish(self) -> None:
        if self._task is None:
            return
        task = next(task for task in self._bars.tasks if task.id == self._task)
        self._bars.update(self._task, total=task.completed)
        seconds = time.perf_counter() - self._began
        self.seconds[task.description] = self.seconds.get(task.description, 0.0) + seconds
        if not self.console.is_terminal:
            self.console.print(f"  took {seconds:.1f} s", highlight=False)
        self._task = None
