"""Where kernels are made ahead, and how it is known that the device is done with one.

On a GPU calls only queue work: a kernel whose call has returned may still be read from, minutes of
Python later. So its memory is given back only after an event that was queued behind its last call.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Protocol

import torch

MOST_THREADS = 4
"""Threads that make kernels ahead, at most. One of them takes longer for the tables of a weighted
sample than a GPU does for a call with them; four get three times as much done, six hardly more:
Python's lock is held for a part of the work (`docs/decisions/0012`)."""


class Event(Protocol):
    """A place in the queue of a device."""

    def synchronize(self) -> None:
        """Wait until the device has come past it."""


class DeviceQueue(Protocol):
    """What a device has to do, and how kernels are made beside it."""

    threads: int
    """How many threads should make coming kernels."""

    def making(self) -> contextlib.AbstractContextManager[object]:
        """Make kernels within; afterwards their tables are on the device."""

    def record(self) -> Event | None:
        """Record the end of what is queued now; None if nothing ever is."""

    def synchronize(self) -> None:
        """Wait until the device has done all that is queued."""


class HostQueue:
    """A CPU: calls return when they are done, and a thread beside them would only take turns."""

    threads = 0

    def making(self) -> contextlib.AbstractContextManager[object]:
        """Do nothing."""
        return contextlib.nullcontext()

    def record(self) -> Event | None:
        """Return None."""
        return None

    def synchronize(self) -> None:
        """Do nothing."""


class CudaQueue:
    """A GPU: tables are copied on a stream of their own, beneath what the others compute."""

    def __init__(self, device: torch.device) -> None:
        # Most cores are left to whoever calls, and to the processes of other GPUs.
        self.threads = max(1, min(MOST_THREADS, (os.cpu_count() or 1) // 4))
        self._device = device
        self._stream: torch.cuda.Stream | None = None

    @contextlib.contextmanager
    def making(self) -> Iterator[None]:
        """Make kernels on the stream for copies, and wait for that stream."""
        # Threads share it: what one frees there the next may take. Two that begin at once may have
        # one each.
        stream = self._stream or torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._stream = stream
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()

    def record(self) -> Event | None:
        """Record an event on the current stream."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def synchronize(self) -> None:
        """Wait for the GPU."""
        torch.cuda.synchronize(self._device)


def queue_of(device: torch.device) -> DeviceQueue:
    """Return the queue of a device."""
    return CudaQueue(device) if device.type == "cuda" else HostQueue()
