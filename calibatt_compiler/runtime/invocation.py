"""Which graph is running: how an operator in compiled code finds what serves it.

An operator's arguments are tensors, numbers and strings, so it names its site, and the graph that
runs it says what serves that name. So the generated code depends on which calls are lowered and on
nothing else: Inductor's caches serve every plan of a model once the first is compiled, in this
process or another, and two graphs with sites of one name never meet.

A backward pass runs when its graph has returned, often in a thread of autograd's own; what is
checkpointed runs forward there once more. Both have what `host_timestep` returned in the forward
pass, so that carries the number of the graph, and keeps its sites alive.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from calibatt_compiler.capture import Site
from calibatt_compiler.errors import KernelError
from calibatt_compiler.runtime.coordinates import CoordinatesReader
from calibatt_compiler.runtime.device_queue import Event
from calibatt_compiler.runtime.token_order import Rearrangements

_running = threading.local()
_numbers = itertools.count(1)


class Sites(dict[str, Site]):
    """What serves each name in one graph.

    Attributes:
        number: of the graph, in this process.
    """

    def __init__(self, entries: Mapping[str, Site]) -> None:
        super().__init__(entries)
        self.number = next(_numbers)
        _known[self.number] = self


_known: weakref.WeakValueDictionary[int, Sites] = weakref.WeakValueDictionary()


@dataclass
class Invocation:
    """One run of a graph.

    Attributes:
        sites: what serves each name.
        rearrangements: those of the graph.
        coordinates: what is shown the coordinates of its tokens, if anything is.
        timestep_copied: behind the copy of the timestep that is under way to the host, or None.
        timestep: of the model's call that the graph is a part of; None: the graph has its own.
    """

    sites: Sites
    rearrangements: Rearrangements = field(default_factory=Rearrangements)
    coordinates: CoordinatesReader | None = None
    timestep_copied: Event | None = None
    timestep: float | None = None


@contextmanager
def running(invocation: Invocation) -> Iterator[None]:
    """Let the operators that this thread runs meanwhile find this invocation."""
    outer = current()
    _running.invocation = invocation
    try:
        yield
    finally:
        _running.invocation = outer


def current() -> Invocation | None:
    """Return the innermost invocation of this thread."""
    invocation: Invocation | None = getattr(_running, "invocation", None)
    return invocation


def sign(host: Tensor) -> Tensor:
    """Write the number of the graph that this thread runs behind the timestep, 0 for none.

    Args:
        host: float64 (2), on the CPU.
    """
    invocation = current()
    sites = None if invocation is None else invocation.sites
    host[1] = 0 if sites is None else sites.number
    host.calibatt_sites = sites  # type: ignore[attr-defined]  # a backward pass may outlive the model
    return host


def lookup(name: str, host: Tensor | None = None) -> Site:
    """Return the site of a name in the graph that made `host`, or else that this thread runs.

    Raises:
        KernelError: no graph of ours is running, it has no such site, or it is gone.
    """
    number = 0 if host is None or host.numel() < 2 else int(host[1])
    invocation = current()
    here = None if invocation is None else invocation.sites
    sites = _known.get(number) if number else here
    if sites is None or name not in sites:
        raise KernelError(
            "compiled code refers to an attention site that is not loaded",
            expected="a call of the model compiled with torch.compile(..., backend='calibatt')",
            got=f"site {name!r}, and " + ("no graph" if sites is None else "a graph without it"),
            remedy="call the compiled model itself, not code that was taken out of it, and keep it "
            "until its gradients are computed",
        )
    return sites[name]
