"""Which graph is running: how an operator in compiled code finds what serves it.

An operator's arguments are tensors, numbers and strings, so it names its site, and the graph that
runs it says what serves that name. So the generated code depends on which calls are lowered and on
nothing else: Inductor's caches serve every plan of a model once the first is compiled, in this
process or another, and two graphs with sites of one name never meet.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from calibatt_compiler.capture import Site
from calibatt_compiler.errors import KernelError
from calibatt_compiler.runtime.device_queue import Event
from calibatt_compiler.runtime.token_order import Rearrangements


@dataclass
class Invocation:
    """One run of a graph.

    Attributes:
        sites: what serves each name.
        rearrangements: those of the graph.
        timestep_copied: behind the copy of the timestep that is under way to the host, or None.
    """

    sites: Mapping[str, Site]
    rearrangements: Rearrangements = field(default_factory=Rearrangements)
    timestep_copied: Event | None = None


_running = threading.local()


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


def lookup(name: str) -> Site:
    """Return the site of a name in the graph that this thread runs.

    Raises:
        KernelError: no graph of ours is running, or it has no such site.
    """
    invocation = current()
    if invocation is None or name not in invocation.sites:
        raise KernelError(
            "compiled code refers to an attention site that is not loaded",
            expected="a call of the model compiled with torch.compile(..., backend='calibatt')",
            got=f"site {name!r}, and "
            + ("no graph" if invocation is None else "a graph without it"),
            remedy="call the compiled model itself, not code that was taken out of it",
        )
    return invocation.sites[name]
