"""Small questions that every pass asks of an FX graph."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

SDPA = (
    torch.nn.functional.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)

FLEX = (torch.ops.higher_order.flex_attention,)
"""Attention that has a score function or a block mask of its own; Dynamo's graph has it so."""

BY_FLEX = "by flex_attention; the attention backend that is served is native"

OPERANDS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
"""Parameters of `scaled_dot_product_attention`, in order."""


def sdpa_operands(node: Node) -> dict[str, Any]:
    """Return the arguments of an attention node by parameter, whatever its call style."""
    return dict(zip(OPERANDS, node.args, strict=False)) | dict(node.kwargs)


def subgraphs(node: Node) -> list[GraphModule]:
    """Return the graph modules that a higher-order operator is called with."""
    owner = node.graph.owning_module
    found = []
    for argument in node.all_input_nodes:
        if argument.op == "get_attr" and owner is not None:
            value = _attribute(owner, str(argument.target))
            if isinstance(value, GraphModule):
                found.append(value)
    return found


def _attribute(owner: GraphModule, target: str) -> object:
    value: object = owner
    for part in target.split("."):
        value = getattr(value, part, None)
    return value


def example(operand: object) -> torch.Tensor | None:
    """Return the fake tensor of a node."""
    if not isinstance(operand, Node):
        return None
    value = operand.meta.get("example_value", operand.meta.get("val"))
    return value if isinstance(value, torch.Tensor) else None


def module_path(node: Node) -> str:
    """Return Dynamo's path of the module that a node was traced in, or ''.

    Such as `L['self'].__dict__['_modules']['blocks'].3.attn1`.
    """
    stack = node.meta.get("nn_module_stack")
    return str(next(reversed(list(stack.values())))[0]) if stack else ""


def module_name(node: Node) -> str:
    """Return the path of the module that a node was traced in, such as `blocks.3.attn1`; or ''."""
    path = re.sub(r"^[LG]\['\w+'\]", "", module_path(node))
    path = re.sub(r"(\.__dict__)?(\.|\[')_modules('\])?", "", path)
    path = re.sub(r"\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", path)
    return path.strip(".")


def transformed(node: Node) -> bool:
    """Whether a value lives within vmap, grad or another transform of torch.func.

    Its fake tensor then belongs to a level of the transform that is over: nothing can be asked of
    it but its sizes.
    """
    value = node.meta.get("example_value")
    values = value if isinstance(value, (tuple, list)) else (value,)
    return any(
        isinstance(each, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(each)
        for each in values
    )


def finish(gm: GraphModule, made: Sequence[Node] = ()) -> None:
    """Check a graph and compile it again: the end of each changing pass.

    A graph of Dynamo has effects: what nobody reads may write into a tensor, draw random numbers or
    enter a context. So nothing is erased but nodes that the pass made itself.

    Args:
        gm: the graph.
        made: pure nodes that the pass made, in order; those that nobody reads are erased.
    """
    drop_unread(made)
    gm.graph.lint()
    gm.recompile()


def drop_unread(made: Sequence[Node]) -> list[Node]:
    """Erase those of one's own pure nodes, given in order, that nobody reads; return the others."""
    kept = []
    for node in reversed(made):
        if node.users:
            kept.append(node)
        else:
            node.graph.erase_node(node)
    return kept[::-1]
