"""Which tensors a node writes into, and which values share memory."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from calibatt_compiler.passes.graph import example, subgraphs

INPLACE = {
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.imatmul,
    operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow, operator.iand,
    operator.ior, operator.ixor, operator.ilshift, operator.irshift,
}  # fmt: skip
"""Functions that write into their first operand."""

KEYWORDS = {operator.and_, operator.or_, operator.not_, operator.is_}
"""Functions whose names end in a line only because they would be keywords of Python."""

INPLACE_METHODS = {f"__{function.__name__}__" for function in INPLACE}

STATEFUL = {"batch_norm": None, "instance_norm": None, "embedding": "max_norm"}
"""Functions that write into operands though no name says so: always, or given an argument."""


def written(node: Node, functional: Iterable[Any] = ()) -> list[Node]:
    """Return what a node writes into, or may write into as far as is known.

    Args:
        node: of any kind.
        functional: targets that are known to write nowhere unless their name or arguments say so.
    """
    if node.op in ("placeholder", "get_attr", "output"):
        return []
    operands = node.all_input_nodes
    found: list[Node] = []
    map_arg(node.kwargs.get("out"), found.append)
    if found:
        return found
    if bodies := subgraphs(node):
        writes = any(written(inner) for body in bodies for inner in body.graph.nodes)
        return operands if writes else []
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    marked = name.endswith("_") and not name.endswith("__") and node.target not in KEYWORDS
    if marked and name.startswith("_foreach"):
        return operands
    if marked or node.target in INPLACE or name in INPLACE_METHODS or _argument(node, "inplace"):
        return operands[:1]
    if name in STATEFUL and (STATEFUL[name] is None or _argument(node, STATEFUL[name] or "")):
        return operands
    schemas = _schemas(node.target)
    if node.target in functional or (schemas and not any(s.is_mutable for s in schemas)):
        return []
    # Of an operator that nothing is known of, a result in the operand's memory tells, or none.
    memories = {memory(operand) for operand in operands if example(operand) is not None}
    value = node.meta.get("example_value", node.meta.get("val"))
    results = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    alike = any(isinstance(x, torch.Tensor) and _storage(x) in memories for x in results)
    return operands if alike or schemas or results == (None,) else []


def memory(node: Node) -> int:
    """Return what tells apart the memory of tensors that are no views of one another."""
    # At inference, dropout returns its operand, which its fake tensor does not show.
    while "dropout" in str(getattr(node.target, "__name__", node.target)) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    value = example(node)
    return 0 if value is None else _storage(value)


def _storage(value: torch.Tensor) -> int:
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return int(value.untyped_storage()._cdata)


def _argument(node: Node, name: str) -> Any:
    """Return an argument that is given by name, or by place where the place can be known."""
    if name in node.kwargs:
        return node.kwargs[name]
    place = _parameters(node.target).get(name)
    return node.args[place] if place is not None and place < len(node.args) else None


@functools.cache
def _parameters(target: Any) -> dict[str, int]:
    if isinstance(target, str):
        return {}
    try:
        return {name: place for place, name in enumerate(inspect.signature(target).parameters)}
    except (TypeError, ValueError):  # most built-in functions tell nothing
        return {}


def _schemas(target: Any) -> list[Any]:
    """Return the schemas of an operator: those of all overloads where none is chosen."""
    if isinstance(target, torch._ops.OpOverloadPacket):
        names = target.overloads()  # type: ignore[no-untyped-call]
        return [getattr(target, name)._schema for name in names]
    schema = getattr(target, "_schema", None)
    return [] if schema is None else [schema]
