"""Attention by octave zones on Hopper GPUs: one kernel for all steps of a site's step group."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.common.operands import (
    check_operands,
    check_specialisation,
    empty_output,
)
from calibatt_compiler.kernels.common.padding import KeyPadding, refuse_padding
from calibatt_compiler.kernels.common.uploads import Uploaded, to_device
from calibatt_compiler.kernels.common.zone_step import GpuZones
from calibatt_compiler.kernels.common.zone_table import ZoneTable, zone_table
from calibatt_compiler.kernels.hopper.arguments import Draw, Results
from calibatt_compiler.kernels.hopper.capability import operand_reason
from calibatt_compiler.kernels.hopper.kernel import hopper_attention
from calibatt_compiler.kernels.hopper.launch import (
    Tables,
    arguments,
    hopper_config,
    launch_options,
    readable,
)
from calibatt_compiler.kernels.hopper.schedule import TILE_COST, Words, assign
from calibatt_compiler.kernels.portable.launch import on_device
from calibatt_compiler.kernels.portable.tiles import multiprocessors
from calibatt_compiler.kernels.request import KernelRequest
from calibatt_compiler.plan.intervals import sums_before
from calibatt_compiler.plan.zones import ZonePattern
from calibatt_compiler.plan.zones.drawing import UNIT, phase

Order = Literal["starts", "rows"]
"""How the rows of a head follow one another: see `row_order`."""


class HopperZones(GpuZones):
    """Block-sparse attention by zones; see `ZoneKernel`.

    Args:
        request: what to serve, as for `HopperAttention`; the softmax shift comes from each
            row's lead.
        literals: generated function that gives the runs, see `baked.source_zones`; None: they are
            read from a table. Both give the same bits.
        programs: programs to run; default one a multiprocessor.
        order: how rows of a head follow one another.

    Attributes:
        kind: "hopper-zones-baked" with literals, else "hopper-zones".
        pattern: the zones.
        density: expected density over steps.
        reason: None.
        arch: 90.

    Raises:
        KernelError: with the reason why the kernel can't serve (see `operand_reason`).
    """

    reason: str | None = None
    arch = 90
    family = "hopper"

    def __init__(
        self,
        request: KernelRequest[ZonePattern],
        literals: Any = None,
        programs: int | None = None,
        order: Order = "starts",
    ) -> None:
        zones, device = request.pattern, request.device
        reason = operand_reason(request.dtype, request.head_dim, zones)
        if reason is not None:
            raise KernelError(
                "the Hopper kernel can't serve these zones",
                expected="what `operand_reason` allows",
                got=reason,
                remedy="take the portable kernel",
            )
        self.request, self.pattern = request, zones
        self.density = zones.density
        self.config = hopper_config(
            zones, dtype=request.dtype, head_dim=request.head_dim, softmax=request.softmax
        )
        table = zone_table(zones)
        self._edges = (table.left, table.right)
        self.tables = _tables(table, device, programs or multiprocessors(device), order, zones)
        self.literals = literals
        self._repairs = torch.zeros(1, dtype=torch.int32, device=device)

    @property
    def table_bytes(self) -> int:
        """Bytes of its tables."""
        return self.tables.nbytes

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
            padding: refused.

        Returns:
            (B, H, Sq, D), laid out as contiguous (B, Sq, H, D).

        Raises:
            KernelError: the operands don't fit the pattern or this kernel.
        """
        refuse_padding(padding)
        return self.attend(q, k, v, step=step, scale=scale)[0]

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        step: int,
        scale: float | None = None,
        key_lengths: Tensor | None = None,
        return_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, with the log-sum-exp if it is asked for.

        Args:
            q: (B, H, Sq, D).
            k: (B, H, Sk, D).
            v: (B, H, Sk, D).
            step: the diffusion step.
            scale: factor on the scores; default 1 / sqrt(D).
            key_lengths: refused.
            return_lse: also return the log-sum-exp.

        Returns:
            The output as from a plain call; and float32 (B, H, Sq), natural log-sum-exp of the
            scaled scores of each query, log of the weights added, or None.

        Raises:
            KernelError: the operands don't fit the pattern or this kernel, or there are key
                lengths.
        """
        if key_lengths is not None:
            raise KernelError(
                "zones take no key lengths",
                expected="None: within a shorter sequence a row may draw no block at all, and its "
                "lead, whose maximum is the softmax shift, may lie behind the end",
                got=f"lengths {tuple(key_lengths.shape)}",
                remedy="leave key_lengths out, give each batch item its own call with zones of its "
                "length, or take masks without weights",
            )
        check_operands(self.pattern, q, k, v)
        check_specialisation(q, self.request)
        out = empty_output(q)
        lse = q.new_empty(q.shape[:3], dtype=torch.float32) if return_lse else None
        config = self.config.with_outputs(lse=return_lse)
        q, k, v = (readable(tensor) for tensor in (q, k, v))
        # A flag for each call: calls on other streams have theirs, and a graph replays its zero.
        flag = torch.zeros(1, dtype=torch.int32, device=q.device)
        with on_device(q):
            given = arguments(
                (q, k, v, out), self.tables, Results(flag, self._repairs, lse, None),
                block_n=config.block_n, scale=scale,
                draw=Draw(phase(step, self.pattern.seed), *self._edges),
            )  # fmt: skip
            for repair in config.repairs:
                hopper_attention[(self.tables.programs,)](
                    **given,
                    VARIANT=config.variant(repair=repair),
                    # A repair is rare, and its launch need not be compiled for each pattern.
                    LITERALS=None if repair else self.literals,
                    RUNS=0,
                    **launch_options(),
                )
        return out, lse


def row_order(zones: ZonePattern, table: ZoneTable, order: Order) -> npt.NDArray[np.int64]:
    """In which order the rows of each head are taken, int64 (heads, query_blocks).

    "rows": upwards. "starts": within a group of absolute runs by where their sums begin, for rows
    of nearly equal starts keep nearly the same key blocks, at every step: what one program loads
    then serves its neighbours from the L2 cache. Rows of a diagonal group go upwards either way.
    """
    head = np.repeat(np.arange(zones.heads), zones.query_blocks)
    row = np.arange(len(head))
    if order == "rows":
        return row.reshape(zones.heads, -1)
    top, bottom = zones.rows
    block = row % zones.query_blocks
    size = np.repeat(zones.group_rows, zones.query_blocks)
    group = np.where((block >= top) & (block < bottom), (block - top) // size + 1, 0)
    group[block >= bottom] = np.iinfo(np.int32).max
    start = np.where(table.rows[:, 3] < 0, 0, table.rows[:, 1] & UNIT - 1)
    found: npt.NDArray[np.int64] = np.lexsort((row, start, group, head))
    return found.reshape(zones.heads, -1)


def zone_tiles(
    table: ZoneTable, programs: int, order: Order, zones: ZonePattern
) -> tuple[Words, Words]:
    """Deal the rows out to programs, on the host: tiles and starts of `schedule.Schedule`.

    A tile has the words of its row in `table`.
    """
    lists = assign(
        table.units.reshape(-1), zones.heads, programs, tile_cost=TILE_COST * UNIT,
        order=row_order(zones, table, order),
    )  # fmt: skip
    tiles = np.zeros((len(table.rows) + 1, 4), np.int32)
    tiles[:-1] = table.rows[np.concatenate(lists)]
    return tiles, sums_before(np.array([len(part) for part in lists])).astype(np.int32)


def _tables(
    table: ZoneTable, device: torch.device, programs: int, order: Order, zones: ZonePattern
) -> Tables:
    tiles, starts = zone_tiles(table, programs, order, zones)
    put = [to_device(x, device) for x in (tiles, starts, table.runs)]
    found = Tables(put[0], put[1], put[2], None, None, None, Uploaded(device))
    found.uploaded.wait()
    return found
