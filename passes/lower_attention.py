"""Replaces bound attention nodes by `calibatt::attention`."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations
from operator import getitem
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true as known

from calibatt_compiler.passes.graph import OPERANDS, drop_unread, example, finish, subgraphs
from calibatt_compiler.passes.masks import KeyMask, key_mask, written_behind
from calibatt_compiler.passes.rewrite import Lowered, Permuted, Rewrite, SdpaCall

TOKEN_MAJOR = (0, 2, 1, 3)
"""Order of the dimensions (batch, heads, length, head_dim) in which our output lies in memory."""


def lower_attention(rewrite: Rewrite) -> Rewrite:
    """Rewrite each bound call; subgraphs are handed the timestep as a further operand.

    A graph in which nothing is bound is left as it was captured.
    """
    threaded: dict[Node, Node] = {}
    changed: dict[GraphModule, None] = {}
    masks = _Masks()
    for call, decision in zip(rewrite.calls, rewrite.decisions, strict=True):
        if isinstance(decision, Lowered):
            assert rewrite.timestep is not None
            timestep = rewrite.timestep
            changed[rewrite.gm] = None
            for higher_order in call.path:
                if higher_order not in threaded:
                    threaded[higher_order] = _thread(higher_order, timestep)
                    changed[cast("GraphModule", threaded[higher_order].graph.owning_module)] = None
                timestep = threaded[higher_order]
            _replace(call, timestep, masks, ordered=isinstance(rewrite.order, Permuted))
    masks.drop_unread()
    for gm in changed:
        finish(gm)
    if rewrite.timestep is not None and not drop_unread([rewrite.timestep]):
        return replace(rewrite, timestep=None)
    return rewrite


def _replace(call: SdpaCall, timestep: Node, masks: _Masks, *, ordered: bool) -> None:
    graph = call.gm.graph
    meta = {key: value for key, value in call.node.meta.items() if key != "example_value"}
    with graph.inserting_before(call.node):
        operands = [_cast(call, cast("Node", call.operands[name])) for name in OPERANDS[:3]]
        lowered = graph.call_function(
            torch.ops.calibatt.attention.default,
            (*operands, timestep, call.key, call.scale, ordered),
            masks.operands(call),
        )
        lowered.meta = dict(meta)
        lowered = _laid_out(lowered, call.node)
    lowered.meta = dict(call.node.meta)
    call.node.replace_all_uses_with(lowered)
    graph.erase_node(call.node)


class _Masks:
    """Has each mask read once, before the first call that has it."""

    def __init__(self) -> None:
        self._read: dict[tuple[Node, str], tuple[Node, ...]] = {}
        self._made: dict[Node, None] = {}

    def operands(self, call: SdpaCall) -> dict[str, Any]:
        """Return what `calibatt::attention` takes of a call's mask, by name; insert its reading."""
        mask, key = call.operands.get("attn_mask"), example(call.operands["key"])
        if mask is None or key is None:
            return {}
        found = key_mask(mask, key)
        assert isinstance(found, KeyMask), "others are not bound"
        self._made.update(dict.fromkeys(found.made))
        held = (found.source, "look" if found.form == "look" else "")
        if held not in self._read:
            read = self._insert(call.node, found)
            if written_behind(call.node, found.source):
                return self._named(read, found)
            self._read[held] = read
        return self._named(self._read[held], found)

    def drop_unread(self) -> None:
        """Erase what masks of pairs were made of, where nobody reads them any more."""
        drop_unread(list(self._made))

    def _insert(self, before: Node, mask: KeyMask) -> tuple[Node, ...]:
        graph = before.graph
        look = mask.form == "look"
        ops = torch.ops.calibatt
        op = ops.look_at_mask.default if look else ops.key_padding.default
        args = (mask.source,) if look else (mask.source, mask.form == "rows")
        read = graph.call_function(op, args)
        made = [read, *(graph.call_function(getitem, (read, i)) for i in range(3 if look else 2))]
        for node in made:
            node.meta = {key: v for key, v in before.meta.items() if key != "example_value"}
        return tuple(made[1:])

    def _named(self, read: tuple[Node, ...], mask: KeyMask) -> dict[str, Any]:
        given: dict[str, Any] = {"bias": read[0], "bounds": read[1]}
        if mask.form == "look":
            return given | {"verdict": read[2], "mask": mask.source}
        return given | {"rows": mask.form == "rows"}


def _cast(call: SdpaCall, operand: Node) -> Node:
    """Cast an operand as autocast does for the stock operator; ours it does not know."""
    value = example(operand)
    if value is None or value.dtype == call.dtype:
        return operand
    made = operand.graph.call_method("to", (operand, call.dtype))
    made.meta["example_value"] = value.to(call.dtype)
    return made


def _laid_out(lowered: Node, stock: Node) -> Node:
    """Lay the output out as the stock operator does: a `view` behind it may rely on that.

    Inductor makes no copy of it but where it is read.
    """
    value = example(stock)
    order = None if value is None else _order_in_memory(value)
    if order is None or order == TOKEN_MAJOR:
        return lowered
    graph = lowered.graph
    dense = graph.call_method("contiguous", (graph.call_method("permute", (lowered, order)),))
    return graph.call_method("permute", (dense, tuple(order.index(dim) for dim in range(4))))


def _order_in_memory(value: torch.Tensor) -> tuple[int, ...] | None:
    """Return the dimensions of a dense tensor from the outermost on; None if it is not dense."""
    for order in (TOKEN_MAJOR, *permutations(range(4))):
        sizes = tuple(value.shape[dim] for dim in order)
        if all(
            known(size == 1) or known(value.stride(dim) == math.prod(sizes[place + 1 :]))
            for place, (dim, size) in enumerate(zip(order, sizes, strict=True))
        ):
            return order
    return None


def _thread(higher_order: Node, value: Node) -> Node:
    """Pass `value` into the subgraph of a higher-order call; return its placeholder there."""
    (body,) = subgraphs(higher_order)
    higher_order.args = (*higher_order.args, value)
    last = list(body.graph.find_nodes(op="placeholder"))[-1]
    with body.graph.inserting_after(last):
        placeholder = body.graph.placeholder("calibatt_timestep")
    placeholder.meta["example_value"] = value.meta["example_value"]
    return placeholder
