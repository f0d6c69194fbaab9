"""The operators that the passes put into a graph.

`calibatt::host_timestep` brings the timestep to the host once a forward pass, and
`calibatt::passed_timestep` takes it from the call of the model that a graph is a part of;
`calibatt::token_order` says in which order a plan has a video's tokens; `calibatt::attention`
serves one site, `calibatt::attention_backward` its gradients; `calibatt::key_padding` reads a mask
over keys, and `calibatt::look_at_mask` one that may be something else. All are opaque to Inductor
and pure in their result.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.common.padding import KeyPadding
from calibatt_compiler.plan.order import TokenOrder
from calibatt_compiler.runtime.invocation import current, lookup, sign
from calibatt_compiler.runtime.masks import given_mask, look, of_keys
from calibatt_compiler.runtime.timestep import read, send
from calibatt_compiler.runtime.token_order import Rearrangements

TAGS = (torch.Tag.cudagraph_unsafe,)
"""Operators run Python code: a CUDA graph would replay the kernels of the step it was captured in.
Inductor leaves them out of its graphs, which take what lies between."""


@torch.library.custom_op("calibatt::host_timestep", mutates_args=(), tags=TAGS)
def host_timestep(timestep: Tensor) -> Tensor:
    """Return the diffusion timestep of a call; sites read it: see `runtime.timestep`.

    Args:
        timestep: any shape, any dtype, one entry a sample on the first dimension.

    Returns:
        Float64 (2) on the CPU: the timestep, and which graph is running (`runtime.invocation`).
    """
    return sign(send(timestep))


@host_timestep.register_fake
def _(timestep: Tensor) -> Tensor:
    return torch.empty(2, dtype=torch.float64, device="cpu")


host_timestep.register_autograd(lambda ctx, gradient: None)


@torch.library.custom_op("calibatt::host_timestep_of", mutates_args=(), tags=TAGS)
def host_timestep_of(timestep: Tensor, coordinates: Sequence[Tensor], names: str) -> Tensor:
    """Return what `host_timestep` does, after a look at where the tokens of the call stand.

    Args:
        timestep: see `host_timestep`.
        coordinates: of the tokens; see `runtime.coordinates`.
        names: of the arguments that they are, with commas between them.

    Returns:
        As `host_timestep`.
    """
    invocation = current()
    reader = None if invocation is None else invocation.coordinates
    found = [] if reader is None else map(reader.read, names.split(","), coordinates)
    return sign(send(timestep, [fits for fits in found if fits is not None]))


@host_timestep_of.register_fake
def _(timestep: Tensor, coordinates: Sequence[Tensor], names: str) -> Tensor:
    return torch.empty(2, dtype=torch.float64, device="cpu")


@torch.library.custom_op("calibatt::passed_timestep", mutates_args=(), tags=TAGS)
def passed_timestep(like: Tensor) -> Tensor:
    """Return what `host_timestep` does, in a graph that is a part of a model: of the model's call.

    Args:
        like: any tensor.

    Returns:
        As `host_timestep`.
    """
    invocation = current()
    timestep = None if invocation is None else invocation.timestep
    if timestep is None:
        raise KernelError(
            "a part of a model ran by itself",
            expected="a call of the model compiled with torch.compile(..., backend='calibatt')",
            got="compiled code without a call of its model",
            remedy="call the compiled model itself, not code that was taken out of it",
        )
    return sign(torch.tensor([timestep, 0.0], dtype=torch.float64))


@passed_timestep.register_fake
def _(like: Tensor) -> Tensor:
    return torch.empty(2, dtype=torch.float64, device="cpu")


passed_timestep.register_autograd(lambda ctx, gradient: None)


def _keep_count(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.count = len(inputs[1])


host_timestep_of.register_autograd(
    lambda ctx, gradient: (None, [None] * ctx.count, None), setup_context=_keep_count
)


@torch.library.custom_op("calibatt::token_order", mutates_args=(), tags=TAGS)
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
    invocation = current()
    kept = Rearrangements() if invocation is None else invocation.rearrangements
    parsed = TokenOrder.parse(order)
    found = kept.laid_out(parsed, (frames, height, width), length, first, like.device)
    assert found is not None, "the pass permutes only what has another order"
    # A copy: the memory of an operator's result may be used again.
    return (found.positions if inverse else found.tokens).clone()


@token_order.register_fake
def _(
    like: Tensor, order: str, grid: Sequence[int], length: int, first: int, inverse: bool
) -> Tensor:
    return like.new_empty(length, dtype=torch.int32)


@torch.library.custom_op("calibatt::key_padding", mutates_args=(), tags=TAGS)
def key_padding(mask: Tensor, vector: bool) -> tuple[Tensor, Tensor]:
    """Return what a mask says of the keys, which all queries share; nothing waits for the device.

    Args:
        mask: bool or float; (B or 1, Sk) if it is a `vector`, else as SDPA takes it.
        vector: see `mask`.

    Returns:
        `bias` and `bounds` of `KeyPadding`.
    """
    found = KeyPadding.of(mask if vector else of_keys(mask))
    return found.bias, found.bounds


@key_padding.register_fake
def _(mask: Tensor, vector: bool) -> tuple[Tensor, Tensor]:
    return _padding_like(mask, mask.shape[0] if vector or mask.dim() == 4 else 1)


@torch.library.custom_op("calibatt::look_at_mask", mutates_args=(), tags=TAGS)
def look_at_mask(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Look at a mask of pairs of tokens; waits for the device.

    Args:
        mask: bool, as SDPA takes it.

    Returns:
        `bias` and `bounds` of `KeyPadding`; int64 (1) on the CPU, what it is: see `runtime.masks`.
    """
    found, verdict = look(mask)
    return found.bias, found.bounds, torch.tensor([verdict])


@look_at_mask.register_fake
def _(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    found = _padding_like(mask, mask.shape[0] if mask.dim() == 4 else 1)
    return *found, torch.empty(1, dtype=torch.int64, device="cpu")


def _padding_like(mask: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    bias = mask.new_empty(samples, mask.shape[-1], dtype=torch.float32)
    return bias, mask.new_empty(samples, 4, dtype=torch.int32)


@torch.library.custom_op("calibatt::attention", mutates_args=(), tags=TAGS)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    timestep: Tensor,
    site: str,
    scale: float,
    ordered: bool = False,
    bias: Tensor | None = None,
    bounds: Tensor | None = None,
    rows: bool = False,
    verdict: Tensor | None = None,
    mask: Tensor | None = None,
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
        bias: see `runtime.masks`, as all that follow; None: there is no mask.
        bounds: with `bias`.
        rows: with `bias`.
        verdict: with `bias`, of a mask that was looked at.
        mask: with `verdict`.

    Returns:
        (batch, heads, query_length, head_dim), laid out as (batch, query_length, heads, head_dim)
        contiguous, which is what the output projection reads.

    Raises:
        KernelError: no such site, or operands that its kernel can't take.
    """
    given = given_mask(bias, bounds, rows, verdict, mask)
    found = lookup(site, timestep)
    return found.attend(q, k, v, read(timestep), scale, ordered=ordered, **given)


@attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    timestep: Tensor,
    site: str,
    scale: float,
    ordered: bool = False,
    bias: Tensor | None = None,
    bounds: Tensor | None = None,
    rows: bool = False,
    verdict: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    return _token_major_like(q)


@torch.library.custom_op("calibatt::attention_backward", mutates_args=(), tags=TAGS)
def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    timestep: Tensor,
    site: str,
    scale: float,
    ordered: bool,
    bias: Tensor | None,
    bounds: Tensor | None,
    rows: bool,
    verdict: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attention`, by the pattern that served the call.

    Args:
        grad: gradient of the output, (batch, heads, query_length, head_dim), any strides.
        q: see `attention`.
        k: see `attention`.
        v: see `attention`.
        timestep: see `attention`.
        site: see `attention`.
        scale: see `attention`.
        ordered: see `attention`.
        bias: see `attention`.
        bounds: see `attention`.
        rows: see `attention`.
        verdict: see `attention`.
        mask: see `attention`.

    Returns:
        Gradients of q, k and v, laid out as the output of `attention`.

    Raises:
        KernelError: the model is gone, or its site has no gradients.
    """
    given = given_mask(bias, bounds, rows, verdict, mask)
    found = lookup(site, timestep)
    return found.gradients(grad, q, k, v, read(timestep), scale, ordered=ordered, **given)


@attention_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    timestep: Tensor,
    site: str,
    scale: float,
    ordered: bool,
    bias: Tensor | None,
    bounds: Tensor | None,
    rows: bool,
    verdict: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _token_major_like(q), _token_major_like(k), _token_major_like(v)


def _token_major_like(x: Tensor) -> Tensor:
    batch, heads, length, head_dim = x.shape
    return x.new_empty(batch, length, heads, head_dim).transpose(1, 2)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, timestep, *ctx.rest, bias, bounds, ctx.rows, verdict, mask = inputs
    ctx.save_for_backward(q, k, v, timestep, bias, bounds, verdict, mask)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, timestep, bias, bounds, verdict, mask = ctx.saved_tensors
    masked = (bias, bounds, ctx.rows, verdict, mask)
    found = torch.ops.calibatt.attention_backward(grad, q, k, v, timestep, *ctx.rest, *masked)
    return (*found, None, *[None] * (len(ctx.rest) + len(masked)))


def _no_second(ctx: Any, *grads: Tensor) -> None:
    raise KernelError(
        "attention served by a plan can't be differentiated twice",
        expected="gradients of the first order",
        got="a backward pass through a backward pass (create_graph=True)",
        remedy="run the model that is not compiled, or without create_graph=True",
    )


attention.register_autograd(_backward, setup_context=_save)
attention_backward.register_autograd(_no_second)


@functools.cache
def operators_digest() -> str:
    """SHA-256 (hex) of this file; code compiled for other operators than these is not taken."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
