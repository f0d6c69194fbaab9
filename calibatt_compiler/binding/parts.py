"""What serves a part of a model, found anew each time its graph runs.

Behind a graph break, under offloading hooks or with regional compilation a graph is a part of a
model, often one block. Dynamo runs one graph for all blocks alike. So which block it is, and at
which timestep, is read off the modules that are being called.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary, WeakSet

import torch

from calibatt_compiler.binding.model_call import ModelCallReader
from calibatt_compiler.binding.place import arguments, call_of, module_names
from calibatt_compiler.capture import Site, SiteInfo
from calibatt_compiler.errors import KernelError
from calibatt_compiler.model.callers import ModuleCall, module_calls
from calibatt_compiler.model.dynamo import Place
from calibatt_compiler.passes.graph import example
from calibatt_compiler.passes.rewrite import Rewrite, Skip
from calibatt_compiler.runtime.graph import Run, ServedGraph
from calibatt_compiler.runtime.site import DenseSite

UNSEEN = "the call of the model that it is a part of can't be seen"
CHECKPOINTED = "blocks compiled one by one under gradient checkpointing"


@dataclass(frozen=True)
class PartCall:
    """One attention call of a part's graph.

    Attributes:
        key: what the graph calls its site.
        info: of the call, with concrete sizes.
        device: of its operands.
        dtype: that it computes in.
        skip: why it is stock attention in this graph; None: our operator.
    """

    key: str
    info: SiteInfo
    device: torch.device
    dtype: torch.dtype
    skip: Skip | None


class PartBinder(Protocol):
    """Decides what serves a call by the name of its site.

    Attributes:
        reader: reads the timestep of the model's calls.
    """

    @property
    def reader(self) -> ModelCallReader:
        """Reads the timestep of the model's calls."""

    def bind_part(self, call: PartCall, info: SiteInfo) -> Site | Skip:
        """Return what serves a call of a part, or why it is dense."""


class PartSites:
    """A `Locator` of a part's graph.

    Args:
        calls: those of the graph.
        place: of the part for which it was captured.
        binder: returns what binds sites of a model of the same class.
        report: receives what serves each part, and the model, when it is first seen.
    """

    def __init__(
        self,
        calls: Sequence[PartCall],
        place: Place,
        binder: Callable[[torch.nn.Module], PartBinder],
        report: Callable[[torch.nn.Module | None, str, ServedGraph], None],
    ) -> None:
        self._calls = tuple(calls)
        self._lowered = any(call.skip is None for call in calls)
        self._kind = type(place.root)
        self._binder = binder
        self._report = report
        self._paths: WeakKeyDictionary[
            torch.nn.Module, Mapping[torch.nn.Module, tuple[str, ...]]
        ] = WeakKeyDictionary()
        self._served: WeakKeyDictionary[
            torch.nn.Module, tuple[weakref.ref[torch.nn.Module], ServedGraph]
        ] = WeakKeyDictionary()
        self._foreign: WeakSet[torch.nn.Module] = WeakSet()  # innermost, and of no model
        self._dense: dict[tuple[str, str], ServedGraph] = {}
        if place.root is not None and place.anchor is not None:  # what can't be served is known now
            self._serve(place.root, place.anchor, place.path)

    def __call__(self) -> Run:
        """As in `Locator`."""
        calls = module_calls()
        found = self._find(calls)
        if found is None:
            return self._rerun(calls)
        root, anchor, path = found
        served = self._serve(root, anchor, path)
        if not self._lowered:
            return Run(served)
        call = call_of(root, calls)
        if call is None:
            return self._unserved(root, path, UNSEEN)
        if path and torch.is_grad_enabled() and getattr(root, "gradient_checkpointing", False):
            # The backward pass would run it again, with no model's call around it.
            return self._unserved(root, path, CHECKPOINTED)
        try:
            timestep = self._binder(root).reader.timestep(
                root, *arguments(call), part=(id(self), path)
            )
        except KeyError:
            return self._unserved(root, path, "the model's call has no timestep")
        return Run(served, timestep)

    def _find(
        self, calls: Sequence[ModuleCall]
    ) -> tuple[torch.nn.Module, torch.nn.Module, str] | None:
        root = next((c.module for c in reversed(calls) if type(c.module) is self._kind), None)
        if root is None:
            return None
        innermost = calls[0].module
        if root not in self._paths or not (
            innermost in self._paths[root] or innermost in self._foreign
        ):
            self._paths[root] = module_names(root)
            self._foreign.add(innermost)
        for call in calls:
            if names := self._paths[root].get(call.module):
                return root, call.module, names[0]
        return None

    def _serve(self, root: torch.nn.Module, anchor: torch.nn.Module, path: str) -> ServedGraph:
        held = self._served.get(anchor)
        if held is not None and held[0]() is root:
            return held[1]
        binder = self._binder(root)
        entries: dict[str, Site | str] = {}
        sites: dict[str, Site] = {}
        for call in self._calls:
            name = site_name(path, call.key)
            info = SiteInfo(**{**vars(call.info), "name": name})
            found = call.skip if call.skip is not None else binder.bind_part(call, info)
            entries[name] = found.reason if isinstance(found, Skip) else found
            if call.skip is None:
                sites[call.key] = DenseSite() if isinstance(found, Skip) else found
        served = ServedGraph(entries, sites)
        self._served[anchor] = weakref.ref(root), served
        self._report(root, path, served)
        return served

    def _rerun(self, calls: Sequence[ModuleCall]) -> Run:
        """Return what serves a run with no model's call around it: dense, if it was so before."""
        for call in calls:
            held = self._served.get(call.module)
            root = None if held is None else held[0]()
            if root is not None and getattr(root, "gradient_checkpointing", False):
                return self._unserved(root, module_names(root)[call.module][0], CHECKPOINTED)
        if self._lowered and torch._C._current_graph_task_id() != -1:
            raise KernelError(
                "a part of a model runs again in a backward pass",
                expected="blocks compiled one by one without gradient checkpointing",
                got="checkpointed blocks, whose attention was served by a plan before",
                remedy="compile the whole model, or train without gradient checkpointing",
            )
        return self._unserved(None, "", UNSEEN)

    def _unserved(self, root: torch.nn.Module | None, path: str, reason: str) -> Run:
        served = self._dense.get((path, reason))
        if served is None:
            entries = {
                site_name(path, call.key): reason if call.skip is None else call.skip.reason
                for call in self._calls
            }
            sites = {call.key: DenseSite() for call in self._calls if call.skip is None}
            served = self._dense[path, reason] = ServedGraph(dict(entries), sites)
            self._report(root, path, served)
        return Run(served, 0.0)


def site_name(path: str, key: str) -> str:
    """Return the name of a site from the path of its part and what the part's graph calls it."""
    return f"{path}{key}".replace(".:", ":").rstrip(".") if path else key


def part_calls(rewrite: Rewrite) -> list[PartCall]:
    """Return the calls of a graph that was rewritten, with what was decided of them."""
    found = []
    for call, decision in zip(rewrite.calls, rewrite.decisions, strict=True):
        value = example(call.node)
        skip = decision if isinstance(decision, Skip) else None
        device = torch.device("cpu") if value is None else value.device
        dtype = torch.float32 if value is None else value.dtype
        info = call.info if skip else rewrite.binder.settled(call.info)
        found.append(PartCall(call.key, info, device, dtype, skip))
    return found
