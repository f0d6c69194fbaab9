"""Keeps what was compiled where `summary` looks for it: with the model, and what is around it."""

from __future__ import annotations

import itertools
import weakref

import torch

from calibatt_compiler.binding.binders import PlanBinder
from calibatt_compiler.binding.pinned import PinnedOptions
from calibatt_compiler.model.dynamo import FrameInputs
from calibatt_compiler.model.families import unwrap
from calibatt_compiler.report.summary import GraphReport, keep_report
from calibatt_compiler.runtime.graph import ServedGraph

_numbers = itertools.count()


class ReportKeeper:
    """Reports what serves one graph, or each part that it serves; holds no model.

    Args:
        inputs: of the captured frame.
        binder: of the graph.
        options: of the compile call.
        order: what became of the plan's token order, in words.
    """

    def __init__(
        self, inputs: FrameInputs, binder: PlanBinder, options: PinnedOptions, order: str | None
    ) -> None:
        root = inputs.place.root
        around = [m for m in inputs.callers if m not in inputs.place.names]
        if inputs.module is not None and inputs.module not in inputs.place.names:
            around.append(inputs.module)
        self._own = weakref.WeakSet(around if root is None else [root, unwrap(root), *around])
        self._binder = binder
        self._options = options
        self._order = order
        self._number = next(_numbers)

    def __call__(self, root: torch.nn.Module | None, path: str, served: ServedGraph) -> None:
        """Keep a report.

        Args:
            root: the model; None: that for which the graph was captured.
            path: of the part in it.
            served: what serves its sites.
        """
        report = GraphReport(served, self._binder, self._options, self._order, self._number)
        modules = set(self._own) if root is None or root in self._own else {root, unwrap(root)}
        for module in modules:
            keep_report(module, report)
