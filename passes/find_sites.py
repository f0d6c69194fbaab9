"""Finds every attention call of a graph, subgraphs included, and names it by its module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true

from calibatt_compiler.capture import SiteInfo
from calibatt_compiler.passes.graph import (
    BY_FLEX,
    FLEX,
    OPERANDS,
    SDPA,
    example,
    module_name,
    sdpa_operands,
    subgraphs,
    transformed,
)
from calibatt_compiler.passes.masks import key_mask
from calibatt_compiler.passes.rewrite import Rewrite, SdpaCall, site_key
from calibatt_compiler.passes.writes import memory, written

THREADABLE = ("tag_activation_checkpoint", "wrap")
"""Higher-order operators whose operands map one to one to the inputs of their subgraph."""


TRANSFORMED = "inside vmap, grad or another transform of torch.func"


def find_sites(rewrite: Rewrite) -> Rewrite:
    """List the attention calls in the order of execution."""
    seen: Counter[str] = Counter()
    # Behind a graph break keys may come from elsewhere, of self-attention too.
    latents = None if rewrite.inputs.resumed else rewrite.inputs.placeholders.get("hidden_states")
    video = _dependents(latents)
    calls = []
    bases = []
    for node, gm, path in _walk(rewrite.gm, ()):
        name = rewrite.inputs.site_name(node)
        bases.append(module_name(node) if name is None else name)
        calls.append(_describe(node, gm, path, bases[-1], seen, video))
    place = rewrite.inputs.place.path
    return replace(
        rewrite,
        calls=tuple(
            replace(call, key=site_key(call.info.name, place), repeats=seen[base])
            for call, base in zip(calls, bases, strict=True)
        ),
    )


def _walk(
    gm: GraphModule, path: tuple[Node, ...]
) -> Iterator[tuple[Node, GraphModule, tuple[Node, ...]]]:
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in SDPA or node.target in FLEX:
            yield node, gm, path
            continue
        for body in subgraphs(node):
            yield from _walk(body, (*path, node))


def _dependents(source: Node | None) -> frozenset[Node]:
    """Return all nodes of a graph that depend on `source`, through memory too; none without one."""
    if source is None:
        return frozenset()
    reached: set[Node] = {source}
    filled: set[int] = set()
    for node in source.graph.nodes:
        if any(each in reached or memory(each) in filled for each in node.all_input_nodes):
            reached.add(node)
            filled.update({memory(target) for target in written(node)} - {0})
    return frozenset(reached) | {node for node in source.graph.nodes if memory(node) in filled}


def _describe(
    node: Node,
    gm: GraphModule,
    path: tuple[Node, ...],
    base: str,
    seen: Counter[str],
    video: frozenset[Node],
) -> SdpaCall:
    name = f"{base}:{seen[base]}" if seen[base] else base
    seen[base] += 1
    if node.target in FLEX:
        return SdpaCall(node, gm, path, SiteInfo(name, 0, 0, 0, 0, skip=BY_FLEX))
    operands = sdpa_operands(node)
    query, key, value = (example(operands[part]) for part in OPERANDS[:3])
    if transformed(node):
        return SdpaCall(node, gm, path, SiteInfo(name, 0, 0, 0, 0, skip=TRANSFORMED))
    if query is None or key is None or value is None or query.dim() != 4:
        info = SiteInfo(name, 0, 0, 0, 0, skip="operands are not (batch, heads, length, head_dim)")
        return SdpaCall(node, gm, path, info)
    reason = _refusal(operands, query, key, value, path)
    crossing = bool(video) and operands["query"] in video and operands["key"] not in video
    if reason is None and not base:
        reason = "unnamed: the graph carries no module path"
    if reason is None and (crossing or _differ(query.shape[2], key.shape[2])):
        # Rectangular self-attention looks the same from here; a plan that names the site wins.
        reason = "cross-attention"
    info = SiteInfo(
        name=name or f"unnamed:{seen[base] - 1}",
        heads=int(query.shape[1]),
        query_length=query.shape[2],
        key_length=key.shape[2],
        head_dim=int(query.shape[3]),
        skip=reason,
        padded=operands.get("attn_mask") is not None,
    )
    return SdpaCall(node, gm, path, info)


def _refusal(
    operands: dict[str, Any],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    path: tuple[Node, ...],
) -> str | None:
    mask = operands.get("attn_mask")
    if mask is not None and isinstance(found := key_mask(mask, key), str):
        return found
    if operands.get("is_causal"):
        return "causal"
    if operands.get("dropout_p"):
        return "dropout"
    if isinstance(operands.get("scale"), Node):
        return "scale is computed at run time"
    if any(_differ(query.shape[dim], key.shape[dim]) for dim in (0, 1)):
        return "batch or heads of queries and keys differ"
    if query.shape[3] != value.shape[3] or any(map(_differ, key.shape, value.shape)):
        return "keys and values differ in shape"
    for call in path:
        if getattr(call.target, "_name", str(call.target)) not in THREADABLE:
            return f"inside {getattr(call.target, '_name', call.target)}"
        if sum(body is other for body in subgraphs(call) for other in _bodies(call)) > 1:
            return "in a subgraph that several layers share"
    return None


def _differ(one: int | torch.SymInt, other: int | torch.SymInt) -> bool:
    """Whether two sizes may differ; of what no guard can be made, as far as is known."""
    if any(map(free_unbacked_symbols, (one, other))):
        return not statically_known_true(one == other)
    return bool(one != other)


def _bodies(call: Node) -> list[GraphModule]:
    return [body for node in call.graph.nodes for body in subgraphs(node)]
