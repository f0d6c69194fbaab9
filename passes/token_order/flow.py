"""Follows a permutation of the video's tokens through a graph, from where it enters to its end.

The argument is one of two runs (`axis`): if each operator does what its rule says, all values
of the permuted run are those of the other, permuted as their `Tokens` tell. An operator without a
rule, or that its rule refuses, is an *exit*: it is given its operands in the model's own order, and
so returns what it always did. So the result is right for any choice of where the permutation
enters; where it must enter beside the video itself, the rules say (`NeedsPermutation`).

Operators that write into a tensor are covered, as a permutation maps the places of a tensor one to
one, those of its views too. But what is permuted at an entry or for an exit is a copy: into the
memory of such a value nothing may be written afterwards. (Views are known by the memory of the fake
tensors that Dynamo leaves with its nodes.)
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from calibatt_compiler.passes.graph import example
from calibatt_compiler.passes.token_order.axis import (
    NeedsPermutation,
    NodeCall,
    Obstacle,
    Tokens,
    TokenState,
    holds,
    outputs,
    product,
    same,
    shape,
)
from calibatt_compiler.passes.token_order.rules import RULES, transfer
from calibatt_compiler.passes.writes import memory, written


@dataclass(frozen=True)
class Flow:
    """Where a permutation goes.

    Attributes:
        entries: values that are permuted, and how; all that follows from them is in `states`.
        states: of every node.
        exits: nodes that are given tokens in the model's order, and why.
        blocked_by: of nodes that depend on an exit, the exit.
    """

    entries: Mapping[Node, Tokens]
    states: Mapping[Node, TokenState]
    exits: Mapping[Node, Obstacle]
    blocked_by: Mapping[Node, Obstacle]

    def undone(self) -> dict[Node, Tokens]:
        """Return the values that must be brought back into the model's order for exits."""
        found: dict[Node, Tokens] = {}
        for node in self.exits:
            for source in node.all_input_nodes:
                state = self.states[source]
                if isinstance(state, Tokens) and source not in self.entries:
                    found[source] = state
        return found


def propagate(graph: Graph, entry: Node, tokens: Tokens, video: int) -> Flow | Obstacle:
    """Permute one value and whatever its tokens meet; return where all that goes.

    Args:
        graph: with fake tensors in its nodes' meta.
        entry: the value that the video's tokens are first seen in.
        tokens: which of its dimensions they are.
        video: their number.
    """
    entries = {entry: tokens}
    while isinstance(found := follow(graph, entries, video), NeedsPermutation):
        value, tokens = origin(found, video)
        if value in entries:
            return Obstacle(value, "would have to be permuted in two ways")
        entries[value] = tokens
    return found if isinstance(found, Obstacle) else _written_nowhere(graph, found)


def follow(
    graph: Graph, entries: Mapping[Node, Tokens], video: int
) -> Flow | NeedsPermutation | Obstacle:
    """Apply the rules from node to node, up to the first value that must be permuted as well."""
    used: dict[Node, Tokens] = {}
    states: dict[Node, TokenState] = {}
    exits: dict[Node, Obstacle] = {}
    blocked_by: dict[Node, Obstacle] = {}
    for node in graph.nodes:
        outcome = transfer(NodeCall(node, video, states))
        if isinstance(outcome, NeedsPermutation):
            return blocked_by.get(outcome.value, outcome)
        if not isinstance(outcome, Obstacle) and not _plausible(node, outcome, video):
            outcome = Obstacle(node, "returns something else than its rule says")
        targets = written(node, RULES)
        if isinstance(outcome, Obstacle):
            several = any(isinstance(states[source], tuple) for source in node.all_input_nodes)
            if several or targets:
                return outcome
            exits[node], outcome = outcome, None
        elif node.target is not operator.setitem and not all(
            _alike(outcome, states[target]) for target in targets
        ):
            return Obstacle(node, "writes tokens to the places of others")
        if node in entries and outcome is None:
            outcome = used[node] = entries[node]
        elif node in entries and not entries[node].agrees(outcome):
            return Obstacle(node, "would have to be permuted in two ways")
        states[node] = outcome
        bars = (blocked_by[source] for source in node.all_input_nodes if source in blocked_by)
        if (bar := exits.get(node) or next(bars, None)) is not None:
            blocked_by[node] = bar
    return Flow(used, states, exits, blocked_by)


def _plausible(node: Node, state: TokenState, video: int) -> bool:
    """Whether outputs have the dimensions that a rule named."""
    tensors = outputs(node)
    parts = state if isinstance(state, tuple) else (state,)
    return len(parts) <= len(tensors) and all(
        part is None
        or (isinstance(part, Tokens) and isinstance(x, torch.Tensor) and holds(x, part, video))
        for part, x in zip(parts, tensors, strict=False)
    )


def _alike(one: TokenState, other: TokenState) -> bool:
    return one is other is None or (isinstance(one, Tokens) and one.agrees(other))


def origin(met: NeedsPermutation, video: int) -> tuple[Node, Tokens]:
    """Return the value farthest back whose permutation arrives as the one that is asked for.

    All layers then read from one permuted table, instead of each permuting its own slice of it.
    """
    value, tokens = met.value, met.tokens
    while (found := next(_steps_back(value, tokens, video), None)) is not None:
        value, tokens = found
    return value, tokens


def _steps_back(value: Node, tokens: Tokens, video: int) -> Iterator[tuple[Node, Tokens]]:
    """Walk operands which alone, permuted, make `value` permuted by `tokens`."""
    length = shape(value)[tokens.dim]
    for source in value.all_input_nodes:
        through = () if example(source) is not None else (source,)
        for base in source.all_input_nodes if through else (source,):
            if example(base) is None:
                continue
            for dim, size in enumerate(shape(base)):
                if not same(size, length):
                    continue
                before = Tokens(dim, tokens.first)
                states: dict[Node, TokenState] = {base: before}
                for node in (*through, value):
                    outcome = transfer(NodeCall(node, video, states))
                    if isinstance(outcome, (NeedsPermutation, Obstacle)):
                        break
                    states[node] = outcome
                if tokens.agrees(states.get(value)):
                    yield base, before


def _written_nowhere(graph: Graph, flow: Flow) -> Flow | Obstacle:
    """Return the flow, or the node that writes into a value of which permuting makes a copy.

    Copies are contiguous. If a value is not, `contiguous` or `reshape` may behind its copy return a
    view where they copied before, or the reverse; so nothing at all may be written then. Who calls
    the model may write into its outputs as well: those that are copies may share no memory.
    """
    copies = {*flow.entries, *flow.undone()}
    copied: set[int] = set()
    relaid = False
    for node in graph.nodes:
        targets = written(node, RULES)
        if targets and (relaid or any(memory(target) in copied for target in targets)):
            return Obstacle(node, "may write into a value that was permuted before")
        if node in copies:
            copied.add(memory(node))
            relaid = relaid or not _contiguous(node)
    output = graph.output_node()
    shared = Counter(memory(each) for each in (*output.all_input_nodes, *_inputs(graph)))
    for value in output.all_input_nodes:
        copy = isinstance(flow.states[value], Tokens) and value not in flow.entries
        if copy and shared[memory(value)] > 1:
            return Obstacle(value, "shares its memory with what the caller has")
    return flow


def _inputs(graph: Graph) -> list[Node]:
    return [node for node in graph.find_nodes(op="placeholder") if example(node) is not None]


def _contiguous(node: Node) -> bool:
    """Whether a tensor is known to be contiguous; asks for no guard."""
    value = example(node)
    assert value is not None
    strides = [product(shape(node)[dim + 1 :]) for dim in range(value.dim())]
    return all(
        same(size, 1) or same(stride, expected)
        for size, stride, expected in zip(value.shape, value.stride(), strides, strict=True)
    )
