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

from calibatt_compiler.capture import Site
from calibatt_compiler.errors import KernelError

_running = threading.local()


@contextmanager
def serving(sites: Mapping[str, Site]) -> Iterator[None]:
    """Let the operators that this thread runs meanwhile find their sites here."""
    outer = getattr(_running, "sites", None)
    _running.sites = sites
    try:
        yield
    finally:
        _running.sites = outer


def lookup(name: str) -> Site:
    """Return the site of a name in the graph that this thread runs.

    Raises:
        KernelError: no graph of ours is running, or it has no such site.
    """
    sites: Mapping[str, Site] | None = getattr(_running, "sites", None)
    if sites is None or name not in sites:
        raise KernelError(
            "compiled code refers to an attention site that is not loaded",
            expected="a call of the model compiled with torch.compile(..., backend='calibatt')",
            got=f"site {name!r}, and " + ("no graph" if sites is None else "a graph without it"),
            remedy="call the compiled model itself, not code that was taken out of it",
        )
    return sites[name]
