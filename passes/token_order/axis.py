"""What is known of a value once the video's tokens are permuted: the types that `rules` returns.

Run a graph twice, as it is and with its tokens permuted where they enter. A value is then

* alike in both runs (`None`: timestep and text embeddings, weights, anything without tokens), or
* permuted along one dimension (`Tokens`), or
* something else, and nothing is known of it: an `Obstacle`.

A rule (`rules`) says which of these an operator's output is, given its operands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import SymInt
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

from calibatt_compiler.passes.graph import example, module_name

Size: TypeAlias = int | SymInt


@dataclass(frozen=True, eq=False)
class Tokens:
    """One dimension of a value runs over the video's tokens, permuted; text may stand around them.

    Attributes:
        dim: the dimension, counted from the front.
        first: where on it the first token of the video stands.
    """

    dim: int
    first: Size = 0

    def agrees(self, other: TokenState) -> bool:
        """Whether another value is permuted in the same way."""
        return isinstance(other, Tokens) and self.dim == other.dim and same(self.first, other.first)


TokenState: TypeAlias = "Tokens | tuple[TokenState, ...] | None"
"""Of a tensor that is permuted, of several tensors, of one that is not permuted."""


@dataclass(frozen=True)
class NeedsPermutation:
    """A value that is not permuted meets one that is, token by token: it must be permuted too.

    Attributes:
        value: such as a rotary table.
        tokens: how it must be permuted.
    """

    value: Node
    tokens: Tokens


@dataclass(frozen=True)
class Obstacle:
    """A node behind which tokens can't stay permuted, and why."""

    node: Node
    reason: str

    def __str__(self) -> str:
        where = module_name(self.node)
        return f"{self.node.name}{f' in {where}' if where else ''} {self.reason}"


Outcome: TypeAlias = "TokenState | NeedsPermutation | Obstacle"


@dataclass(frozen=True)
class NodeCall:
    """A node, seen by a rule.

    Attributes:
        node: the node.
        video: tokens of the video.
        states: of the nodes before it.
    """

    node: Node
    video: int
    states: Mapping[Node, TokenState]

    def operand(self, position: int, name: str = "", default: Any = None) -> Any:
        """Return an argument by position or name."""
        if position < len(self.node.args):
            return self.node.args[position]
        return self.node.kwargs.get(name, default)

    def spread(self, name: str = "") -> tuple[Any, ...]:
        """Return numbers behind the first argument: `permute(x, (1, 0))` or `x.permute(1, 0)`."""
        given = self.node.args[1:] or (self.node.kwargs.get(name, ()),)
        return tuple(given[0]) if isinstance(given[0], (tuple, list)) else tuple(given)

    def state(self, operand: object) -> TokenState:
        """Return what is known of an operand."""
        return self.states.get(operand) if isinstance(operand, Node) else None

    def tensors(self) -> list[Node]:
        """Return all operands that are tensors, those in lists too."""
        found: list[Node] = []
        map_arg((self.node.args, self.node.kwargs), found.append)
        return [node for node in found if example(node) is not None]

    def refuse(self, reason: str) -> Obstacle:
        """Return an obstacle at this node."""
        return Obstacle(self.node, reason)


def shape(node: Node) -> tuple[Size, ...]:
    """Return the sizes of a tensor; some may be symbolic."""
    value = example(node)
    assert value is not None, f"{node} is no tensor"
    return tuple(value.shape)


def outputs(node: Node) -> tuple[Any, ...]:
    """Return the fake tensors of a node with several."""
    value = node.meta.get("example_value", node.meta.get("val"))
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def number(value: Any) -> Any:
    """Return what an argument stands for: itself, or the size that a node carries."""
    return value.meta.get("example_value") if isinstance(value, Node) else value


def same(one: Any, other: Any) -> bool:
    """Whether two sizes are known to be equal; asks for no guard."""
    return statically_known_true(one == other)


def at_most(one: Any, other: Any) -> bool:
    """Whether one size is known to be no greater than another; asks for no guard."""
    return statically_known_true(one <= other)


def product(sizes: tuple[Size, ...]) -> Size:
    """Multiply sizes."""
    result: Size = 1
    for size in sizes:
        result = result * size
    return result


def token_states(state: TokenState) -> Iterator[Tokens]:
    """Walk the permuted tensors among those of a node."""
    if isinstance(state, Tokens):
        yield state
    elif isinstance(state, tuple):
        for part in state:
            yield from token_states(part)


def holds(tensor: torch.Tensor, tokens: Tokens, video: int) -> bool:
    """Whether a tensor has the dimension that `tokens` speaks of, long enough for the video."""
    return tokens.dim < tensor.dim() and at_most(tokens.first + video, tensor.shape[tokens.dim])


Rule = Callable[[NodeCall], Outcome]


def of_first(rule: Callable[[NodeCall, Node, Tokens], Outcome]) -> Rule:
    """Make a rule of one that asks for tokens in the first operand and in no other."""

    def checked(call: NodeCall) -> Outcome:
        first, *others = call.tensors()
        state = call.state(first)
        if not isinstance(state, Tokens) or any(call.state(other) is not None for other in others):
            return call.refuse("has tokens in another operand than the first")
        return rule(call, first, state)

    return checked


def aligned(call: NodeCall, operands: Iterable[Node], rank: int) -> Outcome:
    """Return the state of operands that are broadcast with one another to a rank."""
    operands = list(operands)
    found: Tokens | None = None  # its dimension counted from behind
    for operand in operands:
        state = call.state(operand)
        if isinstance(state, tuple):
            return call.refuse("takes several tensors as one")
        if state is None:
            continue
        back = Tokens(state.dim - len(shape(operand)), state.first)
        if found is not None and not found.agrees(back):
            return call.refuse("aligns tokens with other tokens")
        found = back
    if found is None:
        return None
    for operand in operands:
        if call.state(operand) is None and (other := met(operand, found)) is not None:
            return other
    return Tokens(rank + found.dim, found.first)


def met(operand: Node, back: Tokens) -> NeedsPermutation | None:
    """Return what an operand that is not permuted must become; None if it is the same for all.

    Args:
        operand: aligned at its last dimension.
        back: the tokens that it meets; their dimension counted from behind.
    """
    sizes = shape(operand)
    if len(sizes) < -back.dim or same(sizes[back.dim], 1):
        return None
    return NeedsPermutation(operand, Tokens(len(sizes) + back.dim, back.first))
