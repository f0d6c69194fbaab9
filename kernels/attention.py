"""Which kernel serves a pattern: chosen here, by capability, and nowhere else.

| device | dtype | lowering | kernel |
|---|---|---|---|
| any | any float | reference | `ReferenceAttention` |
| CPU | any float | any other | `NativeCpuAttention` (C++) |
| CUDA, sm_80 and newer | float32, bfloat16, float16 | table | `TableAttention` (Triton) |
| CUDA, sm_80 and newer | float32, bfloat16, float16 | baked | `BakedAttention` (Triton) |
| CUDA, sm_90, unless `hopper=False` | bfloat16, float16 | table | `HopperAttention` (Gluon) |
| CUDA, sm_90, unless `hopper=False` | bfloat16, float16 | baked | `BakedAttention` (Gluon) |
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.common.operands import token_major
from calibatt_compiler.kernels.portable.tiles import HOPPER, architecture
from calibatt_compiler.options import Lowering, Softmax
from calibatt_compiler.plan.pattern import BlockPattern

if TYPE_CHECKING:
    from calibatt_compiler.kernels.baked.attention import BakedAttention
    from calibatt_compiler.kernels.portable.attention import TableAttention

CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class AttentionKernel(Protocol):
    """Block-sparse attention by one pattern.

    Attributes:
        kind: what serves right now, such as "reference", "native-cpu", "triton-table",
            "triton-baked", "hopper-table" or "hopper-baked".
        density: blocks really computed / all blocks; above the pattern's own density where a
            superset covers the pattern.
        reason: why another kernel than the one asked for serves, and will go on to; else None.
        table_bytes: what its index tables take on the operands' device.
    """

    @property
    def kind(self) -> str:
        """What serves right now."""

    @property
    def density(self) -> float:
        """Blocks really computed / all blocks."""

    @property
    def reason(self) -> str | None:
        """Why another kernel than the one asked for serves."""

    @property
    def table_bytes(self) -> int:
        """Bytes of index tables on the operands' device."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        """Return the attention output.

        Args:
            q: (B, H, Sq, D), any strides.
            k: (B, H, Sk, D).
            v: (B, H, Sk, D).
            scale: factor on the scores; default 1 / sqrt(D).

        Returns:
            (B, H, Sq, D), always laid out as contiguous (B, Sq, H, D).

        Raises:
            KernelError: the operands don't fit the pattern or one another.
        """


@runtime_checkable
class ReorderingKernel(Protocol):
    """A kernel that reads tokens in another order than the pattern's without a copy."""

    def reordered(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        query_tokens: Tensor,
        key_tokens: Tensor,
        *,
        scale: float | None = None,
    ) -> Tensor:
        """Return the attention output in the order of the operands.

        Args:
            q: (B, H, Sq, D), any strides.
            k: (B, H, Sk, D).
            v: (B, H, Sk, D).
            query_tokens: int32 (Sq), contiguous, on the operands' device: the query that stands
                at each position of the pattern.
            key_tokens: int32 (Sk), likewise for keys and values.
            scale: factor on the scores; default 1 / sqrt(D).

        Returns:
            (B, H, Sq, D), laid out as contiguous (B, Sq, H, D).

        Raises:
            KernelError: the operands don't fit the pattern or one another.
        """


def make_attention(
    pattern: BlockPattern,
    *,
    lowering: Lowering,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    hopper: bool = True,
    softmax: Softmax = "auto",
) -> AttentionKernel:
    """Return the kernel that serves a pattern.

    Args:
        pattern: which blocks are kept.
        lowering: "baked", "table" or "reference"; on a CPU the first two mean the same.
        device: of the operands.
        dtype: of the operands.
        head_dim: of the operands.
        hopper: take the kernel for Hopper GPUs where it serves; where not, on such a GPU, `reason`
            says why.
        softmax: as in `CompileOptions`.

    Raises:
        KernelError: there is no kernel for this device, dtype and head dim.
    """
    if not dtype.is_floating_point:
        raise KernelError(
            "attention needs a floating-point dtype",
            expected="float64, float32, bfloat16 or float16",
            got=dtype,
            remedy="cast the model",
        )
    if lowering == "reference":
        from calibatt_compiler.kernels.reference.attention import ReferenceAttention

        return ReferenceAttention(pattern)
    if device.type == "cpu":
        from calibatt_compiler.kernels.cpu.attention import NativeCpuAttention

        return NativeCpuAttention(pattern, dtype=dtype, head_dim=head_dim)
    if device.type == "cuda":
        softmax = softmax_for(pattern, softmax)
        serve = _hopper_kernel if hopper and architecture(device) == HOPPER else _cuda_kernel
        return serve(pattern, lowering, device, dtype, head_dim, softmax)
    raise KernelError(
        "there is no block-sparse kernel for this device",
        expected="cpu or cuda",
        got=device.type,
        remedy="use the option lowering='reference', which runs everywhere, slowly",
    )


def _cuda_kernel(
    pattern: BlockPattern,
    lowering: Lowering,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    softmax: Softmax,
) -> BakedAttention | TableAttention:
    if not triton_serves(device, dtype):
        raise KernelError(
            "the Triton kernels don't serve this GPU or dtype",
            expected="an NVIDIA GPU of compute capability 8.0 (Ampere) or newer; float32, bfloat16 "
            "or float16",
            got=f"{torch.cuda.get_device_name(device)}, {dtype}",
            remedy="use the option lowering='reference'",
        )
    where: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "head_dim": head_dim,
        "softmax": softmax,
    }
    if lowering == "table":
        from calibatt_compiler.kernels.portable.attention import TableAttention

        return TableAttention(pattern, **where)
    from calibatt_compiler.kernels.baked.attention import BakedAttention

    return BakedAttention(pattern, **where)


def _hopper_kernel(
    pattern: BlockPattern,
    lowering: Lowering,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    softmax: Softmax,
) -> AttentionKernel:
    """The Hopper kernel, or a portable one that says why."""
    from calibatt_compiler.kernels.hopper.capability import hopper_serves

    where: dict[str, Any] = {"device": device, "dtype": dtype, "head_dim": head_dim}
    reason = hopper_serves(device, dtype, head_dim, pattern)
    if reason is not None:
        portable = _cuda_kernel(pattern, lowering, **where, softmax=softmax)
        portable.reason = portable.reason or f"no Hopper kernel: {reason}"
        return portable
    from calibatt_compiler.kernels.hopper.fallback import WithFallback

    kernel: AttentionKernel
    if lowering == "table":
        from calibatt_compiler.kernels.hopper.attention import HopperAttention

        kernel = HopperAttention(pattern, **where, softmax=softmax)
    else:
        from calibatt_compiler.kernels.baked.attention import BakedAttention

        kernel = BakedAttention(pattern, **where, hopper=True, softmax=softmax)
    return WithFallback(kernel, lambda: _cuda_kernel(pattern, lowering, **where, softmax=softmax))


FIXED_FROM = 8192
"""Keys from which on a fixed softmax reference is asked for. On short sequences the launch of its
repair (61 microseconds of the host, measured beside an H100) outweighs what it saves."""


def softmax_for(pattern: BlockPattern, softmax: Softmax) -> Softmax:
    """The softmax to ask a kernel for: short sequences take the exact one."""
    return "exact" if pattern.key_length < FIXED_FROM else softmax


def triton_serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the portable Triton kernels serve a device and a dtype."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and dtype in CUDA_DTYPES
    )


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Stock SDPA in the layout that block-sparse kernels return.

    Args:
        q: (B, H, Sq, D).
        k: (B, H, Sk, D).
        v: (B, H, Sk, D).
        scale: factor on the scores; default 1 / sqrt(D).

    Returns:
        (B, H, Sq, D), laid out as contiguous (B, Sq, H, D).
    """
    return token_major(F.scaled_dot_product_attention(q, k, v, scale=scale))
