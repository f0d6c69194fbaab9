"""The kernels of a graph: made when they are needed, or a little before, within a budget of memory.

A kernel's tables are made from its pattern, which is decoded from the plan. At Wan 14B 720p those
of all sites and steps would take 12 GB of GPU memory, those of one step 0.24 GB. So a graph holds
the kernels that are used next, as many as the budget allows, and threads make the coming ones
while the GPU computes: they decode on the host and copy from pinned memory on their own stream.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from calibatt_compiler.kernels.common.zone_step import ZoneKernel
from calibatt_compiler.kernels.protocol import AttentionKernel
from calibatt_compiler.plan import Plan
from calibatt_compiler.runtime.device_queue import DeviceQueue, Event
from calibatt_compiler.runtime.prefetch import CallPredictor, Key, select_resident

TABLE_BUDGET = 240_000_000
"""Bytes of tables that the kernels of one graph hold on their device. What they are allocated in is
up to 5 % larger, so this stays below 256 MB. A single kernel that needs more has them while it
serves."""

SAMPLED = 3
"""How many times that a plan of samples may hold: at 720p a site's tables are 17 MB, for its blocks
have weights and hardly any neighbours. Of fewer, each pass of a step would have to make its own."""

HeldKernel = AttentionKernel | ZoneKernel
"""The kernel of a pattern, or of a step group of zones, which serves each of its steps."""

Kernel = HeldKernel | None


def table_budget(plan: Plan, megabytes: int | None) -> int:
    """Return the bytes of tables to hold for a plan: as many megabytes, or the default."""
    if megabytes is not None:
        return 1_000_000 * megabytes
    sampled = any(site.weighted and site.zones is None for site in plan.sites.values())
    return SAMPLED * TABLE_BUDGET if sampled else TABLE_BUDGET


@dataclass(frozen=True)
class KernelFactory:
    """What a site does for the cache, without holding it: a cache that is gone still lets go.

    Attributes:
        make: makes the kernel of a pattern in a variant, None for dense attention; called by
            several threads, perhaps at once.
        release: receives each kernel that is let go, after the device is done with it; called by
            one thread at a time.
    """

    make: Callable[[int, Hashable], Kernel]
    release: Callable[[HeldKernel], object] = lambda kernel: None


@dataclass
class Counts:
    """What happened to the kernels of a graph.

    Attributes:
        made: kernels that a call had to make.
        ahead: kernels that were made before they were asked for.
        evicted: kernels that had to go.
        peak: most bytes of tables held at a time.
    """

    made: int = 0
    ahead: int = 0
    evicted: int = 0
    peak: int = 0


@dataclass
class _Held:
    kernel: Kernel
    last_use: Event | None = None


@dataclass(frozen=True)
class _Making:
    """A kernel that is being made: when that is over, and bytes reserved for it."""

    over: Future[None]
    size: int


class KernelCache:
    """Kernels of all sites of one graph, by site, pattern and variant.

    They are made and let go outside of the lock: calls for those that are there go on.

    Args:
        queue: of the device.
        budget: bytes of tables to hold.
    """

    def __init__(self, queue: DeviceQueue, *, budget: int = TABLE_BUDGET) -> None:
        self.budget = budget
        self.counts = Counts()
        self._queue = queue
        self._factories: dict[str, KernelFactory] = {}
        self._predictor = CallPredictor()
        self._held: dict[Key, _Held] = {}
        self._in_use: dict[str, Key] = {}
        self._sizes: dict[Key, int] = {}
        self._largest = 0
        self._failed: set[Key] = set()
        self._making: dict[Key, _Making] = {}
        self._lock = threading.Lock()
        self._releasing = threading.Lock()
        self._workers = (
            ThreadPoolExecutor(queue.threads, "calibatt-kernels") if queue.threads else None
        )
        self._working = 0  # jobs that make kernels ahead
        self._settled = False  # whether there is nothing to make ahead
        close = weakref.finalize(self, _close, queue, self._held, self._factories)
        close.atexit = False

    def add(self, site: str, steps: Sequence[int], factory: KernelFactory) -> None:
        """Add a site after those that are there, in the order in which the graph calls them.

        Args:
            site: its name.
            steps: for each diffusion step the index of its pattern, or of its step group.
            factory: what makes its kernels.
        """
        with self._lock:
            self._factories[site] = factory
            self._predictor.add(site, steps)
            self._settled = False

    def insert(self, site: str, index: int, kernel: Kernel) -> None:
        """Hold a kernel that was made elsewhere: that of a pattern, in the variant None."""
        with self._lock:
            gone = self._hold((site, index, None), kernel)
        self._release(gone)

    def get(self, site: str, step: int, variant: Hashable = None) -> Kernel:
        """Return the kernel of a site at a step, to be followed by `record_use`.

        Args:
            site: a name that was added.
            step: the diffusion step.
            variant: handed on to the factory.

        Raises:
            CalibattError: what the factory raises.
        """
        with self._lock:
            key = self._in_use[site] = self._predictor.call(site, step, variant)
        while True:
            with self._lock:
                held = self._held.pop(key, None)
                if held is not None:
                    self._held[key] = held  # now the one used last
                    self._make_ahead()
                    return held.kernel
                making = self._making.get(key)
                if making is None:
                    self._settled = False
                    gone = self._reserve(key)
            if making is not None:
                making.over.result()
                continue
            kernel = self._make(key, gone)
            with self._lock:
                self.counts.made += 1
                self._make_ahead()
            return kernel

    def record_use(self, site: str) -> None:
        """Record that the kernel which a site got last was called."""
        event = self._queue.record()
        with self._lock:
            key = self._in_use[site]
            held = self._held.get(key)
            if held is not None:
                held.last_use = event
                # On a CPU a kernel of zones keeps the steps that it has drawn.
                gone = self._grow(key, held.kernel) if event is None else []
        if held is not None:
            self._release(gone)
            return
        if event is not None:  # another thread's calls have made it go: it ends with this call
            event.synchronize()

    def held(self, site: str) -> list[HeldKernel]:
        """Return the kernels of a site that are there now."""
        with self._lock:
            return [
                held.kernel
                for (name, *_), held in self._held.items()
                if name == site and held.kernel is not None
            ]

    def clear(self) -> None:
        """Let all kernels go; a call that comes after all has them made again."""
        with self._lock:
            gone = list(self._held.items())
            self._held.clear()
            self._settled = True  # none is made ahead until there is a call
        self._release(gone)

    @property
    def bytes(self) -> int:
        """Bytes of tables held now."""
        return sum(self._sizes[key] for key in self._held)

    def make_one_ahead(self) -> bool:
        """Make the next kernel that is not there and fits; return whether there was one."""
        with self._lock:
            wanted, everything = self._wanted()
            there = (self._held, self._failed, self._making)
            missing = () if self._settled else wanted
            key = next((k for k in missing if not any(k in some for some in there)), None)
            if key is None:
                self._settled |= everything and not self._making
                self._working -= 1
                return False
            gone = self._reserve(key, keep=set(wanted))
        try:
            self._make(key, gone, ahead=True)
        except Exception:
            # Whatever it is: a call may be waiting. It makes the kernel anew, and raises then.
            with self._lock:
                self._failed.add(key)
        return True

    def _make_ahead(self) -> None:
        # One a call: a call asks for about one kernel more.
        if self._workers is not None and not self._settled and self._working < self._queue.threads:
            self._working += 1
            _submit(self._workers, weakref.ref(self))

    def _wanted(self) -> tuple[list[Key], bool]:
        uses = self._predictor.next_uses()
        return select_resident(uses, self._sizes, self._largest, self.budget)

    def _reserve(self, key: Key, keep: Collection[Key] = ()) -> list[tuple[Key, _Held]]:
        """Reserve memory for a kernel; return what has to go for it."""
        size = self._sizes.get(key, self._largest)
        gone = self._victims(size, keep)
        self._making[key] = _Making(Future(), size)
        return gone

    def _make(self, key: Key, gone: list[tuple[Key, _Held]], *, ahead: bool = False) -> Kernel:
        """Make a kernel for which memory is reserved, after others are gone; hold it."""
        try:
            self._release(gone)
            with self._queue.making() if ahead else contextlib.nullcontext():
                kernel = self._factories[key[0]].make(key[1], key[2])
        except BaseException:
            with self._lock:
                self._making.pop(key).over.set_result(None)
            raise
        with self._lock:
            over = self._making.pop(key).over
            gone = self._hold(key, kernel, ahead=ahead)
            over.set_result(None)
        self._release(gone)
        return kernel

    def _hold(self, key: Key, kernel: Kernel, *, ahead: bool = False) -> list[tuple[Key, _Held]]:
        """Hold a kernel; return what has to go because it is larger than expected."""
        size = self._sizes[key] = 0 if kernel is None else kernel.table_bytes
        self._largest = max(self._largest, size)
        if ahead:
            self.counts.ahead += 1
            if self._excess(size) > 0 and (self._held or self._making):
                self.counts.evicted += 1
                return [(key, _Held(kernel))]
        gone = self._victims(size)
        self._held[key] = _Held(kernel)
        self.counts.peak = max(self.counts.peak, self.bytes)
        return gone

    def _grow(self, key: Key, kernel: Kernel) -> list[tuple[Key, _Held]]:
        """Count what a kernel takes after a call; return what has to go because it is more."""
        size = 0 if kernel is None else kernel.table_bytes
        if size <= self._sizes[key]:
            return []
        self._sizes[key] = size
        self._largest = max(self._largest, size)
        gone = self._victims(0)
        self.counts.peak = max(self.counts.peak, self.bytes)
        return gone

    def _excess(self, size: int) -> int:
        """Bytes over the budget with a kernel of a size."""
        reserved = sum(making.size for making in self._making.values())
        return self.bytes + reserved + size - self.budget

    def _victims(self, size: int, keep: Collection[Key] = ()) -> list[tuple[Key, _Held]]:
        """Take kernels out, those used last first, so that `size` bytes fit."""
        excess = self._excess(size)
        if excess <= 0:
            return []
        wanted = self._wanted()[0]
        soon = set(wanted)
        order = [key for key in self._held if key not in soon]
        order += [key for key in reversed(wanted) if key in self._held]
        gone = []
        for key in order:
            if excess <= 0:
                break
            if self._sizes[key] and key not in keep:
                gone.append((key, self._held.pop(key)))
                excess -= self._sizes[key]
                self.counts.evicted += 1
                self._settled = False
        return gone

    def _release(self, gone: Iterable[tuple[Key, _Held]]) -> None:
        """Wait until the device is done with kernels, and let them go."""
        for key, held in gone:
            if held.last_use is not None:
                held.last_use.synchronize()
            if held.kernel is not None:
                # On the stream for copies: what a site reads there must not wait for the others.
                with self._releasing, self._queue.making():
                    self._factories[key[0]].release(held.kernel)
                held.kernel = None  # its memory is for the next one, which callers make now


def _close(
    queue: DeviceQueue, held: dict[Key, _Held], factories: Mapping[str, KernelFactory]
) -> None:
    """Let go what a cache that is gone has held: before that the device must be done with it."""
    queue.synchronize()
    for key, one in held.items():
        if one.kernel is not None:
            factories[key[0]].release(one.kernel)
    held.clear()


def _work(reference: weakref.ref[KernelCache], workers: ThreadPoolExecutor) -> None:
    """Make a kernel ahead, and then the next, until none is missing or the graph is gone."""
    cache = reference()
    if cache is not None and cache.make_one_ahead():
        _submit(workers, reference)


def _submit(workers: ThreadPoolExecutor, cache: weakref.ref[KernelCache]) -> None:
    with contextlib.suppress(RuntimeError):  # the interpreter is about to end
        workers.submit(_work, cache, workers)
