"""Sums on the host of what calls find on a device, added beneath the calls that follow."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from calibatt_compiler.calibration.store.zone_sums import GroupSums
from calibatt_compiler.runtime.device_queue import DeviceQueue, queue_of

WAITING = 2
"""Calls whose squares may wait on the device: of 40 heads at 75,600 tokens, 112 MB each."""


class SumsBeside:
    """Adds squares to sums in one thread, in the order in which they came.

    On a CPU, where a thread would only take turns with the model, they are added at once.
    """

    def __init__(self) -> None:
        self._queue: DeviceQueue | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._waiting: deque[Future[None]] = deque()

    def add(self, sums: GroupSums, squares: Tensor, votes: int) -> None:
        """Add squares, which their device has computed, now or beneath what follows."""
        if squares.is_cuda:
            self.add_beside(sums, squares, votes)
            return
        self.settle()
        sums.add(squares.numpy(), votes)

    def add_beside(self, sums: GroupSums, squares: Tensor, votes: int) -> None:
        """Add squares in the thread; waits where too many wait already."""
        self._queue = self._queue or queue_of(squares.device)
        self._thread = self._thread or ThreadPoolExecutor(1, "calibatt-sums")
        while len(self._waiting) >= WAITING:
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(self._copied, sums, squares, votes))

    def settle(self) -> None:
        """Wait until all is added; raise what went wrong."""
        while self._waiting:
            self._waiting.popleft().result()

    def drop(self) -> None:
        """Wait for what has begun and forget the rest, and whatever went wrong."""
        for future in self._waiting:
            future.cancel()
        for future in self._waiting:
            if not future.cancelled():
                future.exception()
        self._waiting.clear()

    def _copied(self, sums: GroupSums, squares: Tensor, votes: int) -> None:
        assert self._queue is not None
        with self._queue.making():
            sums.add(squares.cpu().numpy(), votes)
