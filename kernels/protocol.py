"""What every attention kernel is to its callers."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from calibatt_compiler.kernels.common.padding import KeyPadding


class AttentionKernel(Protocol):
    """Block-sparse attention by one pattern.

    Attributes:
        kind: what serves right now, such as "reference", "native-cpu", "triton-table",
            "triton-baked", "hopper-table" or "hopper-baked".
        density: blocks really computed / all blocks; above the pattern's own density where a
            superset covers the pattern.
        reason: why another kernel than the one asked for serves, and will go on to; else None.
        table_bytes: what its index tables take on the operands' device.
        repairs: calls computed again because a fixed softmax shift overflowed; reading it waits
            for the device.
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

    @property
    def repairs(self) -> int:
        """Calls computed again because a fixed softmax shift overflowed."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        padding: KeyPadding | None = None,
    ) -> Tensor:
        """Return the attention output.

        Args:
            q: (B, H, Sq, D), any strides.
            k: (B, H, Sk, D).
            v: (B, H, Sk, D).
            scale: factor on the scores; default 1 / sqrt(D).
            padding: what a mask says of the keys; None: there is none.

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
        padding: KeyPadding | None = None,
    ) -> Tensor:
        """Return the attention output in the order of the operands.

        Args:
            q: (B, H, Sq, D), any strides.
            k: (B, H, Sk, D).
            v: (B, H, Sk, D).
            query_tokens: int32 (Sq), contiguous, on the operands' device: the query that stands
                at each position of the pattern.
            key_tokens: int32 (Sk), the same for keys and values.
            scale: factor on the scores; default 1 / sqrt(D).
            padding: what a mask says of the keys, laid out in the pattern's order.

        Returns:
            (B, H, Sq, D), laid out as contiguous (B, Sq, H, D).

        Raises:
            KernelError: the operands don't fit the pattern or one another.
        """
