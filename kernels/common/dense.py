"""Stock SDPA, also with the log-sum-exp which its kernels compute anyway.

PyTorch returns that from the operators below its public function only. The operator taken here is
that of the kernel which the public function would choose, so the output is the same; where that
kernel has no such operator, or this PyTorch another one, there is no log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from calibatt_compiler.kernels.common.operands import token_major
from calibatt_compiler.kernels.common.padding import KeyPadding
from calibatt_compiler.logs import logger

log = logger("kernels")


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    mask: KeyPadding | Tensor | None = None,
) -> Tensor:
    """Stock SDPA in the layout that block-sparse kernels return.

    Args:
        q: (B, H, Sq, D).
        k: (B, H, Sk, D).
        v: (B, H, Sk, D).
        scale: factor on the scores; default 1 / sqrt(D).
        mask: what a mask says of the keys, or one that SDPA takes.

    Returns:
        (B, H, Sq, D), laid out as contiguous (B, Sq, H, D).
    """
    given = mask.dense_mask().to(q.dtype) if isinstance(mask, KeyPadding) else mask
    out = token_major(F.scaled_dot_product_attention(q, k, v, attn_mask=given, scale=scale))
    return mask.clear_rows(out) if isinstance(mask, KeyPadding) else out


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    # The public function pads for this operator; the scale is that of the true head dim.
    head_dim = q.shape[-1]
    padded = (F.pad(x, (0, -head_dim % 8)) if head_dim % 8 else x for x in (q, k, v))
    flash: Any = torch.ops.aten._scaled_dot_product_flash_attention
    out, lse = flash(*padded, 0.0, False, False, scale=scale)[:2]
    return out[..., :head_dim], lse


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    cudnn: Any = torch.ops.aten._scaled_dot_product_cudnn_attention
    out, lse = cudnn(q, k, v, None, True, 0.0, False, False, scale=scale)[:2]
    return out, lse


def _efficient(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    efficient: Any = torch.ops.aten._scaled_dot_product_efficient_attention
    out, lse = efficient(q, k, v, None, True, 0.0, False, scale=scale)[:2]
    return out, lse


_Operator = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
OPERATORS: dict[SDPBackend, _Operator] = {
    SDPBackend.FLASH_ATTENTION: _flash,
    SDPBackend.CUDNN_ATTENTION: _cudnn,
    SDPBackend.EFFICIENT_ATTENTION: _efficient,
}


def chosen_backend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> SDPBackend | None:
    """Which kernel SDPA would take, `torch.nn.attention.sdpa_kernel` obeyed; None if unknown."""
    try:
        number = torch._fused_sdp_choice(q, k, v, scale=scale)
    except (AttributeError, TypeError, RuntimeError):
        return None
    return next((backend for backend in OPERATORS if backend.value == number), None)


def dense_attention_and_lse(
    q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Return dense attention's output and, where it is to be had, its log-sum-exp.

    Args:
        q: (B, H, Sq, D) on a GPU.
        k: (B, H, Sk, D).
        v: (B, H, Sk, D).
        scale: factor on the scores.

    Returns:
        (B, H, Sq, D), laid out as contiguous (B, Sq, H, D); float32 (B, H, Sq), natural log-sum-exp
        of the scaled scores, any strides, or None, which is logged with its reason.
    """
    q, k, v = q.detach(), k.detach(), v.detach()
    backend = chosen_backend(q, k, v, scale)
    if backend is None:
        _tell("SDPA takes a kernel that returns none")
        return dense_attention(q, k, v, scale), None
    try:
        out, lse = OPERATORS[backend](q, k, v, scale)
    except (AttributeError, TypeError, NotImplementedError) as error:
        _tell(f"torch {torch.__version__} has another operator: {type(error).__name__}: {error}")
        return dense_attention(q, k, v, scale), None
    return token_major(out), by_query(lse, q)


def by_query(lse: Tensor, q: Tensor) -> Tensor:
    """Bring a kernel's log-sum-exp to (B, H, Sq).

    cuDNN's has a last axis of one; the memory-efficient kernel's is padded to whole tiles of 32.
    """
    if lse.dim() == 4:
        lse = lse.squeeze(-1)
    return lse[:, :, : q.shape[2]]


@cache
def _tell(reason: str) -> None:
    """Log a reason once."""
    log.warning("no log-sum-exp from dense attention: %s; energies take a pass more", reason)
