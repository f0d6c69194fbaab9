"""Permutes tokens into the plan's order once a forward pass, instead of around each site.

Where the video's tokens are first seen, (B, S, C), one `index_select` brings them into the order
that the plan's blocks are cut from; rotary tables (1, S, 1, D) and the like are permuted where they
meet tokens, and the output is brought back before it is folded into a video. What lies between is
shown to work on tokens alike (`flow`). If it can't be, sites permute around themselves, and
the reason names the node that stood in the way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch.fx import Node

from calibatt_compiler.passes.graph import example, finish, transformed
from calibatt_compiler.passes.rewrite import Layout, Lowered, Permuted, Rewrite, SdpaCall, Skip
from calibatt_compiler.passes.token_order.axis import Obstacle, Size, Tokens, same, shape
from calibatt_compiler.passes.token_order.flow import Flow, propagate


def permute_tokens(rewrite: Rewrite) -> Rewrite:
    """Permute once where that is shown to be the same; say what became of the plan's order."""
    layout = rewrite.binder.layout
    sites = [
        call
        for call, decision in zip(rewrite.calls, rewrite.decisions, strict=True)
        if isinstance(decision, Lowered)
    ]
    if layout is None or not sites:
        return rewrite
    flow = _find(rewrite, layout, sites)
    if not isinstance(flow, Flow):
        return replace(rewrite, order=Skip(str(flow)))
    undone = flow.undone()
    _insert(rewrite, layout, flow, undone)
    return replace(rewrite, order=Permuted(len(flow.entries), len(undone)))


def _find(rewrite: Rewrite, layout: Layout, sites: list[SdpaCall]) -> Flow | Obstacle | str:
    """Return a flow that has all sites in the plan's order, or why there is none."""
    if hidden := next((site for site in sites if site.path), None):
        return Obstacle(hidden.path[0], "hides sites in a subgraph")
    source = rewrite.inputs.placeholders.get("hidden_states")
    if source is None:
        return "the video is not an input of this graph"
    reason: Obstacle | str = "no value has the video's tokens on one dimension"
    for count, (entry, dim) in enumerate(_token_axis_sources(source, layout.video)):
        flow = propagate(rewrite.gm.graph, entry, Tokens(dim), layout.video)
        served = _serving(flow, layout, sites) if isinstance(flow, Flow) else flow
        if isinstance(served, Flow):
            return served
        reason = reason if count else served
    return reason


def _token_axis_sources(source: Node, video: int) -> Iterator[tuple[Node, int]]:
    """Walk the values in which the tokens become one dimension: flatten (B, C, F, H, W)."""
    has_tokens: dict[Node, bool] = {}
    for node in source.graph.nodes:
        before = [has_tokens[each] for each in node.all_input_nodes if each in has_tokens]
        if node is not source and not before:
            continue
        sizes = () if example(node) is None or transformed(node) else shape(node)
        dims = [dim for dim, size in enumerate(sizes) if same(size, video)]
        has_tokens[node] = bool(dims) or any(before)
        if not any(before):
            yield from ((node, dim) for dim in dims)


def _serving(flow: Flow, layout: Layout, sites: list[SdpaCall]) -> Flow | Obstacle | str:
    """Return the flow if it serves all sites, and moves less than they would by themselves."""
    for site in sites:
        for name in ("query", "key", "value"):
            operand = site.operands[name]
            assert isinstance(operand, Node)
            first = shape(operand)[2] - layout.video if layout.text_first else 0
            if not Tokens(2, first).agrees(flow.states[operand]):
                missing = Obstacle(operand, f"is a {name} without the video's tokens in its place")
                return flow.blocked_by.get(operand, missing)
    moved = {**flow.entries, **flow.undone()}
    for node, tokens in moved.items():
        if _length(node, tokens, layout.video) is None:
            return Obstacle(node, "joins the video with text of any length")
    once = sum(_numbers(*shape(node)) for node in moved)
    around = sum(_around(site, layout.video) for site in sites)
    if once > around:
        return f"it would move {once} numbers a pass, sites by themselves {around}"
    return flow


def _around(site: SdpaCall, video: int) -> int:
    """Return how many numbers a site moves by itself: queries, keys, values and its output."""
    query = site.operands["query"]
    assert isinstance(query, Node)
    batch, heads, _, head_dim = shape(query)
    return 4 * _numbers(batch, heads, video, head_dim)


def _numbers(*sizes: Size) -> int:
    """Multiply sizes, those that may change with their values in the captured call."""
    return math.prod(size if isinstance(size, int) else size.node.hint or 1 for size in sizes)


def _length(node: Node, tokens: Tokens, video: int) -> int | None:
    """Return the length of the token axis, if it and the video's place on it are fixed."""
    length = shape(node)[tokens.dim]
    if same(length, video):
        return video
    return length if isinstance(length, int) and isinstance(tokens.first, int) else None


class _Permutations:
    """Inserts permutations into a graph; those of sequences of one form share their index."""

    def __init__(self, rewrite: Rewrite, layout: Layout) -> None:
        self._graph = rewrite.gm.graph
        self._layout = layout
        self._video = rewrite.inputs.placeholders["hidden_states"]
        self._last = list(self._graph.find_nodes(op="placeholder"))[-1]
        self._orders: dict[tuple[int, int, bool], Node] = {}
        self.made: list[Node] = []

    def permute(self, node: Node, tokens: Tokens, *, inverse: bool) -> Node:
        """Insert a permutation of a value behind it."""
        order = self._order(node, tokens, inverse)
        # Behind all inputs, if the value is one of them.
        with self._graph.inserting_after(self._last if node.op == "placeholder" else node):
            moved = self._graph.call_function(torch.index_select, (node, tokens.dim, order))
        value, index = node.meta["example_value"], order.meta["example_value"]
        moved.meta["example_value"] = torch.index_select(value, tokens.dim, index)
        self.made.append(moved)
        return moved

    def _order(self, node: Node, tokens: Tokens, inverse: bool) -> Node:
        length = _length(node, tokens, self._layout.video)
        assert length is not None
        first = 0 if length == self._layout.video else int(tokens.first)
        key = (length, first, inverse)
        if key not in self._orders:
            name, grid = str(self._layout.order), list(self._layout.grid)
            operator = torch.ops.calibatt.token_order.default
            with self._graph.inserting_after(self._last):
                made = self._graph.call_function(operator, (self._video, name, grid, *key))
            made.meta["example_value"] = operator(example(self._video), name, grid, *key)
            self._orders[key] = self._last = made
            self.made.append(made)
        return self._orders[key]


def _insert(rewrite: Rewrite, layout: Layout, flow: Flow, undone: Mapping[Node, Tokens]) -> None:
    """Let exits read what they always did, and all others permuted tokens."""
    permutations = _Permutations(rewrite, layout)
    readers = {node: list(node.users) for node in (*flow.entries, *undone)}
    for node, tokens in undone.items():
        back = permutations.permute(node, tokens, inverse=True)
        for reader in readers[node]:
            if reader in flow.exits:
                reader.replace_input_with(node, back)
    for node, tokens in flow.entries.items():
        moved = permutations.permute(node, tokens, inverse=False)
        for reader in readers[node]:
            if reader not in flow.exits:
                reader.replace_input_with(node, moved)
    finish(rewrite.gm, permutations.made)
