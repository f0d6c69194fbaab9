"""Reads what Dynamo knows of the frame behind a graph. With `compile_calls` all that touches it.

A backend is handed a graph and its tensors. The module, and arguments that are no tensors (LTX
takes its grid as three integers), are found through the tracer that is calling the backend.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from calibatt_compiler.model.callers import RESUMED, module_calls
from calibatt_compiler.passes.graph import FLEX, SDPA, example, module_path, subgraphs
from calibatt_compiler.plan.coordinates import OF_TEXT, OF_VIDEO, by_axis

TIMESTEPS = ("timestep", "timesteps", "t", "sigma")
"""What transformers call the diffusion timestep, most usual first."""

MOST_PARTS = 64
"""Longer lists of an argument are not looked into."""


@dataclass(frozen=True)
class Enclosing:
    """A module that a graph's attention lies in, called somewhere within the captured frame.

    Attributes:
        module: the module.
        entering: what its own operators read of the graph outside of it, but for weights.
    """

    module: torch.nn.Module
    entering: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Place:
    """Where in its model a captured frame stands.

    Attributes:
        root: the model; None if it can't be seen.
        anchor: the innermost of its modules that is being called; None: something around it is.
        path: of the anchor in the model, empty for the model itself.
        names: paths of the model's modules.
    """

    root: torch.nn.Module | None = None
    anchor: torch.nn.Module | None = None
    path: str = ""
    names: Mapping[torch.nn.Module, tuple[str, ...]] = field(default_factory=dict, repr=False)

    @property
    def within(self) -> bool:
        """Whether the frame is a part of the model: Dynamo may run its code for others like it."""
        return bool(self.path)


@dataclass(frozen=True)
class FrameInputs:
    """Arguments of the captured call, by the names of the frame: those of a module's `forward`.

    Attributes:
        module: the module whose call was captured, if it is one.
        placeholders: graph inputs by argument name.
        values: all arguments; tensors as fake tensors and integers that may change as symbolic
            integers, so that looking at a size installs Dynamo's guard on it.
        constants: names of the integers whose values the captured code holds for the same.
        enclosing: modules within the frame that the first attention call lies in, outermost first.
        callers: modules that are being called, the innermost first; the frame's own is the first.
        owners: modules of the graph's attention calls, by Dynamo's path.
        given: names of the tensors, where they are not those of a graph but of a model's call.
        resumed: whether the frame goes on with another one, behind a graph break: its variables
            are no arguments.
        ends: whether the frame is over with this graph, and not broken.
        place: where in its model the frame stands.
        of_call: whether the model is being called, with a timestep that can be read.
    """

    module: torch.nn.Module | None = None
    placeholders: Mapping[str, Node] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    constants: frozenset[str] = frozenset()
    enclosing: tuple[Enclosing, ...] = ()
    callers: tuple[torch.nn.Module, ...] = ()
    owners: Mapping[str, torch.nn.Module] = field(default_factory=dict)
    given: frozenset[str] = frozenset()
    resumed: bool = False
    ends: bool = True
    place: Place = Place()
    of_call: bool = False

    @property
    def whole(self) -> bool:
        """Whether the frame's arguments are those of the model, or of what is around it."""
        return not self.resumed and not self.place.within

    @property
    def is_part(self) -> bool:
        """Whether the frame is a part of a model's call, which says what it has not itself."""
        return self.place.within or (self.of_call and self.timestep() is None)

    def timestep(self) -> Node | None:
        """Return the timestep among the inputs, which may be anything in a part of a model."""
        found = self.placeholders if self.whole else {}
        nodes = (found.get(name) for name in TIMESTEPS)
        return next(
            (node for node in nodes if node is not None and example(node) is not None), None
        )

    def reads(self, name: str) -> bool:
        """Whether a tensor is among what the graph, or the model, reads."""
        return name in self.placeholders or name in self.given

    def site_name(self, node: Node) -> str | None:
        """Return the path in the model of the module that an attention call lies in.

        None if it can't be seen; empty if it is none of the model's.
        """
        if self.place.root is None:
            return None
        path = module_path(node)
        owner = self.owners.get(path) if path else self.place.anchor
        if owner is None:
            return None if path and not self.place.within else ""
        known = self.place.names.get(owner, ("",))
        # A module with several names is known by the one that Dynamo went by.
        return max(known, key=lambda name: len(name) if path.endswith(name) else -1)

    def coordinates(self) -> tuple[str, ...]:
        """Return the names of the arguments that place tokens, where the graph reads them."""
        return tuple(
            name
            for name in (*OF_VIDEO, *OF_TEXT)
            if self.reads(name)
            and isinstance(value := self.values.get(name), torch.Tensor)
            and by_axis(name, value) is not None
        )


def frame_inputs(gm: GraphModule) -> FrameInputs:
    """Return the inputs of the frame being compiled; of a graph from elsewhere, by their names."""
    tracer = _tracer()
    output = getattr(tracer, "output", None)
    scope: Mapping[str, Any] = dict(getattr(output, "local_scope", {}))
    module = _module_of(tracer, scope)
    by_source = {_source(node): node for node in gm.graph.find_nodes(op="placeholder")}
    guarded = {guard.name for guard in getattr(output, "guards", ())}
    placeholders: dict[str, Node] = {}
    values: dict[str, Any] = {}
    constants: set[str] = set()
    for name, source, value in _arguments(tracer, module, scope):
        node = by_source.get(source)
        if node is not None:
            placeholders[name] = node
        elif source in guarded:
            constants.add(name)
        values[name] = value if node is None else node.meta.get("example_value", value)
    if not scope:
        for source, node in by_source.items():
            placeholders[source] = node
            values[source] = node.meta.get("example_value", node.meta.get("val"))
    scopes = {"L": scope, "G": getattr(output, "global_scope", {})}
    own = _called(tracer, scope)
    calls = [] if tracer is None else module_calls()
    callers = [call.module for call in calls if call.module is not gm]  # we are called with it
    reason = getattr(output, "compile_subgraph_reason", None)
    return FrameInputs(
        module,
        placeholders,
        values,
        frozenset(constants),
        _enclosing(gm, scopes),
        tuple(dict.fromkeys(callers if own is None else [own, *callers])),
        _owners(gm, scopes),
        resumed=getattr(tracer, "f_code", None) is not None
        and tracer.f_code.co_name.startswith(RESUMED),
        ends=not getattr(reason, "graph_break", False),
    )


def _tracer() -> Any:
    """What is compiling a frame now; None outside of Dynamo."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx()
    except AttributeError:  # a thread-local that is unset outside of tracing
        return None


def _called(tracer: Any, scope: Mapping[str, Any]) -> torch.nn.Module | None:
    """Return the module that a frame's first argument is: see `module_calls`."""
    code = getattr(tracer, "f_code", None)
    first = None if code is None or not code.co_argcount else scope.get(code.co_varnames[0])
    return first if isinstance(first, torch.nn.Module) else None


def _module_of(tracer: Any, scope: Mapping[str, Any]) -> torch.nn.Module | None:
    """Return the module that a frame is a method of, or hands its arguments on to.

    Some name it otherwise than `self`.
    """
    code: Any = getattr(tracer, "f_code", None)
    forwards = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS
    own = code is not None and (
        code.co_name == "forward"
        or (code.co_argcount == 1 and code.co_flags & forwards == forwards)
    )
    first = code.co_varnames[:1] if own else ()
    for name in ("self", *first):
        if isinstance(scope.get(name), torch.nn.Module):
            found: torch.nn.Module = scope[name]
            return found
    return None


def _source(node: Node) -> str:
    """Dynamo's name for where an input comes from, such as `L['kwargs']['timestep']`."""
    source = getattr(node, "_dynamo_source", None)
    if source is None and "grapharg" in node.meta:
        source = node.meta["grapharg"].source
    if source is None:
        return str(node.target)
    name = source.name
    return str(name() if callable(name) else name)


def _arguments(tracer: Any, module: object, scope: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """Return (argument name, source, value): for a plain frame or a `*args, **kwargs` wrapper.

    What lists and tuples of an argument hold is named `argument.0.1`.
    """
    code = getattr(tracer, "f_code", None)
    named = 0 if code is None else code.co_argcount + code.co_kwonlyargcount
    rest = list(code.co_varnames[named:]) if code is not None else []
    positional = rest.pop(0) if code is not None and code.co_flags & inspect.CO_VARARGS else "args"
    keywords = rest[0] if code is not None and code.co_flags & inspect.CO_VARKEYWORDS else "kwargs"
    found = [
        (name, f"L[{name!r}]", value)
        for name, value in scope.items()
        if value is not module and name not in (positional, keywords)
    ]
    if isinstance(scope.get(positional), tuple):
        names = [f"{positional}.{index}" for index in range(len(scope[positional]))]
        if isinstance(module, torch.nn.Module):
            known = list(inspect.signature(type(module).forward).parameters)[1:]
            names[: len(known)] = known[: len(names)]
        for index, (name, value) in enumerate(zip(names, scope[positional], strict=True)):
            found.append((name, f"L[{positional!r}][{index}]", value))
    if isinstance(scope.get(keywords), Mapping):
        found += [
            (str(name), f"L[{keywords!r}][{name!r}]", value)
            for name, value in scope[keywords].items()
        ]
    return [part for argument in found for part in _parts(*argument)]


def _parts(name: str, source: str, value: Any) -> list[tuple[str, str, Any]]:
    if not isinstance(value, (list, tuple)) or len(value) > MOST_PARTS:
        return [(name, source, value)]
    return [
        part
        for index, item in enumerate(value)
        for part in _parts(f"{name}.{index}", f"{source}[{index}]", item)
    ]


def _enclosing(gm: GraphModule, scopes: Mapping[str, Mapping[str, Any]]) -> tuple[Enclosing, ...]:
    stacks = [node.meta.get("nn_module_stack") or {} for node in _attention(gm)]
    found = []
    for key, (path, kind) in next(iter(stacks), {}).items():
        module = _resolve(str(path), scopes)
        if type(module) is kind and isinstance(module, torch.nn.Module):
            found.append(Enclosing(module, _entering(gm, key)))
    return tuple(found)


def _owners(gm: GraphModule, scopes: Mapping[str, Mapping[str, Any]]) -> dict[str, torch.nn.Module]:
    owners: dict[str, torch.nn.Module] = {}
    for node in gm.graph.nodes:
        for body in subgraphs(node):
            owners |= _owners(body, scopes)
        path = (
            module_path(node)
            if node.op == "call_function" and node.target in (*SDPA, *FLEX)
            else ""
        )
        found = _resolve(path, scopes) if path else None
        if isinstance(found, torch.nn.Module):
            owners[path] = found
    return owners


def _attention(gm: GraphModule) -> list[Node]:
    """Attention calls, else calls of subgraphs, which may hold them."""
    calls = list(gm.graph.find_nodes(op="call_function", target=SDPA[0]))
    return calls or [node for node in gm.graph.nodes if subgraphs(node)]


def _entering(gm: GraphModule, key: str) -> tuple[torch.Tensor, ...]:
    inside = {
        node
        for node in gm.graph.nodes
        # An input of the graph is said to be where it was read first.
        if node.op != "placeholder" and key in (node.meta.get("nn_module_stack") or {})
    }
    outside = dict.fromkeys(
        argument
        for node in gm.graph.nodes
        if node in inside
        for argument in node.all_input_nodes
        if argument not in inside
    )
    return tuple(
        value
        for node in outside
        if not re.search(r"\b_(parameters|buffers)\b", _source(node))
        and (value := example(node)) is not None
    )


def _resolve(path: str, scopes: Mapping[str, Mapping[str, Any]]) -> object:
    """Follow Dynamo's path of a module, such as `L['self'].__dict__['_modules']['blocks'].0`."""
    start = re.match(r"(L|G)\['(\w+)'\]", path)
    if start is None:
        return None
    found: Any = scopes[start[1]].get(start[2])
    for name, key, index in re.findall(
        r"\.(\w+)|\[['\"]([^'\"]+)['\"]\]|\[(\d+)\]", path[start.end() :]
    ):
        if isinstance(found, torch.nn.Module) and (name or index).isdigit():
            found = found._modules.get(name or index)
        elif name:
            found = getattr(found, name, None)
        else:
            part = key or int(index)
            try:
                found = found[part]
            except (KeyError, IndexError, TypeError):
                return None
    return found
