"""The two operators that the passes put into a graph.

`calibatt::host_timestep` brings the timestep to the host once a forward pass;
`calibatt::attention` serves one site. Both are opaque to Inductor and pure in their result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calibatt_compiler.runtime.serving import lookup
from calibatt_compiler.runtime.timestep import read, send


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


@torch.library.custom_op("calibatt::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, timestep: Tensor, site: str, scale: float) -> Tensor:
    """Attention of one site at a timestep.

    Args:
        q: (batch, heads, query_length, head_dim), any strides.
        k: (batch, heads, key_length, head_dim), any strides.
        v: like `k`.
        timestep: what `host_timestep` returned.
        site: its name in the graph that is running.
        scale: factor of the scores.

    Returns:
        (batch, heads, query_length, head_dim), laid out as (batch, query_length, heads, head_dim)
        contiguous, which is what the output projection reads.

    Raises:
        KernelError: no such site, or operands that its kernel can't take.
    """
    return lookup(site).attend(q, k, v, read(timestep), scale)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, timestep: Tensor, site: str, scale: float) -> Tensor:
    batch, heads, length, head_dim = q.shape
    return q.new_empty(batch, length, heads, head_dim).transpose(1, 2)
