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

from torch import Tensor

from calibatt_compiler.capture import Site
from calibatt_compiler.errors import KernelError

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


@contextmanager
def serving(sites: Mapping[str, Site]) -> Iterator[None]:
    """Let the operators that this thread runs meanwhile find their sites here."""
    outer = getattr(_running, "sites", None)
    _running.sites = sites if isinstance(sites, Sites) else Sites(sites)
    try:
        yield
    finally:
        _running.sites = outer


def sign(host: Tensor) -> Tensor:
    """Write the number of the graph that this thread runs behind the timestep, 0 for none.

    Args:
        host: float64 (2), on the CPU.
    """
    sites: Sites | None = getattr(_running, "sites", None)
    host[1] = 0 if sites is None else sites.number
    host.calibatt_sites = sites  # type: ignore[attr-defined]  # a backward pass may outlive the model
    return host


def lookup(name: str, host: Tensor | None = None) -> Site:
    """Return the site of a name in the graph that made `host`, or else that this thread runs.

    Raises:
        KernelError: no graph of ours is running, it has no such site, or it is gone.
    """
    number = 0 if host is None or host.numel() < 2 else int(host[1])
    sites: Mapping[str, Site] | None = (
        _known.get(number) if number else getattr(_running, "sites", None)
    )
    if sites is None or name not in sites:
        raise KernelError(
            "compiled code refers to an attention site that is not loaded",
            expected="a call of the model compiled with torch.compile(..., backend='calibatt')",
            got=f"site {name!r}, and " + ("no graph" if sites is None else "a graph without it"),
            remedy="call the compiled model itself, not code that was taken out of it, and keep it "
            "until its gradients are computed",
        )
    return sites[name]
