"""Commands that are ended from outside: what SIGTERM and SIGHUP do, and what is said then."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in the form of another signal.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def exit_code(error: KeyboardInterrupt) -> int:
    """Return the exit code that a shell gives a process ended by this signal."""
    return 128 + (error.number if isinstance(error, Interrupted) else signal.SIGINT)


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Let SIGTERM and SIGHUP act as Ctrl-C, but for one that is ignored, as nohup has it.

    A second one does not disturb the tidying up after the first.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    default = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]

    def interrupt(number: int, _: Any) -> None:
        for each in default:
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(number)

    for number in default:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in default:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def said_if_interrupted(kept: Callable[[], str]) -> Iterator[None]:
    """Say what was kept and how to go on, if what is done within is interrupted.

    Args:
        kept: asked then.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        error.add_note(kept())
        raise
