"""Small questions that every pass asks of an FX graph."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch.fx import GraphModule, Node

SDPA = (
    torch.nn.functional.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)

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


def module_name(node: Node) -> str:
    """Return the path of the module that a node was traced in, such as `blocks.3.attn1`; or ''.

    Dynamo writes it as `L['self'].__dict__['_modules']['blocks'].3.attn1`.
    """
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(next(reversed(list(stack.values())))[0])
    path = re.sub(r"^[LG]\['\w+'\]", "", path)
    path = re.sub(r"(\.__dict__)?(\.|\[')_modules('\])?", "", path)
    path = re.sub(r"\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", path)
    return path.strip(".")


def finish(gm: GraphModule) -> None:
    """Drop dead nodes, check the graph and compile it again: the end of each changing pass."""
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
