"""Attention that reads the kept key blocks from a table on the device.

It never compiles per plan: lengths, heads and tables are run-time arguments. So it serves a site
until the same kernel with that site's literals in the place of the table is compiled, and
recomputes the calls of either whose fixed softmax shift overflowed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from calibatt_compiler.kernels.common.operands import (
    check_operands,
    check_specialisation,
    empty_output,
)
from calibatt_compiler.kernels.common.padding import KeyPadding
from calibatt_compiler.kernels.common.pooling import pool
from calibatt_compiler.kernels.common.row_copies import DeviceCopies
from calibatt_compiler.kernels.portable.index_tables import index_tables
from calibatt_compiler.kernels.portable.kernel import portable_attention
from calibatt_compiler.kernels.portable.launch import (
    DeviceKernel,
    LaunchConfig,
    aligned,
    call_arguments,
    grid,
    key_sources,
    on_device,
    padding_arguments,
)
from calibatt_compiler.kernels.portable.tiles import TileSettings
from calibatt_compiler.kernels.request import KernelRequest
from calibatt_compiler.plan.pattern import BlockPattern


class TableAttention(DeviceKernel):
    """Block-sparse attention by the table kernel.

    Attributes:
        kind: "triton-table".
        density: the pattern's own density, and the pooled keys as part of it.

    Raises:
        KernelError: dtype or head dim that no portable kernel takes.
    """

    kind = "triton-table"

    def __init__(
        self, request: KernelRequest[BlockPattern], settings: TileSettings | None = None
    ) -> None:
        super().__init__(request, settings)
        self.density = self.pattern.computed_density
        self.tables = index_tables(self.pattern, request.device)
        self.copies = DeviceCopies.upload(self.pattern, request.device)
        fixed = self.config.softmax == "fixed"
        self._repairs = torch.zeros(1, dtype=torch.int32, device=request.device) if fixed else None

    @property
    def table_bytes(self) -> int:
        """Bytes of its tables, shared or not."""
        return self.tables.nbytes + (0 if self.copies is None else self.copies.nbytes)

    @property
    def repairs(self) -> int:
        """Calls whose fixed softmax shift failed, and that were computed again.

        Reading it waits for the device.
        """
        return 0 if self._repairs is None else int(self._repairs.item())

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
        check_operands(self.pattern, q, k, v, padding)
        check_specialisation(q, self.request)
        q, k, v = (aligned(tensor, self.config) for tensor in (q, k, v))
        out = empty_output(q)
        q, arguments = call_arguments(q, k, v, out, scale, self.config)
        arguments |= padding_arguments(padding)
        with on_device(q):
            flag = self.flag()
            self._launch((q, k, v, out), flag, arguments, self.config)
            if flag is not None:
                self.repair((q, k, v, out), flag, arguments)
        return out if padding is None else padding.clear_rows(out)

    def repair(
        self,
        operands: tuple[Tensor, Tensor, Tensor, Tensor],
        flag: Tensor,
        arguments: dict[str, Any],
    ) -> None:
        """Compute a call again by the running maximum if its flag is set; the host never knows.

        Args:
            operands: q, k, v as they were launched, and the output.
            flag: from `flag`, which that launch may have set.
            arguments: from `call_arguments`.
        """
        self._launch(operands, flag, arguments, self.config.repair())

    def compute_if(
        self,
        flag: Tensor,
        operands: tuple[Tensor, Tensor, Tensor, Tensor],
        *,
        scale: float | None = None,
        padding: KeyPadding | None = None,
    ) -> None:
        """Compute a call where a flag on the device is set; it is counted as computed again.

        Args:
            flag: int32 (1), which the host never reads.
            operands: q, k, v, checked, and the output, of the layout that a call returns.
            scale: as in a call.
            padding: as in a call; rows that it cuts are not cleared.
        """
        if self._repairs is None:
            self._repairs = torch.zeros(1, dtype=torch.int32, device=flag.device)
        q, k, v = (aligned(tensor, self.config) for tensor in operands[:3])
        q, arguments = call_arguments(q, k, v, operands[3], scale, self.config)
        arguments |= padding_arguments(padding)
        with on_device(q):
            self.repair((q, k, v, operands[3]), flag, arguments)

    def _launch(
        self,
        operands: tuple[Tensor, Tensor, Tensor, Tensor],
        flag: Tensor | None,
        arguments: dict[str, Any],
        config: LaunchConfig,
    ) -> None:
        pattern = self.pattern
        q, k, v, out = operands
        more = {} if self.copies is None else {"COPIES": True, **self.copies.arguments()}
        if pattern.pooled:
            more |= {"POOLED": pattern.pooled, "parts": pattern.key_blocks * pattern.pooled}
            more |= {"pooled_k_ptr": pool(k, pattern), "pooled_v_ptr": pool(v, pattern)}
        if config.softmax != "repair":
            # Recomputing is rare, and its launch need not be compiled for each pattern.
            more |= self._indices()
        portable_attention[grid(pattern, config, q.shape[0])](
            q,
            *key_sources(k, v, config),
            out,
            flag,
            self._repairs,
            **arguments,
            heads=pattern.heads,
            query_blocks=pattern.query_blocks,
            length_q=pattern.query_length,
            length_k=pattern.key_length,
            **self.tables.arguments(),
            WEIGHTED=pattern.weights is not None,
            REPAIR=config.softmax == "repair",
            **more,
            **config.constexprs,
            **config.options,
        )

    def _indices(self) -> dict[str, Any]:
        """Arguments that say where the key blocks come from in place of the table: none."""
        return {}
