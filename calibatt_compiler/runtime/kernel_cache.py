"""The kernels of a graph: made when they are needed, or a little before, within a budget of memory.

A kernel's tables are made from its pattern, which is decoded from the plan. At Wan 14B 720p those
of all sites and steps would take 12 GB of GPU memory, those of one step 0.24 GB. So a graph holds
the kernels that are used next, as many as the budget allows, and threads make the coming ones
while the GPU computes: they decode on the host and copy from pinned memory on their own stream.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from calibatt_compiler.kernels.protocol import AttentionKernel
from calibatt_compiler.plan import Plan
from calibatt_compiler.runtime.device_queue import Lane, Mark
from calibatt_compiler.runtime.prefetch import Key, Upcoming, fitting

TABLE_BUDGET = 240_000_000
"""Bytes of tables that the kernels of one graph hold on their device. What they are allocated in is
up to 5 % larger, so this stays below 256 MB. A single kernel that needs more has them while it
serves."""

SAMPLED = 3
"""How many times that a plan of samples may hold: at 720p a site's tables are 17 MB, for its blocks
have weights and hardly any neighbours. Of fewer, each pass of a step would have to make its own."""

Kernel = AttentionKernel | None


def table_budget(plan: Plan, megabytes: int | None) -> int:
    """Return the bytes of tables to hold for a plan: as many megabytes, or the default."""
    if megabytes is not None:
        return 1_000_000 * megabytes
    sampled = any(site.weighted for site in plan.sites.values())
    return SAMPLED * TABLE_BUDGET if sampled else TABLE_BUDGET


@dataclass(frozen=True)
class Maker:
    """What a site does for the store.

    Attributes:
        make: makes the kernel of a pattern in a variant, None for dense attention; called by
            several threads, perhaps at once.
        retire: is given each kernel that is let go, after the device is done with it.
    """

    make: Callable[[int, Hashable], Kernel]
    retire: Callable[[AttentionKernel], object] = lambda kernel: None


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
    mark: Mark | None = field(default=None)


class KernelStore:
    """Kernels of all sites of one graph, by site, pattern and variant.

    Args:
        lane: how kernels are made ahead.
        budget: bytes of tables to hold.
    """

    def __init__(self, lane: Lane, *, budget: int = TABLE_BUDGET) -> None:
        self.budget = budget
        self.counts = Counts()
        self._lane = lane
        self._makers: dict[str, Maker] = {}
        self._upcoming = Upcoming()
        self._held: dict[Key, _Held] = {}
        self._in_use: dict[str, Key] = {}
        self._sizes: dict[Key, int] = {}
        self._largest = 0
        self._failed: set[Key] = set()
        self._changed = threading.Condition()
        self._making: dict[Key, int] = {}  # what is being made ahead, and bytes reserved for it
        self._working = 0  # threads that make kernels ahead
        self._settled = False  # whether every kernel is held: then there is nothing to make ahead
        # Before the kernels go with the store, the device must be done with them.
        weakref.finalize(self, lane.settle).atexit = False

    def add(self, site: str, steps: Sequence[int], maker: Maker) -> None:
        """Add a site after those that are there, in the order in which the graph calls them.

        Args:
            site: its name.
            steps: for each diffusion step the index of its pattern.
            maker: what makes its kernels.
        """
        with self._changed:
            self._makers[site] = maker
            self._upcoming.add(site, steps)
            self._settled = False

    def put(self, site: str, index: int, kernel: Kernel) -> None:
        """Hold a kernel that was made elsewhere: that of a pattern, in the variant None."""
        with self._changed:
            self._make_room(_size(kernel))
            self._hold((site, index, None), kernel)

    def get(self, site: str, step: int, variant: Hashable = None) -> Kernel:
        """Return the kernel of a site at a step, to be followed by `launched`.

        Args:
            site: a name that was added.
            step: the diffusion step.
            variant: handed on to the maker.

        Raises:
            CalibattError: what the maker raises.
        """
        with self._changed:
            key = self._in_use[site] = self._upcoming.call(site, step, variant)
            self._changed.wait_for(lambda: key not in self._making)
            if key not in self._held:
                self._settled = False
                self._make_room(self._sizes.get(key, self._largest))
                self._hold(key, self._makers[site].make(key[1], key[2]))
                self.counts.made += 1
            held = self._held[key] = self._held.pop(key)  # now the one used last
            # One a call: a call asks for about one kernel more.
            if not self._settled and self._working < self._lane.threads:
                self._working += 1
                threading.Thread(
                    target=_work, args=(weakref.ref(self),), name="calibatt-kernels", daemon=True
                ).start()
            return held.kernel

    def launched(self, site: str) -> None:
        """Take note that the kernel which a site got last was called."""
        mark = self._lane.mark()
        with self._changed:
            held = self._held.get(self._in_use[site])
            if held is not None:
                held.mark = mark
                return
        if mark is not None:  # another thread's calls have made it go: it ends with this call
            mark.synchronize()

    def held(self, site: str) -> list[AttentionKernel]:
        """Return the kernels of a site that are there now."""
        with self._changed:
            return [
                held.kernel
                for (name, *_), held in self._held.items()
                if name == site and held.kernel is not None
            ]

    @property
    def bytes(self) -> int:
        """Bytes of tables held now."""
        return sum(self._sizes[key] for key in self._held)

    def make_one_ahead(self) -> bool:
        """Make the next kernel that is not there and fits; return whether there was one."""
        with self._changed:
            wanted, everything = self._wanted()
            there = (self._held, self._failed, self._making)
            key = next((k for k in wanted if not any(k in some for some in there)), None)
            if key is None:
                self._settled = everything and not self._making
                self._working -= 1
                return False
            size = self._sizes.get(key, self._largest)
            gone = self._victims(size, keep=set(wanted))
            self._making[key] = size
        kernel, failed = None, False
        try:
            self._retire(gone)
            with self._lane.making():
                kernel = self._makers[key[0]].make(key[1], key[2])
        except Exception:
            # Whatever it is: a call may be waiting. It makes the kernel anew, and raises then.
            failed = True
        with self._changed:
            del self._making[key]
            if failed:
                self._failed.add(key)
            else:
                self.counts.ahead += 1
                self._note(key, kernel)
                if self._held and self.bytes + self._sizes[key] > self.budget:
                    # Larger than was expected, or calls and other threads have made some, too.
                    self._retire([(key, _Held(kernel))])
                    self.counts.evicted += 1
                else:
                    self._hold(key, kernel)
            self._changed.notify_all()
        return True

    def _wanted(self) -> tuple[list[Key], bool]:
        return fitting(self._upcoming.following(), self._sizes, self._largest, self.budget)

    def _make_room(self, size: int) -> None:
        """Let go what is used last, so that as many bytes fit: for a call that can't wait."""
        self._retire(self._victims(size, keep=set()))

    def _victims(self, size: int, keep: set[Key]) -> list[tuple[Key, _Held]]:
        """Take kernels out, those used last first, so that `size` bytes fit."""
        excess = self.bytes + sum(self._making.values()) + size - self.budget
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

    def _retire(self, gone: list[tuple[Key, _Held]]) -> None:
        """Wait until the device is done with kernels, and forget them."""
        for key, held in gone:
            if held.mark is not None:
                held.mark.synchronize()
            if held.kernel is not None:
                # On the stream for copies: what a site reads there must not wait for the others.
                with self._lane.making():
                    self._makers[key[0]].retire(held.kernel)
            held.kernel = None

    def _note(self, key: Key, kernel: Kernel) -> None:
        """Remember the size of a kernel."""
        self._sizes[key] = _size(kernel)
        self._largest = max(self._largest, self._sizes[key])

    def _hold(self, key: Key, kernel: Kernel) -> None:
        self._note(key, kernel)
        self._held[key] = _Held(kernel)
        self.counts.peak = max(self.counts.peak, self.bytes)


def _size(kernel: Kernel) -> int:
    return 0 if kernel is None else kernel.table_bytes


def _work(reference: weakref.ref[KernelStore]) -> None:
    """Make kernels ahead until none is missing, or the graph is gone."""
    while (store := reference()) is not None and store.make_one_ahead():
        del store
