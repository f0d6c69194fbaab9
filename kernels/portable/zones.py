"""Attention by octave zones on any NVIDIA GPU: one kernel for all steps of a site's step group."""

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
from calibatt_compiler.kernels.common.uploads import Uploaded, to_device
from calibatt_compiler.kernels.common.zone_step import GpuZones
from calibatt_compiler.kernels.common.zone_table import zone_table
from calibatt_compiler.kernels.portable.kernel import portable_attention
from calibatt_compiler.kernels.portable.launch import (
    DeviceKernel,
    aligned,
    call_arguments,
    grid,
    key_sources,
    on_device,
    padding_arguments,
)
from calibatt_compiler.kernels.portable.tiles import TileSettings
from calibatt_compiler.kernels.request import KernelRequest
from calibatt_compiler.plan.zones import ZonePattern
from calibatt_compiler.plan.zones.drawing import phase


class ZoneAttention(GpuZones, DeviceKernel):
    """Block-sparse attention by zones; see `ZoneKernel`.

    Args:
        request: what to serve; a fixed softmax shift comes from each row's lead.
        settings: tiles to use instead of the architecture's own.
        literals: generated function that gives the runs, see `baked.source_zones`; None: they are
            read from a table. Both give the same bits.

    Attributes:
        kind: "triton-zones-baked" with literals, else "triton-zones".
        density: expected density over steps.

    Raises:
        KernelError: dtype or head dim that no portable kernel takes, or too many blocks.
    """

    pattern: ZonePattern

    family = "triton"

    def __init__(
        self,
        request: KernelRequest[ZonePattern],
        settings: TileSettings | None = None,
        literals: Any = None,
    ) -> None:
        super().__init__(request, settings)
        zones, device = request.pattern, request.device
        self.density = zones.density
        table = zone_table(zones)
        self._rows, self._runs = (to_device(x, device) for x in (table.rows, table.runs))
        self._edges = {"left": table.left, "right": table.right}
        self.literals = literals
        self._repairs = torch.zeros(1, dtype=torch.int32, device=device)
        Uploaded(device).wait()

    @property
    def table_bytes(self) -> int:
        """Bytes of its tables."""
        return self._rows.nbytes + self._runs.nbytes

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        step: int,
        scale: float | None = None,
        padding: KeyPadding | None = None,
    ) -> Tensor:
        """Attend what the zones keep at a step; see `ReferenceAttention` for the meaning.

        Args:
            q: (B, H, Sq, D); strides other than unit along D, or not 16-byte aligned, cost a copy.
            k: (B, H, Sk, D).
            v: (B, H, Sk, D).
            step: the diffusion step.
            scale: factor on the scores; default 1 / sqrt(D).
            padding: what a mask says of the keys; None: there is none.

        Returns:
            (B, H, Sq, D), laid out as contiguous (B, Sq, H, D).

        Raises:
            KernelError: the operands don't fit the pattern or this kernel.
        """
        zones = self.pattern
        check_operands(zones, q, k, v, padding)
        check_specialisation(q, self.request)
        q, k, v = (aligned(tensor, self.config) for tensor in (q, k, v))
        out = empty_output(q)
        q, arguments = call_arguments(q, k, v, out, scale, self.config)
        arguments |= padding_arguments(padding)
        with on_device(q):
            flag = self.flag()
            for config in (self.config, *([] if flag is None else [self.config.repair()])):
                repair = config.softmax == "repair"
                portable_attention[grid(zones, config, q.shape[0])](
                    q,
                    *key_sources(k, v, config),
                    out,
                    flag,
                    None if flag is None else self._repairs,
                    rows_ptr=self._rows,
                    runs_ptr=self._runs,
                    **arguments,
                    heads=zones.heads,
                    query_blocks=zones.query_blocks,
                    length_q=zones.query_length,
                    length_k=zones.key_length,
                    draw_phase=phase(step, zones.seed),
                    **self._edges,
                    ZONES=True,
                    REPAIR=repair,
                    # Recomputing is rare, and its launch need not be compiled for each pattern.
                    LITERALS=None if repair else self.literals,
                    **config.constexprs,
                    **config.options,
                )
        return out if padding is None else padding.clear_rows(out)
