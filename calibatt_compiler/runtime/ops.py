"""The operators that the passes put into a graph.

`calibatt::host_timestep` brings the timestep to the host once a forward pass;
`calibatt::token_order` says in which order a plan has a video's tokens; `calibatt::attention`
serves one site. All are opaque to Inductor and pure in their result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from calibatt_compiler.plan.order import TokenOrder
from calibatt_compiler.runtime.invocation import lookup
from calibatt_compiler.runtime.timestep import read, send
from calibatt_compiler.runtime.token_order import laid_out


@torch.library.custom_op("calibatt::host_timestep", mutates_args=())
def host_timestep(timestep: Tensor) -> Tensor:
    """Return the diffusion timestep of a call; sites read it: see `runtime.timestep`.

    Args:
        timestep: any shape, any dtype, one entry a sample on the first dimension.

    Returns:
        Float64 scalar on the CPU.
    """
    return send(timestep)


@host_timestep.register_fake
def _(timestep: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.float64, device="cpu")


@torch.library.custom_op("calibatt::token_order", mutates_args=())
def token_order(
    like: Tensor, order: str, grid: Sequence[int], length: int, first: int, inverse: bool
) -> Tensor:
    """Return what `index_select` takes to bring tokens into an order, or back.

    Args:
        like: a tensor on the device of the result.
        order: name of a `TokenOrder` that is not the grid's own.
        grid: tokens (frames, height, width).
        length: tokens of the sequence, text included; text stays where it is.
        first: where in the sequence the video begins.
        inverse: bring tokens back.

    Returns:
        int32 (length): the token for each place.
    """
    frames, height, width = grid
    found = laid_out(TokenOrder.parse(order), (frames, height, width), length, first, like.device)
    assert found is not None, "the pass permutes only what has another order"
    # A copy: the memory of an operator's result may be used again.
    return (found.positions if inverse else found.tokens).clone()


@token_order.register_fake
def _(
    like: Tensor, order: str, grid: Sequence[int], length: int, first: int, inverse: bool
) -> Tensor:
    return like.new_empty(length, dtype=torch.int32)


@torch.library.custom_op("calibatt::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    timestep: Tensor,
    site: str,
    scale: float,
    ordered: bool = False,
) -> Tensor:
    """Attention of one site at a timestep.

    Args:
        q: (batch, heads, query_length, head_dim), any strides.
        k: (batch, heads, key_length, head_dim), any strides.
        v: like `k`.
        timestep: what `host_timestep` returned.
        site: its name in the graph that is running.
        scale: factor of the scores.
        ordered: whether the operands, and so the output, are in the plan's token order.

    Returns:
        (batch, heads, query_length, head_dim), laid out as (batch, query_length, heads, head_dim)
        contiguous, which is what the output projection reads.

    Raises:
        KernelError: no such site, or operands that its kernel can't take.
    """
    return lookup(site).attend(q, k, v, read(timestep), scale, ordered=ordered)


@attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    timestep: Tensor,
    site: str,
    scale: float,
    ordered: bool = False,
) -> Tensor:
    batch, heads, length, head_dim = q.shape
    return q.new_empty(batch, length, heads, head_dim).transpose(1, 2)
