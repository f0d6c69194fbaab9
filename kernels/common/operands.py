"""What attention kernels ask of their operands, and how they lay out their output."""

from __future__ import annotations

import torch
from torch import Tensor

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.common.padding import KeyPadding
from calibatt_compiler.kernels.request import KernelSettings
from calibatt_compiler.plan.pattern import BlockPattern
from calibatt_compiler.plan.zones import ZonePattern


def check_operands(
    pattern: BlockPattern | ZonePattern,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    padding: KeyPadding | None = None,
) -> None:
    """Raise `KernelError` unless q is (B, H, Sq, D) and k, v are (B, H, Sk, D) of the pattern.

    All three must have one floating dtype and be on one device, and a padding be of these keys.
    """
    if q.dim() != 4:
        raise KernelError(
            "attention queries must have four dimensions",
            expected="(batch, heads, tokens, head_dim)",
            got=tuple(q.shape),
            remedy="reshape q, k and v before the call",
        )
    batch, _, _, head_dim = q.shape
    queries = (batch, pattern.heads, pattern.query_length, head_dim)
    keys = (batch, pattern.heads, pattern.key_length, head_dim)
    if tuple(q.shape) != queries or tuple(k.shape) != keys or tuple(v.shape) != keys:
        raise KernelError(
            "attention operands don't fit the pattern",
            expected=f"q {queries}, k and v {keys}",
            got=f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}",
            remedy="a pattern serves one number of heads and one pair of lengths: take the plan "
            "of this size of video, or calibrate one",
        )
    if not (q.dtype == k.dtype == v.dtype and q.dtype.is_floating_point):
        raise KernelError(
            "attention operands must share one floating-point dtype",
            expected=f"{q.dtype} for q, k and v",
            got=f"{q.dtype}, {k.dtype}, {v.dtype}",
            remedy="cast q, k and v to one dtype, or run under autocast",
        )
    if padding is not None:
        padding.check(batch, pattern.key_length)
        if isinstance(pattern, BlockPattern) and pattern.pooled:
            raise KernelError(
                "a pattern with pooled keys takes no key padding",
                expected="a pattern that pools no keys, or calls without a mask",
                got=f"{pattern.pooled} keys a dropped block, and a mask",
                remedy="calibrate with pooled=0",
            )
    if not q.device == k.device == v.device:
        raise KernelError(
            "attention operands must be on one device",
            expected=f"{q.device} for q, k and v",
            got=f"{q.device}, {k.device}, {v.device}",
            remedy="move q, k and v to one device",
        )


def check_specialisation(q: Tensor, made_for: KernelSettings) -> None:
    """Raise `KernelError` unless q has the dtype, head dim and device that a kernel was made for.

    A device without an index stands for any of its type.
    """
    device, dtype, head_dim = made_for.device, made_for.dtype, made_for.head_dim
    device_fits = q.device.type == device.type and device.index in (None, q.device.index)
    if q.dtype != dtype or q.shape[-1] != head_dim or not device_fits:
        raise KernelError(
            "attention operands don't fit the kernel made for this site",
            expected=f"{dtype}, head_dim {head_dim}, on {device}",
            got=f"{q.dtype}, head_dim {q.shape[-1]}, on {q.device}",
            remedy="compile the model again after moving or casting it",
        )


def empty_output(q: Tensor) -> Tensor:
    """Uninitialised (B, H, Sq, D) like q, laid out as contiguous (B, Sq, H, D).

    It is the layout that the projection after attention wants: its transpose back is a view.
    """
    batch, heads, length, head_dim = q.shape
    shape = (batch, length, heads, head_dim)
    return torch.empty(shape, dtype=q.dtype, device=q.device).transpose(1, 2)


def token_major(out: Tensor) -> Tensor:
    """Return `out` (B, H, Sq, D) laid out as contiguous (B, Sq, H, D); a copy only if needed."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)
