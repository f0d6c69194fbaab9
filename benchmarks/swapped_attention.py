"""What `dit_layer.py` puts in the place of self-attention: FlashAttention-3, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from attention_kernels import fa3_function
from torch import Tensor


@torch.library.custom_op("calibatt_benchmark::fa3", mutates_args=())
def fa3_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention-3 over (B, H, S, D)."""
    result = fa3_function()(*(x.transpose(1, 2) for x in (q, k, v)))
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out.transpose(1, 2)


@torch.library.custom_op("calibatt_benchmark::none", mutates_args=())
def no_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Zeros in the place of attention: what is left is the rest of the layer."""
    return torch.zeros_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(
        1, 2
    )


@fa3_attention.register_fake
@no_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, length, head_dim = q.shape
    return q.new_empty(batch, length, heads, head_dim).transpose(1, 2)


def swapping(operator: Any, tokens: int) -> Callable[..., Any]:
    """Return a backend: Inductor, with an operator in the place of self-attention."""

    def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        for node in list(gm.graph.nodes):
            if node.op != "call_function" or "scaled_dot_product" not in str(node.target):
                continue
            names = ("query", "key", "value")
            given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
            operands = tuple(given[name] for name in names)
            if operands[1].meta["example_value"].shape[2] != tokens:
                continue
            with gm.graph.inserting_before(node):
                new = gm.graph.call_function(operator, operands)
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)
        gm.recompile()
        return compile_fx(gm, inputs)

    return backend
