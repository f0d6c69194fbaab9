"""Reads what Dynamo knows of the frame behind a graph. The only file that touches its internals.

A backend is handed a graph and its tensors. The module, and arguments that are no tensors (LTX
takes its grid as three integers), are found through the tracer that is calling the backend.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node


@dataclass(frozen=True)
class FrameInputs:
    """Arguments of the captured call, by the names of the module's `forward`.

    Attributes:
        module: the module whose call was captured, if it is one.
        placeholders: graph inputs by argument name.
        values: all arguments; tensors as fake tensors and integers that may change as symbolic
            integers, so that looking at a size installs Dynamo's guard on it.
    """

    module: torch.nn.Module | None = None
    placeholders: Mapping[str, Node] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)


def frame_inputs(gm: GraphModule) -> FrameInputs:
    """Return the inputs of the frame being compiled; of a graph from elsewhere, by their names."""
    scope = _frame_scope()
    module = scope.get("self")
    by_source = {_source(node): node for node in gm.graph.find_nodes(op="placeholder")}
    placeholders: dict[str, Node] = {}
    values: dict[str, Any] = {}
    for name, source, value in _arguments(module, scope):
        node = by_source.get(source)
        if node is not None:
            placeholders[name] = node
        values[name] = value if node is None else node.meta.get("example_value", value)
    if not scope:
        for source, node in by_source.items():
            placeholders[source] = node
            values[source] = node.meta.get("example_value", node.meta.get("val"))
    return FrameInputs(
        module if isinstance(module, torch.nn.Module) else None, placeholders, values
    )


def keywords_with(options: object) -> dict[str, Any] | None:
    """Return the keywords in which the backend of a `torch.compile` call holds these very options.

    They are in sight while Dynamo calls the backend, or compares it with that of another call.
    """
    frame = sys._getframe(1)
    for _ in range(4):
        if frame.f_back is None:
            return None
        frame = frame.f_back
        for name in ("self", "other"):
            held = frame.f_locals.get(name)
            keywords = getattr(held, "kwargs", None)
            if isinstance(keywords, dict) and keywords.get("options", held) is options:
                return keywords
    return None


def options_of(compiled: object) -> object:
    """Return the very `options` that a compiled model holds, if they can be seen.

    They tell apart several `torch.compile` calls over one module.

    Args:
        compiled: what `torch.compile` returned, or a module compiled in place.
    """
    backend = getattr(getattr(compiled, "dynamo_ctx", None), "callback", None)
    in_place = getattr(compiled, "_compiled_call_impl", None)
    if backend is None and inspect.isfunction(in_place):
        backend = inspect.getclosurevars(in_place).nonlocals.get("callback")
    for _ in range(8):
        if backend is None:
            return None
        keywords = getattr(backend, "kwargs", None)
        if isinstance(keywords, dict) and "options" in keywords:
            return keywords["options"]
        backend = getattr(backend, "_torchdynamo_orig_backend", None)
    return None


def _frame_scope() -> Mapping[str, Any]:
    """Local variables of the frame being compiled; empty outside of Dynamo."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        tracer = InstructionTranslator.current_tx()
    except AttributeError:  # a thread-local that is unset outside of tracing
        return {}
    output = getattr(tracer, "output", None)
    return dict(getattr(output, "local_scope", {}))


def _source(node: Node) -> str:
    """Dynamo's name for where an input comes from, such as `L['kwargs']['timestep']`."""
    source = getattr(node, "_dynamo_source", None)
    if source is None and "grapharg" in node.meta:
        source = node.meta["grapharg"].source
    if source is None:
        return str(node.target)
    name = source.name
    return str(name() if callable(name) else name)


def _arguments(module: object, scope: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """Return (argument name, source, value): for a plain frame or a `*args, **kwargs` wrapper."""
    found = [
        (name, f"L[{name!r}]", value)
        for name, value in scope.items()
        if name not in ("self", "args", "kwargs")
    ]
    positional = scope.get("args")
    if isinstance(module, torch.nn.Module) and isinstance(positional, tuple):
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        for index, (name, value) in enumerate(zip(names, positional, strict=False)):
            found.append((name, f"L['args'][{index}]", value))
    keywords = scope.get("kwargs")
    if isinstance(keywords, Mapping):
        found += [(name, f"L['kwargs'][{name!r}]", value) for name, value in keywords.items()]
    return found
