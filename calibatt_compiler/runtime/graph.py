"""A compiled graph together with the sites that its operators name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

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


class ServedGraph:
    """What serves the sites of a graph, or of a graph in one of the modules that share it.

    Attributes:
        entries: by site name, what serves it, or why nothing of ours does.
        sites: what serves each operator, by what the graph calls it.
        counts: what it has done.
    """

    def __init__(
        self, entries: Mapping[str, Site | str], sites: Mapping[str, Site] | None = None
    ) -> None:
        self.entries = dict(entries)
        self.counts = GraphCounts()
        own = {name: entry for name, entry in entries.items() if not isinstance(entry, str)}
        self.sites = Sites(own if sites is None else sites)


@dataclass
class Run:
    """What one run of a graph needs to know.

    Attributes:
        served: what serves its sites.
        timestep: that of the model's call; None: the graph has its own.
    """

    served: ServedGraph
    timestep: float | None = None


class Locator(Protocol):
    """Says what a run of a graph is part of."""

    def __call__(self) -> Run:
        """Look at the run that begins now in this thread."""


@dataclass
class CompiledGraph:
    """Calls the compiled code, counts its calls and keeps its sites alive.

    Attributes:
        compiled: the code.
        entries: by site name, what serves it, or why it was left as stock attention.
        coordinates: what is shown the coordinates of tokens.
        locate: says what a run is part of; None: all runs are alike.
        served: what serves its runs, if all are alike.
    """

    compiled: Callable[..., Any]
    entries: Mapping[str, Site | str]
    coordinates: CoordinatesReader | None = None
    locate: Locator | None = None
    served: ServedGraph = field(init=False)

    def __post_init__(self) -> None:
        self.served = ServedGraph(self.entries if self.locate is None else {})
        self._rearrangements = Rearrangements()

    def __call__(self, *inputs: Any) -> Any:
        """Run the graph once."""
        run = Run(self.served) if self.locate is None else self.locate()
        run.served.counts.calls += 1
        invocation = Invocation(
            run.served.sites, self._rearrangements, self.coordinates, timestep=run.timestep
        )
        with running(invocation):
            return self.compiled(*inputs)
