"""What was matched, lowered and skipped, and what served each call since."""

from __future__ import annotations

import io
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from calibatt_compiler.binding.pinned import PinnedOptions
from calibatt_compiler.errors import CaptureError
from calibatt_compiler.model.compile_calls import options_of, options_within
from calibatt_compiler.printable import printable
from calibatt_compiler.report.drift import Drift
from calibatt_compiler.report.eager import eager_note
from calibatt_compiler.runtime.graph import ServedGraph
from calibatt_compiler.runtime.site import SparseSite

if TYPE_CHECKING:
    from rich.console import Group

    from calibatt_compiler.binding.binders import PlanBinder


@dataclass(frozen=True)
class SiteRow:
    """One site of one compiled graph.

    Attributes:
        name: of the site.
        status: `sparse`, or why it is not.
        density: kept blocks / all blocks, mean over steps; None where skipped.
        computed_density: the same for what the kernels compute; above `density` by
            pooled keys.
        kernel: kinds of kernel that serve it now.
        sparse_calls: calls served by a sparse kernel.
        dense_calls: calls served dense, by reason.
        reasons: why another kernel than the one asked for serves, by number of patterns.
        repairs: calls computed again because a fixed softmax shift overflowed.
        repetitive: share of the heads that copy rows, mean over steps.
        drift: what monitored calls keep; None if none was looked at.
    """

    name: str
    status: str
    density: float | None
    computed_density: float | None
    kernel: str
    sparse_calls: int
    dense_calls: Mapping[str, int]
    reasons: Mapping[str, int] = field(default_factory=dict)
    repairs: int = 0
    repetitive: float = 0.0
    drift: Drift | None = None


class GraphReport:
    """One compiled graph, or a part of a model that one serves: live counters of its sites.

    They stay when the graph is gone.

    Attributes:
        number: of the graph.
        options: of the `torch.compile` call that compiled it.
        plan_digest: digest of the plan.
        order: what became of the plan's token order, in words; None if it is the model's.
        watch: remembers the timesteps that the graph was given.
    """

    def __init__(
        self,
        graph: ServedGraph,
        binder: PlanBinder,
        options: PinnedOptions,
        order: str | None,
        number: int,
    ) -> None:
        self.number = number
        self.options = options
        self.order = order
        self.plan_digest = binder.plan.digest
        self.watch = binder.watch
        self._plan = binder.plan
        # Not the graph, nor its sites: their tables go with whoever calls them.
        self._graph = weakref.ref(graph)
        self._counts = graph.counts
        self._entries = {
            name: served.counts if isinstance(served, SparseSite) else str(served)
            for name, served in graph.entries.items()
        }

    def rows(self, seen: set[int]) -> list[SiteRow]:
        """Rows of this graph as they stand now.

        Args:
            seen: counters that have a row, by `id`: graphs of one model's parts share sites. Those
                of this graph are added.
        """
        rows = []
        graph = self._graph()
        sites = {} if graph is None else graph.entries
        for name, served in self._entries.items():
            if isinstance(served, str):
                dense = {f"dense: {served}": self._counts.calls}
                rows.append(SiteRow(name, served, None, None, "sdpa", 0, dense))
                continue
            if id(served) in seen:
                continue
            seen.add(id(served))
            site = sites.get(name)
            dense = {kind: n for kind, n in served.calls.items() if kind.startswith("dense: ")}
            rows.append(
                SiteRow(
                    name=name,
                    status="sparse",
                    density=self._plan.density(site=name),
                    computed_density=served.computed_density,
                    kernel=", ".join(served.kinds),
                    sparse_calls=sum(served.calls.values()) - sum(dense.values()),
                    dense_calls=dense,
                    reasons=dict(served.reasons),
                    repairs=site.repairs if isinstance(site, SparseSite) else served.recomputed,
                    repetitive=self._plan.sites[name].repetitive_share,
                    drift=Drift.of(self._plan, name, served.monitor),
                )
            )
        return rows

    def release_kernels(self) -> None:
        """Free the tables of the graph, if it is still there."""
        graph = self._graph()
        for site in () if graph is None else graph.entries.values():
            if isinstance(site, SparseSite):
                site.release_kernels()


@dataclass(frozen=True)
class Summary:
    """All graphs that were compiled for one model; `str()` or `rich` shows it as a table.

    Attributes:
        rows: one a site and graph.
        graphs: how many graphs were compiled: one for each size of video.
        plan_digest: digest of the plan.
        orders: how the graphs bring tokens into the plan's order, in words; empty if it is the
            model's.
        samplers: of graphs that were given timesteps which are no steps of the plan, both lists in
            words.
        changed: in words, that the plan's file has become another one; None if it has not.
        eager: in words, that calls ran without calibatt, which can't count them, and the likely
            cause; None if nothing says so.
    """

    rows: tuple[SiteRow, ...]
    graphs: int
    plan_digest: str
    orders: tuple[str, ...] = ()
    samplers: tuple[str, ...] = ()
    changed: str | None = None
    eager: str | None = None

    @property
    def sparse_calls(self) -> int:
        """Attention calls served by sparse kernels."""
        return sum(row.sparse_calls for row in self.rows)

    @property
    def dense_calls(self) -> Counter[str]:
        """Attention calls served dense, by reason."""
        total: Counter[str] = Counter()
        for row in self.rows:
            total.update(row.dense_calls)
        return total

    @property
    def skipped(self) -> Counter[str]:
        """Sites that were not lowered, by reason."""
        return Counter(row.status for row in self.rows if row.status != "sparse")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "plan_digest": self.plan_digest,
            "graphs": self.graphs,
            "token_order": list(self.orders),
            "samplers": list(self.samplers),
            "changed": self.changed,
            "eager": self.eager,
            "sparse_calls": self.sparse_calls,
            "dense_calls": dict(self.dense_calls),
            "skipped": dict(self.skipped),
            "sites": [
                {
                    "name": row.name,
                    "status": row.status,
                    "density": row.density,
                    "computed_density": row.computed_density,
                    "kernel": row.kernel,
                    "sparse_calls": row.sparse_calls,
                    "dense_calls": dict(row.dense_calls),
                    "reasons": dict(row.reasons),
                    "repairs": row.repairs,
                    "repetitive": row.repetitive,
                    "drift": None if row.drift is None else asdict(row.drift),
                }
                for row in self.rows
            ],
        }

    def notes(self) -> list[str]:
        """Return, in words, what did not go as asked for, and how tokens are brought into order."""
        reasons: Counter[str] = Counter()
        for row in self.rows:
            reasons.update(row.reasons)
        dense = Counter(
            {why: n for why, n in self.dense_calls.items() if why in _served(self.rows)}
        )
        repairs = sum(row.repairs for row in self.rows)
        return (
            [note for note in (self.changed, self.eager) if note is not None]
            + list(self.orders)
            + list(self.samplers)
            + [f"{n} calls {why}" for why, n in dense.most_common()]
            + [f"{n} patterns by another kernel: {why}" for why, n in reasons.most_common()]
            + [f"{repairs} calls computed again: scores overflowed their softmax shift"]
            * (repairs > 0)
            + self._drift_notes()
        )

    def _drift_notes(self) -> list[str]:
        """Return, in words, what monitored calls keep; nothing if no call was looked at."""
        watched = [(row.name, row.drift) for row in self.rows if row.drift is not None]
        if not watched:
            return []
        samples = sum(drift.samples for _, drift in watched)
        kept = sum(drift.samples * drift.kept for _, drift in watched) / samples
        notes = [f"monitor: {kept:.3f} of attention mass kept, {samples} calls looked at"]
        drifted = [(name, drift) for name, drift in watched if drift.drifted]
        return notes + [
            f"monitor: {name} keeps {drift.kept:.3f}, was calibrated to {drift.calibrated:.3f}: "
            "validate the plan on such inputs (calibatt inspect --validate)"
            for name, drift in drifted
        ]

    def __rich__(self) -> Group:
        from rich.box import SIMPLE_HEAD
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        lowered = sum(row.status == "sparse" for row in self.rows)
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for heading in ("site", "served by"):
            table.add_column(heading, overflow="fold")
        copying = any(row.repetitive for row in self.rows)
        copies = ("copy",) if copying else ()
        for heading in (*copies, "density", "computed", "sparse", "dense"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self.rows:
            served = row.kernel if row.status == "sparse" else f"{row.kernel}: {row.status}"
            table.add_row(
                Text(printable(row.name)),
                Text(printable(served)),
                *([f"{row.repetitive:.0%}" if row.repetitive else ""] if copying else []),
                "" if row.density is None else f"{row.density:.3f}",
                "" if row.computed_density is None else f"{row.computed_density:.3f}",
                str(row.sparse_calls),
                str(sum(row.dense_calls.values())),
            )
        title = (
            f"calibatt: {lowered} of {len(self.rows)} attention sites sparse, "
            f"{self.graphs} graph(s), plan {self.plan_digest[:12]}"
        )
        legend = ["copy: heads that copy rows, mean over the steps"] * copying
        return Group(
            Text(title, style="italic"),
            table,
            *legend,
            *(Text(printable(note)) for note in self.notes()),
        )

    def __str__(self) -> str:
        from rich.console import Console

        # All of it is printable text, in any console.
        out = io.StringIO()
        Console(file=out, width=100, force_terminal=False, color_system=None).print(self)
        return out.getvalue()


def _served(rows: Sequence[SiteRow]) -> set[str]:
    """Reasons for dense calls of sites that are sparse otherwise."""
    return {why for row in rows if row.status == "sparse" for why in row.dense_calls}


_reports: WeakKeyDictionary[torch.nn.Module, list[GraphReport]] = WeakKeyDictionary()


def keep_report(module: torch.nn.Module, report: GraphReport) -> None:
    """Remember what was compiled for a module, for as long as the module lives.

    Who compiles again, with other options, is done with the tables of before: Dynamo keeps the
    graph, which has them made again if it is called after all.
    """
    reports = _reports.setdefault(module, [])
    for earlier in reports:
        if earlier.options != report.options:
            earlier.release_kernels()
    reports.append(report)


def summary(compiled: object) -> Summary:
    """Return what the calibatt backend did with a model, and what served its calls since.

    Args:
        compiled: what `torch.compile` returned, a module compiled in place, or a pipeline.

    Raises:
        CaptureError: it is not compiled with this backend.
    """
    compiled = getattr(compiled, "transformer", compiled)
    module = getattr(compiled, "_orig_mod", compiled)
    reports = _reports.get(module, []) if isinstance(module, torch.nn.Module) else []
    options = options_of(compiled)
    whole = options is not None
    if whole:
        kind = type(module) if isinstance(module, torch.nn.Module) else None
        reports = [report for report in reports if report.options is options] or _shared(
            kind, options
        )
    if not isinstance(options, PinnedOptions):
        options = reports[-1].options if reports else _pinned(compiled)
    seen: set[int] = set()
    by_report = [(report, report.rows(seen)) for report in reports]
    rows = tuple(row for _, of_report in by_report for row in of_report)
    # Under graph breaks most graphs have no attention, and are of no interest.
    graphs = {report.number for report, of_report in by_report if of_report or not rows}
    orders = dict.fromkeys(report.order for report in reports if report.order is not None)
    samplers = dict.fromkeys(note for report in reports if (note := report.watch.note()))
    sites = options.options.plan.sites
    # What ran with no model's call around it is known by the end of its name alone.
    met = any(site.endswith(row.name) for row in rows for site in sites)
    return Summary(
        rows,
        len(graphs),
        options.options.plan.digest,
        tuple(orders),
        tuple(samplers),
        options.changed(),
        eager_note(module, whole=whole, captured=bool(reports), met=met),
    )


def _pinned(compiled: object) -> PinnedOptions:
    """Return the options of a compiled model of which nothing was captured."""
    options = options_within(compiled)
    if not isinstance(options, Mapping):
        raise CaptureError(
            "there is nothing to summarise",
            expected="a model, or a part of one, compiled with backend='calibatt'",
            got=type(compiled).__name__,
            remedy="pass what torch.compile returned, the module compiled in place, or a pipeline",
        )
    return PinnedOptions.of(options)


def _shared(kind: type | None, options: object) -> list[GraphReport]:
    """Return reports of equal options over another instance of the same class.

    Dynamo takes equal backends for one: the second instance is served by the first one's graph.

    Args:
        kind: the class; None: of any, as a function was compiled.
        options: of the compile call.
    """
    found = [
        report
        for module, reports in _reports.items()
        if kind is None or type(module) is kind
        for report in reports
        if report.options == options
    ]
    # A function's own graphs, where it has any, and not those of others that are compiled alike.
    own = [report for report in found if kind is None and report.options is options]
    return list(dict.fromkeys(own or found))
