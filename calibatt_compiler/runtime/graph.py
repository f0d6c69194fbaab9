"""A compiled graph together with the sites that its operators name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from calibatt_compiler.capture import Site
from calibatt_compiler.runtime.coordinates import CoordinatesReader
from calibatt_compiler.runtime.invocation import Invocation, Sites, running
from calibatt_compiler.runtime.token_order import Rearrangements


@dataclass
class GraphCounts:
    """What a graph has done; outlives it.

    Attributes:
        calls: how often it ran: each site that was left was served dense once a run.
    """

    calls: int = 0


class CompiledGraph:
    """Calls the compiled code, counts its calls and keeps its sites alive.

    Attributes:
        entries: by site name, what serves it, or why it was left as stock attention.
        counts: what it has done.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        entries: Mapping[str, Site | str],
        coordinates: CoordinatesReader | None = None,
    ) -> None:
        self._compiled = compiled
        self.entries = dict(entries)
        self.counts = GraphCounts()
        self._coordinates = coordinates
        self._rearrangements = Rearrangements()
        self._sites = Sites(
            {name: entry for name, entry in self.entries.items() if not isinstance(entry, str)}
        )

    def __call__(self, *inputs: Any) -> Any:
        """Run the graph once."""
        self.counts.calls += 1
        with running(Invocation(self._sites, self._rearrangements, self._coordinates)):
            return self._compiled(*inputs)
