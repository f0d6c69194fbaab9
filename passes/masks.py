"""What the mask of an attention call is: keys cut for all queries alike, or something else.

Text is padded to one length, and a mask cuts the padding. Where shapes or the way in which the mask
is made show that it says one thing of each key, it is served by that; a mask of pairs of tokens is
looked at when it runs; the others are refused with what they look like.

| mask of (B, H, Sq, Sk) | is |
|---|---|
| bool or float (B, 1, 1, Sk), or expanded from it | `keys` |
| bool (B, 1, S, S), made as `m[:, None, None] & m[:, None, :, None]` | `rows`: of queries, too |
| any other bool | `look` |
| any other float | refused |
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true as known

from calibatt_compiler.passes.graph import example
from calibatt_compiler.passes.writes import memory, written

Form = Literal["keys", "rows", "look"]


@dataclass(frozen=True)
class KeyMask:
    """A mask that can be served.

    Attributes:
        source: what is read of it: the mask, or of the form `rows` m (B, S).
        form: what it says, see above.
        made: nodes, in order, of which nobody needs to read the mask of pairs but its calls.
    """

    source: Node
    form: Form
    made: tuple[Node, ...] = ()


def key_mask(mask: object, key: torch.Tensor) -> KeyMask | str:
    """Return what a mask is, or why it can't be served.

    Args:
        mask: operand of an attention call.
        key: (B, H, Sk, D), of this call.
    """
    value = example(mask)
    if value is None or not isinstance(mask, Node):
        return "masked: by what can't be seen"
    if value.requires_grad:
        return "masked: by values that are learned"
    floating = value.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if not floating and value.dtype != torch.bool:
        return f"masked: by {value.dtype}"
    one = known(value.shape[-1] == 1) and not known(key.shape[2] == 1)
    if not 1 <= value.dim() <= 4 or one:
        return "masked: by one number for all keys of a query"
    if all(known(value.shape[dim] == 1) or value.stride(dim) == 0 for dim in _between(value)):
        return KeyMask(mask, "keys")
    if floating:
        by_head = value.dim() > 2 and not known(value.shape[-3] == 1)
        return "masked: an additive bias " + ("by head" if by_head else "over pairs of tokens")
    if _name(mask) == "tril":
        return "masked: causal"
    chain: list[Node] = []
    vector = _outer(mask, chain)
    if vector is None or _written(vector, chain):
        return KeyMask(mask, "look")
    order = {node: place for place, node in enumerate(mask.graph.nodes)}
    return KeyMask(vector, "rows", tuple(sorted(set(chain), key=order.__getitem__)))


def _between(value: torch.Tensor) -> range:
    """Dimensions of a mask that are neither the batch nor the keys."""
    return range(max(0, value.dim() - 3), value.dim() - 1)


def _outer(node: Node, chain: list[Node]) -> Node | None:
    """Return m (B, S) where a node is the bool mask m[b, i] & m[b, j] of pairs (i, j); else None.

    Args:
        node: the mask.
        chain: receives the nodes that m goes through.
    """
    while _name(node) in _SAME:
        chain.append(node)
        node = node.all_input_nodes[0]
    chain.append(node)
    if _name(node) not in _BOTH or len(node.args) != 2 or node.kwargs:
        return None
    found = [_vector(part, chain) if _is_bool(part) else None for part in node.args]
    if found[0] is None or found[1] is None:
        return None
    alike = found[0][0] is found[1][0] and {found[0][1], found[1][1]} == {2, 3}
    return found[0][0] if alike else None


_SAME = ("bool", "contiguous", "clone")
_BOTH = ("and_", "mul", "logical_and", "bitwise_and", "__and__")


def _name(node: Node) -> str:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return str(name)


def _is_bool(operand: object) -> bool:
    value = example(operand)
    return value is not None and value.dtype == torch.bool


def _vector(node: Any, chain: list[Node]) -> tuple[Node, int] | None:
    """Return m (B, S) and the dimension of its tokens where all else is broadcast; else None."""
    value = example(node)
    if value is None:
        return None
    if value.dim() == 2:
        return node, 1
    rule = _RULES.get(_name(node))
    source = node.all_input_nodes[0] if node.all_input_nodes else None
    found = None if rule is None or source is None else _vector(source, chain)
    if rule is None or found is None:
        return None
    chain.append(node)
    axis = rule(node, found[1])
    return None if axis is None else (found[0], axis)


def _sizes(node: Node) -> tuple[Any, ...]:
    first = node.args[1] if len(node.args) > 1 else ()
    return tuple(first) if isinstance(first, (tuple, list)) else tuple(node.args[1:])


def _viewed(node: Node, axis: int) -> int | None:
    """`m.view(B, 1, 1, S)`: the one dimension behind the batch that is not 1."""
    before, after = example(node.args[0]), example(node)
    assert before is not None
    assert after is not None
    wide = [dim for dim in range(1, after.dim()) if not known(after.shape[dim] == 1)]
    alike = known(after.shape[0] == before.shape[0]) and len(wide) == 1
    return wide[0] if alike and known(after.shape[wide[0]] == before.shape[axis]) else None


def _unsqueezed(node: Node, axis: int) -> int | None:
    value = example(node)
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if not isinstance(dim, int) or value is None:
        return None
    dim %= value.dim()
    return None if dim == 0 else axis + (dim <= axis)


def _indexed(node: Node, axis: int) -> int | None:
    """`m[:, None, None, :]`: new dimensions behind the batch, and nothing cut."""
    index = node.args[1]
    items = index if isinstance(index, tuple) else (index,)
    if not items or any(item is not None and item != slice(None) for item in items):
        return None
    places = [place for place, item in enumerate(items) if item is not None]
    places += range(len(items), len(items) + axis + 1)  # what is not named stays behind
    return places[axis] if places[0] == 0 else None


def _repeated(node: Node, axis: int) -> int | None:
    """`m.repeat(1, 1, S, 1)`: batch and tokens as they are."""
    times, before = _sizes(node), example(node.args[0])
    alike = before is not None and len(times) == before.dim()
    return axis if alike and times[0] == 1 and times[axis] == 1 else None


def _expanded(node: Node, axis: int) -> int | None:
    before, after = example(node.args[0]), example(node)
    if before is None or after is None or before.dim() != after.dim():
        return None
    return axis if all(known(before.shape[d] == after.shape[d]) for d in (0, axis)) else None


def _transposed(node: Node, axis: int) -> int | None:
    value, dims = example(node), node.args[1:]
    if value is None or len(dims) != 2 or not all(isinstance(dim, int) for dim in dims):
        return None
    one, other = (operator.index(dim) % value.dim() for dim in dims)  # type: ignore[arg-type]
    if 0 in (one, other):
        return None
    return {one: other, other: one}.get(axis, axis)


_RULES: dict[str, Callable[[Node, int], int | None]] = {
    "view": _viewed,
    "reshape": _viewed,
    "unsqueeze": _unsqueezed,
    "getitem": _indexed,
    "repeat": _repeated,
    "expand": _expanded,
    "transpose": _transposed,
    "bool": lambda node, axis: axis,
    "contiguous": lambda node, axis: axis,
    "clone": lambda node, axis: axis,
}
"""By name of an operator: where the tokens of its operand are in its result, None if unknown."""


_READ_ONLY = {
    *_RULES, *_SAME, *_BOTH, "to", "float", "long", "type_as", "squeeze", "flatten", "permute",
    "expand_as", "reshape_as", "view_as", "split", "chunk", "narrow", "select", "detach",
}  # fmt: skip
"""Names of operators that return views of their operand, or the operand, and write into nothing."""


def _written(vector: Node, chain: list[Node]) -> bool:
    """Whether anything that a mask is made of is written into once the mask is being made."""
    memories = {memory(node) for node in (vector, *chain)} - {0}
    begun = False
    for node in vector.graph.nodes:
        begun = begun or node in chain
        if begun and _writes(node, memories):
            return True
    return False


def written_behind(place: Node, source: Node) -> bool:
    """Whether a value is written into behind a place of its graph."""
    node = place.next
    while node.op != "root":
        if _writes(node, {memory(source)}):
            return True
        node = node.next
    return False


def _writes(node: Node, memories: set[int]) -> bool:
    functional = (node.target,) if _name(node) in _READ_ONLY else ()
    return any(memory(target) in memories for target in written(node, functional))
