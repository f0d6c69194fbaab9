"""A compiled graph together with the sites that its operators name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from calibatt_compiler.capture import Site
from calibatt_compiler.runtime.invocation import serving


class CompiledGraph:
    """Calls the compiled code, counts its calls and keeps its sites alive.

    Attributes:
        entries: by site name, what serves it, or why it was left as stock attention.
        calls: how often the graph ran: each left site was served dense once a run.
    """

    def __init__(self, compiled: Callable[..., Any], entries: Mapping[str, Site | str]) -> None:
        self._compiled = compiled
        self.entries = dict(entries)
        self.calls = 0
        self._sites = {
            name: entry for name, entry in self.entries.items() if not isinstance(entry, str)
        }

    def __call__(self, *inputs: Any) -> Any:
        """Run the graph once."""
        self.calls += 1
        with serving(self._sites):
            return self._compiled(*inputs)
