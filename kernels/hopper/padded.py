"""The Hopper kernel for calls with a mask over keys, where that is expected to cut a tail."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from calibatt_compiler.kernels.common.padding import TAIL, KeyPadding
from calibatt_compiler.kernels.hopper.attention import HopperAttention
from calibatt_compiler.kernels.portable.attention import TableAttention
from calibatt_compiler.kernels.request import KernelRequest
from calibatt_compiler.plan.pattern import BlockPattern


class HopperTails:
    """Block-sparse attention with a number of valid keys for each sample.

    Whether a mask cuts nothing but a tail is known on the device alone. Where it cuts more, the
    Hopper kernel has no keys to attend, and the portable one, which else ends at once, computes the
    call. The host waits for neither.

    Args:
        request: what to serve: a mask of blocks, without weights.

    Attributes:
        kind: "hopper-table".
        density: the pattern's own density.

    Raises:
        KernelError: with the reason why the Hopper kernel can't serve such operands.
    """

    kind = "hopper-table"
    reason: str | None = None

    def __init__(self, request: KernelRequest[BlockPattern]) -> None:
        self.tails = HopperAttention(request)
        self.others = TableAttention(replace(request, hopper=False))
        self.density = self.tails.density

    @property
    def table_bytes(self) -> int:
        """Bytes of the tables of both."""
        return self.tails.table_bytes + self.others.table_bytes

    @property
    def repairs(self) -> int:
        """Calls computed again: by a softmax shift that failed, or a mask that cut no tail.

        Reading it waits for the device.
        """
        return self.tails.repairs + self.others.repairs

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        padding: KeyPadding | None = None,
    ) -> Tensor:
        """Attend; see `ReferenceAttention` for the meaning.

        Args:
            q: (B, H, Sq, D); strides other than unit along D, or not 16-byte aligned, cost a copy.
            k: (B, H, Sk, D).
            v: (B, H, Sk, D).
            scale: factor on the scores; default 1 / sqrt(D).
            padding: what a mask says of the keys; None: there is none.

        Returns:
            (B, H, Sq, D), laid out as contiguous (B, Sq, H, D).

        Raises:
            KernelError: the operands don't fit the pattern or this kernel.
        """
        if padding is None:
            return self.tails(q, k, v, scale=scale)
        padding.check(q.shape[0], k.shape[2])
        counts = padding.bounds[:, TAIL]
        other = (counts < 0).any()
        lengths = counts.masked_fill(other, 0).expand(q.shape[0]).contiguous()
        out, _ = self.tails.attend(q, k, v, scale=scale, key_lengths=lengths)
        flag = other.to(torch.int32).reshape(1)
        self.others.compute_if(flag, (q, k, v, out), scale=scale, padding=padding)
        return padding.clear_rows(out)
