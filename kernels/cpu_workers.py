"""Threads that each run torch operations on one core.

A kernel made of many small operations spends its time in the barriers that end each of them, and
far more so when another process wants a core. Here each worker runs its own share of the work
from start to end, single-threaded, and the only barrier is the last one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")

_lock = threading.Lock()
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def run_shares(shares: Sequence[Callable[[], None]]) -> None:
    """Run each share on a worker of its own, and return when all have ended.

    Shares run without gradients and without autocast, each on one core. With a single share, or
    with `torch.set_num_threads(1)`, they run one after the other in the calling thread. An
    exception of a share is raised here, after all shares have ended.
    """
    threads = torch.get_num_threads()
    if len(shares) == 1 or threads == 1:
        for share in shares:
            _without_gradients(share)
        return
    futures = [_pool(threads).submit(_without_gradients, share) for share in shares]
    errors = [future.exception() for future in futures]
    for error in errors:
        if error is not None:
            raise error


def balanced(items: Sequence[Item], cost: Callable[[Item], float], shares: int) -> list[list[Item]]:
    """Deal items out so that shares cost about the same; each keeps the order of `items`.

    Greedy: the dearest item goes first, to the share that is cheapest so far. No share is empty.
    """
    totals = [0.0] * max(1, min(shares, len(items)))
    dealt: list[list[int]] = [[] for _ in totals]
    for index in sorted(range(len(items)), key=lambda i: -cost(items[i])):
        target = totals.index(min(totals))
        dealt[target].append(index)
        totals[target] += cost(items[index])
    return [[items[index] for index in sorted(indices)] for indices in dealt]


def _without_gradients(share: Callable[[], None]) -> None:
    # Inference mode is the one that may write to both normal and inference tensors.
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        share()


def _pool(threads: int) -> ThreadPoolExecutor:
    """Return this process's pool of `threads` single-threaded workers.

    Torch's number of threads belongs to the thread that sets it, but its default for threads that
    start later is shared: it is put back once all workers are up.
    """
    key = (os.getpid(), threads)  # a forked child has the dictionary but not the threads
    with _lock:
        if key not in _pools:
            pool = ThreadPoolExecutor(threads, "calibatt-cpu")
            ready = threading.Barrier(threads + 1)

            def start() -> None:
                torch.get_num_threads()  # torch sets up a thread at its first question
                torch.set_num_threads(1)
                ready.wait()

            for _ in range(threads):
                pool.submit(start)
            ready.wait()
            torch.set_num_threads(threads)
            _pools[key] = pool
        return _pools[key]
