"""How a permutation of tokens passes through operators: one rule each, all in one table, `RULES`.

A rule is given a node, some of whose operands are permuted along one dimension, and returns the
`Tokens` of its output, or `None` where the output is what it was, or an `Obstacle` with its reason.
It may rest on shapes and constants alone, and must hold for every permutation of the tokens.
Where a value that is not permuted meets one that is, token by token, it returns
`NeedsPermutation`.

| operators | a permutation of the token axis |
|---|---|
| elementwise, softmax, casts | stays, aligned from the last dimension |
| linear, matmul | stays unless it is the axis that is summed over |
| layer_norm, rms_norm | stays unless it is normalised over |
| sum, mean, amax, amin, var | stays; gone where it is reduced: a sum knows no order |
| view, flatten, unsqueeze, ... | stays where the output has the same axis, whole |
| permute, transpose | moves along |
| index by slices, split, chunk, unbind | stays; a cut must leave the video whole, or out |
| cat, stack | stays; text may be joined before or behind |
| expand, repeat, pad | stays; zeros may be joined before or behind |
| attention | that of the queries; keys and values are summed over |
| setitem | the target's, if what is written agrees |

What is not in the table is an obstacle: no rule says what it does.
"""

from __future__ import annotations

import builtins
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from calibatt_compiler.passes.graph import SDPA, example, sdpa_operands, transformed
from calibatt_compiler.passes.token_order import places
from calibatt_compiler.passes.token_order.axis import (
    NeedsPermutation,
    NodeCall,
    Outcome,
    Rule,
    Tokens,
    TokenState,
    aligned,
    number,
    of_first,
    outputs,
    same,
    shape,
    token_states,
)


def elementwise(call: NodeCall) -> Outcome:
    """All operands are aligned at their last dimension: (B, S, C) * (B, 1, C) + (S, 1)."""
    out = example(call.node)
    if out is None:
        return call.refuse("returns no single tensor")
    return aligned(call, call.tensors(), out.dim())


def as_first(call: NodeCall) -> Outcome:
    """The first operand in another dtype, memory or broadcast shape: (1, S, D) -> (B, S, D)."""
    first, *_ = call.tensors()
    state, out = call.state(first), example(call.node)
    if not isinstance(state, Tokens) or out is None:
        return None if state is None else call.refuse("takes several tensors as one")
    return Tokens(out.dim() + state.dim - len(shape(first)), state.first)


def dropout(call: NodeCall) -> Outcome:
    """Nothing at inference; in training it draws a random number for each place."""
    if call.operand(1, "p", 0.5) and call.operand(2, "training", True):
        return call.refuse("drops elements at random")
    return as_first(call)


@of_first
def linear(call: NodeCall, x: Node, tokens: Tokens) -> Outcome:
    """(..., S, C) x (D, C) -> (..., S, D)."""
    return call.refuse("sums over tokens") if tokens.dim == len(shape(x)) - 1 else tokens


def matmul(call: NodeCall) -> Outcome:
    """(..., S, C) x (C, D) -> (..., S, D), or with batch dimensions of the same tokens."""
    operands = call.tensors()
    if len(operands) != 2 or any(len(shape(operand)) < 2 for operand in operands):
        return call.refuse("multiplies something else than two matrices")
    x, y = operands
    rank = len(outputs(call.node)[0].shape)
    for one, other, back in ((x, y, -2), (y, x, -1)):
        tokens = call.state(one)
        if isinstance(tokens, Tokens) and tokens.dim - len(shape(one)) == back:
            pairs = call.state(other) is not None
            return call.refuse("pairs tokens") if pairs else Tokens(rank + back, tokens.first)
    return call.refuse("sums over tokens, or has them in a batch dimension")


@of_first
def norm(call: NodeCall, x: Node, tokens: Tokens) -> Outcome:
    """layer_norm and rms_norm over the last dimensions."""
    over = number(call.operand(1, "normalized_shape"))
    last = len(over) if isinstance(over, (tuple, list, torch.Size)) else 1
    return call.refuse("normalises over tokens") if tokens.dim >= len(shape(x)) - last else tokens


@of_first
def reduction(call: NodeCall, x: Node, tokens: Tokens) -> Outcome:
    """A sum over some dimensions; over all tokens, it is the same in any order."""
    rank = len(shape(x))
    dims = call.operand(1, "dim")
    if isinstance(dims, bool):
        return call.refuse("reduces dimensions that are not given")
    reduced = {dim % rank for dim in ([dims] if isinstance(dims, int) else dims or range(rank))}
    if tokens.dim in reduced:
        return None
    kept = len(outputs(call.node)[0].shape) == rank
    return Tokens(
        tokens.dim - (0 if kept else sum(dim < tokens.dim for dim in reduced)), tokens.first
    )


@of_first
def softmax(call: NodeCall, x: Node, tokens: Tokens) -> Outcome:
    """Over tokens or over something else: each result stays with its element."""
    return tokens


def attention(call: NodeCall) -> Outcome:
    """(B, H, Sq, D) x (B, H, Sk, D): queries keep their order, keys and values are summed over."""
    operands = sdpa_operands(call.node)
    query, key, value = (call.state(operands[name]) for name in ("query", "key", "value"))
    rank = len(shape(operands["query"]))
    if operands.get("is_causal"):
        return call.refuse("is causal")
    if operands.get("dropout_p"):
        return call.refuse("drops scores at random")
    carried = [state for state in (query, key, value) if state is not None]
    if any(not isinstance(state, Tokens) or state.dim != rank - 2 for state in carried):
        return call.refuse("has tokens in another dimension than that which is attended")
    for name, one, other in (("key", key, value), ("value", value, key)):
        if isinstance(other, Tokens) and not other.agrees(one):
            return (
                NeedsPermutation(operands[name], other)
                if one is None
                else call.refuse("differs in tokens")
            )
    mask = operands.get("attn_mask")
    if isinstance(mask, Node):
        return _masked(call, mask, query, key)
    return query if isinstance(query, Tokens) else None


def _masked(call: NodeCall, mask: Node, query: TokenState, key: TokenState) -> Outcome:
    """A mask (B, H, Sq, Sk), sizes 1 where it is broadcast, must be permuted as what it masks."""
    sizes, state = shape(mask), call.state(mask)
    wanted = [
        Tokens(len(sizes) + back, tokens.first)
        for back, tokens in ((-2, query), (-1, key))
        if isinstance(tokens, Tokens) and len(sizes) >= -back and not same(sizes[back], 1)
    ]
    if len(wanted) > 1:
        return call.refuse("has a mask of tokens by tokens")
    if state is None and wanted:
        return NeedsPermutation(mask, wanted[0])
    if state is not None and not (wanted and wanted[0].agrees(state)):
        return call.refuse("has a mask of other tokens")
    return query if isinstance(query, Tokens) else None


def no_tokens(call: NodeCall) -> Outcome:
    """Sizes, dtypes and devices: the same for any order of tokens."""
    tensor = any(isinstance(out, torch.Tensor) for out in outputs(call.node))
    return call.refuse("is a tensor that no rule describes") if tensor else None


def constant(call: NodeCall) -> Outcome:
    """Numbers that are given, in the dtype and on the device of the operand."""
    return None


def _named(*names: str) -> list[Any]:
    """Return the method, and the functions of torch and of operators, of each name."""
    spaces = (torch, F, torch._C._nn, operator)
    functions = [
        getattr(space, name)
        for name in names
        for space in spaces
        if callable(getattr(space, name, None))
    ]
    return [*names, *functions]


RULES: dict[Any, Rule] = {
    target: rule
    for rule, targets in (
        (elementwise, _named(
            "add", "sub", "mul", "div", "truediv", "pow", "neg", "abs", "exp", "log", "sqrt",
            "rsqrt", "square", "reciprocal", "sin", "cos", "tanh", "sigmoid", "silu", "gelu",
            "relu", "softplus", "mish", "clamp", "maximum", "minimum", "where", "lerp", "addcmul",
            "masked_fill", "nan_to_num", "isnan", "eq", "ne", "lt", "le", "gt", "ge", "and_",
            "or_", "logical_not", "logical_and", "logical_or", "iadd", "isub", "imul", "itruediv",
            "add_", "sub_", "mul_", "div_", "copy_",
        )),
        (as_first, _named(
            "to", "type_as", "float", "half", "bfloat16", "double", "contiguous", "clone", "detach",
            "expand", "expand_as", "empty_like", "zeros_like", "ones_like", "full_like",
        )),
        (dropout, _named("dropout")),
        (linear, _named("linear")),
        (matmul, _named("matmul", "bmm", "mm")),
        (norm, _named("layer_norm", "rms_norm")),
        (reduction, _named("sum", "mean", "amax", "amin", "var")),
        (softmax, _named("softmax")),
        (places.reshape, _named("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze",
            "view_as_complex", "view_as_real")),
        (places.permute, _named("permute")),
        (places.transpose, _named("transpose", "swapaxes", "swapdims")),
        (places.getitem, [operator.getitem]),
        (places.split, _named("split", "chunk", "split_with_sizes", "tensor_split")),
        (places.unbind, _named("unbind")),
        (places.cat, _named("cat")),
        (places.stack, _named("stack")),
        (places.repeat, _named("repeat")),
        (places.repeat_interleave, _named("repeat_interleave")),
        (places.pad, _named("pad")),
        (attention, SDPA),
        (places.setitem, [operator.setitem]),
        (no_tokens, ["size", "dim", "numel", builtins.getattr, torch.ops.aten.sym_size.int]),
        (constant, ["new_zeros", "new_ones", "new_full"]),
    )
    for target in targets
}  # fmt: skip
"""Rules by method name and function."""


NUMPY = {"axis", "axes", "axis0", "axis1", "keepdims", "x", "x1", "x2"}
"""Other names of arguments, which rules would take for missing."""


def transfer(call: NodeCall) -> Outcome:
    """Return what a node makes of its operands."""
    operands = [call.state(node) for node in call.node.all_input_nodes]
    if not any(tokens for state in operands for tokens in token_states(state)):
        return None  # the same operands in both runs: the same result, whatever it is
    if any(transformed(node) for node in (call.node, *call.node.all_input_nodes)):
        return call.refuse("is inside vmap, grad or another transform of torch.func")
    if call.node.target is not operator.getitem and any(isinstance(s, tuple) for s in operands):
        return call.refuse("takes several tensors as one")
    if not NUMPY.isdisjoint(call.node.kwargs):
        return call.refuse("names its dimensions in NumPy's words")
    rule = RULES.get(call.node.target)
    if rule is None:
        name = getattr(call.node.target, "__name__", call.node.target)
        return call.refuse(f"is of an operator without a rule for permuted tokens ({name})")
    return rule(call)
