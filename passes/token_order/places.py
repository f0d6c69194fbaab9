"""Rules of operators that move tokens about, or cut and join sequences; see `rules`."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.fx import Node

from calibatt_compiler.passes.graph import example
from calibatt_compiler.passes.token_order.axis import (
    NodeCall,
    Obstacle,
    Outcome,
    Size,
    Tokens,
    TokenState,
    aligned,
    at_most,
    met,
    number,
    of_first,
    outputs,
    product,
    same,
    shape,
)


@of_first
def reshape(call: NodeCall, x: Node, tokens: Tokens) -> Outcome:
    """The same elements one after another: the token axis must be an axis of the output, too."""
    before, after = shape(x), tuple(outputs(call.node)[0].shape)
    length, outer = before[tokens.dim], product(before[: tokens.dim])
    for dim, size in enumerate(after):
        if same(size, length) and same(product(after[:dim]), outer):
            return Tokens(dim, tokens.first)
    return call.refuse("splits or merges the token axis")


@of_first
def permute(call: NodeCall, x: Node, tokens: Tokens) -> Outcome:
    """Dimensions in another order, all of them given."""
    rank = len(shape(x))
    return Tokens([dim % rank for dim in call.spread("dims")].index(tokens.dim), tokens.first)


@of_first
def transpose(call: NodeCall, x: Node, tokens: Tokens) -> Outcome:
    """Two dimensions exchanged."""
    rank = len(shape(x))
    one, other = call.operand(1, "dim0") % rank, call.operand(2, "dim1") % rank
    return Tokens({one: other, other: one}.get(tokens.dim, tokens.dim), tokens.first)


def getitem(call: NodeCall) -> Outcome:
    """One of several tensors, or a part of one."""
    source, index = call.node.args
    state = call.state(source)
    if isinstance(state, tuple):
        return state[index] if isinstance(index, int) else call.refuse("takes several tensors")
    if state is None:
        return call.refuse("looks up by permuted tokens")
    return indexed(call, cast("Node", source), state, index)[0]


def indexed(
    call: NodeCall, source: Node, state: Tokens, index: Any
) -> tuple[TokenState | Obstacle, int]:
    """Return the state and the rank of `source[index]`.

    Args:
        call: for its reasons.
        source: (..., S, ...).
        state: its state.
        index: numbers, slices, `None` and `...`; a number takes its dimension away.
    """
    items = list(index) if isinstance(index, tuple) else [index]
    if any(
        isinstance(item, (list, torch.Tensor, bool)) or example(item) is not None for item in items
    ):
        return call.refuse("is indexed by a tensor"), 0
    sizes = shape(source)
    spelled = sum(item is not None and item is not Ellipsis for item in items)
    place = items.index(Ellipsis) if Ellipsis in items else len(items)
    items[place : place + 1] = [slice(None)] * (len(sizes) - spelled)
    dim, rank, found = 0, 0, cast("TokenState | Obstacle", None)
    for item in items:
        if item is not None:
            if dim == state.dim:
                found = _sliced(call, item, sizes[dim], Tokens(rank, state.first))
            dim += 1
        rank += item is None or isinstance(item, slice)
    return found, rank


def _sliced(call: NodeCall, item: Any, length: Size, tokens: Tokens) -> TokenState | Obstacle:
    """Return what a slice leaves of the token axis."""
    if not isinstance(item, slice):
        return call.refuse("takes a single token")
    step, start, stop = (number(part) for part in (item.step, item.start, item.stop))
    if step not in (None, 1):
        return call.refuse("takes every n-th token")
    start, stop = 0 if start is None else start, length if stop is None else stop
    if not all(at_most(0, bound) or at_most(bound, -1) for bound in (start, stop)):
        return call.refuse("cuts tokens at a place that is not known")
    start, stop = (length + bound if at_most(bound, -1) else bound for bound in (start, stop))
    return _cut(call, tokens, start, stop)


def _cut(call: NodeCall, tokens: Tokens, start: Size, stop: Size) -> TokenState | Obstacle:
    """Return the state of [start, stop) of the token axis: the video is in it, or out of it."""
    first, last = tokens.first, tokens.first + call.video
    if at_most(start, first) and at_most(last, stop):
        return Tokens(tokens.dim, first - start)
    if at_most(stop, first) or at_most(last, start):
        return None
    return call.refuse("cuts the video's tokens")


@of_first
def split(call: NodeCall, x: Node, tokens: Tokens) -> Outcome:
    """split and chunk: consecutive parts of one dimension."""
    parts = outputs(call.node)
    if call.operand(2, "dim", 0) % len(shape(x)) != tokens.dim:
        return (tokens,) * len(parts)
    found: list[TokenState] = []
    start: Size = 0
    for part in parts:
        stop = start + part.shape[tokens.dim]
        piece = _cut(call, tokens, start, stop)
        if isinstance(piece, Obstacle):
            return piece
        found.append(piece)
        start = stop
    return tuple(found)


@of_first
def unbind(call: NodeCall, x: Node, tokens: Tokens) -> Outcome:
    """All slices of one dimension, which is gone."""
    dim = call.operand(1, "dim", 0) % len(shape(x))
    if dim == tokens.dim:
        return call.refuse("takes single tokens")
    return (Tokens(tokens.dim - (dim < tokens.dim), tokens.first),) * len(outputs(call.node))


def cat(call: NodeCall) -> Outcome:
    """Joined along the token axis: text before or behind. Else all must carry the same tokens."""
    parts = call.tensors()
    rank = len(outputs(call.node)[0].shape)
    dim = call.operand(1, "dim", 0) % rank
    if any(len(shape(part)) != rank for part in parts):
        return call.refuse("joins tensors of several ranks")
    carrying = [part for part in parts if call.state(part) is not None]
    tokens = call.state(carrying[0])
    if not isinstance(tokens, Tokens) or tokens.dim != dim:
        return aligned(call, parts, rank)
    if len(carrying) > 1:
        return call.refuse("joins tokens with other tokens")
    before = parts[: parts.index(carrying[0])]
    return Tokens(dim, sum((shape(part)[dim] for part in before), start=tokens.first))


def stack(call: NodeCall) -> Outcome:
    """Joined along a new dimension."""
    parts = call.tensors()
    rank = len(shape(parts[0]))
    dim = call.operand(1, "dim", 0) % (rank + 1)
    outcome = aligned(call, parts, rank)
    if not isinstance(outcome, Tokens):
        return outcome
    return Tokens(outcome.dim + (dim <= outcome.dim), outcome.first)


@of_first
def repeat(call: NodeCall, x: Node, tokens: Tokens) -> Outcome:
    """Copies along other dimensions."""
    back = tokens.dim - len(shape(x))
    times = call.spread("repeats")
    if not same(number(times[back]), 1):
        return call.refuse("repeats tokens")
    return Tokens(len(times) + back, tokens.first)


@of_first
def repeat_interleave(call: NodeCall, x: Node, tokens: Tokens) -> Outcome:
    """Copies of each slice of another dimension."""
    dim = call.operand(2, "dim")
    if dim is None or dim % len(shape(x)) == tokens.dim:
        return call.refuse("repeats tokens")
    return tokens


@of_first
def pad(call: NodeCall, x: Node, tokens: Tokens) -> Outcome:
    """Constants before and behind; pairs of widths, from the last dimension on."""
    widths = call.operand(1, "pad")
    if call.operand(2, "mode", "constant") != "constant":
        return call.refuse("pads with tokens")
    pair = 2 * (len(shape(x)) - 1 - tokens.dim)
    if pair >= len(widths):
        return tokens
    before, behind = (number(width) for width in widths[pair : pair + 2])
    if not at_most(0, before) or not at_most(0, behind):
        return call.refuse("cuts the video's tokens")
    return Tokens(tokens.dim, tokens.first + before)


def setitem(call: NodeCall) -> Outcome:
    """`target[index] = value`: the value must be permuted as the places that it is written to."""
    target, index, value = call.node.args
    state = call.state(target)
    if not isinstance(state, Tokens):
        return call.refuse("writes tokens into a tensor without")
    part, rank = indexed(call, cast("Node", target), state, index)
    if isinstance(part, Obstacle) or example(value) is None:
        return part if isinstance(part, Obstacle) else None
    written = aligned(call, [cast("Node", value)], rank)
    if written is None and isinstance(part, Tokens):
        return met(cast("Node", value), Tokens(part.dim - rank, part.first))
    alike = isinstance(part, Tokens) and isinstance(written, Tokens) and part.agrees(written)
    both = part is None and written is None
    return None if alike or both else call.refuse("writes tokens to the places of others")
