"""Replaces bound attention nodes by `calibatt::attention`."""

from __future__ import annotations

from typing import cast

import torch
from torch.fx import GraphModule, Node

from calibatt_compiler.passes.graph import finish, subgraphs
from calibatt_compiler.passes.rewrite import Lowered, Permuted, Rewrite, SdpaCall


def lower_attention(rewrite: Rewrite) -> Rewrite:
    """Rewrite each bound call; subgraphs are handed the timestep as a further operand."""
    threaded: dict[Node, Node] = {}
    changed: set[GraphModule] = set()
    for call, decision in zip(rewrite.calls, rewrite.decisions, strict=True):
        if isinstance(decision, Lowered):
            assert rewrite.timestep is not None
            timestep = rewrite.timestep
            for higher_order in call.path:
                if higher_order not in threaded:
                    threaded[higher_order] = _thread(higher_order, timestep)
                timestep = threaded[higher_order]
            _replace(call, timestep, ordered=isinstance(rewrite.order, Permuted))
            changed.add(call.gm)
    for gm in changed - {rewrite.gm}:
        finish(gm)
    finish(rewrite.gm)
    return rewrite


def _replace(call: SdpaCall, timestep: Node, *, ordered: bool) -> None:
    operands = [cast("Node", call.operands[name]) for name in ("query", "key", "value")]
    with call.gm.graph.inserting_before(call.node):
        lowered = call.gm.graph.call_function(
            torch.ops.calibatt.attention.default,
            (*operands, timestep, call.info.name, call.scale, ordered),
        )
    lowered.meta = dict(call.node.meta)
    call.node.replace_all_uses_with(lowered)
    call.gm.graph.erase_node(call.node)


def _thread(higher_order: Node, value: Node) -> Node:
    """Pass `value` into the subgraph of a higher-order call; return its placeholder there."""
    (body,) = subgraphs(higher_order)
    higher_order.args = (*higher_order.args, value)
    last = list(body.graph.find_nodes(op="placeholder"))[-1]
    with body.graph.inserting_after(last):
        placeholder = body.graph.placeholder("calibatt_timestep")
    placeholder.meta["example_value"] = value.meta["example_value"]
    return placeholder
