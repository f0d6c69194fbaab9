"""Commands that are ended from outside: what Ctrl-C, SIGTERM and SIGHUP do, and what is said."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_AGAIN = 1.0
"""Seconds after which a command that goes on as if nothing had happened is interrupted again."""


class Interrupted(KeyboardInterrupt):
    """A command was ended by a signal.

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

    Python loses an exception that is raised in a destructor or in the callback of a weak reference,
    where a compiling model spends much of its time: then it is raised again. While a command tidies
    up, only another Ctrl-C disturbs it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    ours = [n for n, h in before.items() if h in (signal.SIG_DFL, signal.default_int_handler)]
    alarm = signal.getsignal(signal.SIGALRM)
    timer: tuple[float, float] | None = None
    first = signal.SIGINT

    def interrupt(number: int, _: Any) -> None:
        nonlocal timer, first
        if _tidying() and number != signal.SIGINT:
            return
        if timer is None:
            first = signal.Signals(number)
            signal.signal(signal.SIGALRM, again)
            timer = signal.setitimer(signal.ITIMER_REAL, _AGAIN, _AGAIN)
        raise Interrupted(number)

    def again(*_: Any) -> None:
        if not _tidying():
            raise Interrupted(first)

    for number in ours:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        if timer is not None:
            signal.setitimer(signal.ITIMER_REAL, *timer)
            signal.signal(signal.SIGALRM, alarm)
        for number in ours:
            signal.signal(number, before[number])


def _tidying() -> bool:
    """Whether what was interrupted by a signal runs because of another one before."""
    error = sys.exception()
    while error is not None and not isinstance(error, Interrupted):
        error = error.__context__
    return error is not None


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
