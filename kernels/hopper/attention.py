"""Block-sparse attention on Hopper GPUs, served by tables; `HopperAttention` is the way in.

How it works, and what each part is worth: docs/hopper.md. Its figures: `benchmarks/RESULTS.md`.
"""

from __future__ import annotations

from typing import Any

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
from calibatt_compiler.kernels.common.row_copies import DeviceCopies
from calibatt_compiler.kernels.common.uploads import DeviceTableCache, Uploaded, to_device
from calibatt_compiler.kernels.hopper.arguments import Results, TileTables
from calibatt_compiler.kernels.hopper.capability import operand_reason
from calibatt_compiler.kernels.hopper.kernel import hopper_attention, hopper_counts
from calibatt_compiler.kernels.hopper.launch import (
    COUNT_TILES,
    HopperConfig,
    Tables,
    arguments,
    hopper_config,
    launch_options,
    readable,
)
from calibatt_compiler.kernels.hopper.schedule import block_codes, key_runs, make_schedule
from calibatt_compiler.kernels.portable.launch import on_device
from calibatt_compiler.kernels.portable.tiles import multiprocessors
from calibatt_compiler.kernels.request import KernelRequest
from calibatt_compiler.plan.pattern import BlockPattern

_tables: DeviceTableCache[Tables] = DeviceTableCache()


class HopperAttention:
    """Block-sparse attention by the Hopper kernel, one launch a call whatever its heads do.

    Args:
        request: what to serve: bfloat16 or float16, head dim 64 or 128. softmax "fixed": the first
            block's row maximum is the reference of the softmax, and where that overflows a second
            launch repairs the result; "exact": online softmax; "auto": fixed for bfloat16. float16
            lacks the range that a fixed shift needs.
        first_blocks: int (heads, query_blocks), the key block that each row starts at, if kept;
            default: the diagonal.
        programs: programs to run; default one a multiprocessor.

    Attributes:
        kind: "hopper-table".
        density: the pattern's own density: nothing else is computed.
        reason: None: it is what was asked for.
        arch: 90.

    Raises:
        KernelError: with the reason why the kernel can't serve such operands.
    """

    kind = "hopper-table"
    reason: str | None = None
    arch = 90

    def __init__(
        self,
        request: KernelRequest[BlockPattern],
        first_blocks: npt.NDArray[np.int64] | None = None,
        programs: int | None = None,
    ) -> None:
        pattern, device, dtype = request.pattern, request.device, request.dtype
        reason = operand_reason(dtype, request.head_dim, pattern)
        if reason is not None:
            raise KernelError(
                "the Hopper kernel can't serve this call",
                expected="what `operand_reason` allows",
                got=reason,
                remedy="take the portable kernel, with hopper=False",
            )
        self.request, self.pattern = request, pattern
        self.density = pattern.density
        self.config = hopper_config(
            pattern, dtype=dtype, head_dim=request.head_dim, softmax=request.softmax
        )
        self.tables = shared_tables(
            pattern,
            device,
            programs or multiprocessors(device),
            first_blocks,
            literals=self._indices()["LITERALS"] is not None,
        )
        self._repairs = torch.zeros(1, dtype=torch.int32, device=device)
        self._rows: tuple[Tensor, ...] | None = None

    @property
    def table_bytes(self) -> int:
        """Bytes of its tables, shared or not."""
        return self.tables.nbytes

    @property
    def repairs(self) -> int:
        """Calls whose fixed softmax shift failed, and that were computed again.

        Reading it waits for the device.
        """
        return int(self._repairs.item())

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
            padding: refused; of a padded tail `attend` takes the key lengths.

        Returns:
            (B, H, Sq, D), laid out as contiguous (B, Sq, H, D).

        Raises:
            KernelError: the operands don't fit the pattern or this kernel.
        """
        refuse_padding(padding)
        return self.attend(q, k, v, scale=scale)[0]

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        key_lengths: Tensor | None = None,
        return_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, with what SDPA does not offer.

        Args:
            q: (B, H, Sq, D).
            k: (B, H, Sk, D).
            v: (B, H, Sk, D).
            scale: factor on the scores; default 1 / sqrt(D).
            key_lengths: integer (B), the keys of each batch item that count, the first ones; on
                the device, never read by the host. A query without any gets zeros.
            return_lse: also return the log-sum-exp.

        Returns:
            The output as from a plain call; and float32 (B, H, Sq), natural log-sum-exp of the
            scaled scores of each query, or None.

        Raises:
            KernelError: the operands don't fit the pattern or this kernel.
        """
        out = empty_output(q)
        lse = q.new_empty(q.shape[:3], dtype=torch.float32) if return_lse else None
        self.write((q, k, v, out), scale=scale, key_lengths=key_lengths, lse=lse)
        return out, None if lse is None else self._spread(lse)

    def write(
        self,
        operands: tuple[Tensor, Tensor, Tensor, Tensor],
        *,
        scale: float | None = None,
        key_lengths: Tensor | None = None,
        lse: Tensor | None = None,
        sums: Tensor | None = None,
    ) -> None:
        """Attend into given tensors.

        Args:
            operands: q, k, v of a plain call, and the output (B, H, Sq, D), readable by TMA.
            scale: factor on the scores; default 1 / sqrt(D).
            key_lengths: as for `attend`.
            lse: float32 (B, H, Sq), contiguous, or None; of a row-shared head row by row.
            sums: float32 (B, H, query_blocks, key_blocks | 1, 128), contiguous, or None;
                for a pattern that keeps every block: see `kernel.hopper_attention`.

        Raises:
            KernelError: the operands don't fit the pattern or this kernel.
        """
        q, k, v, out = operands
        check_operands(self.pattern, q, k, v)
        check_specialisation(q, self.request)
        config = self.config.with_outputs(
            lse=lse is not None, lengths=key_lengths is not None, energy=sums is not None
        )
        q, k, v = (readable(tensor) for tensor in (q, k, v))
        # A flag for each call: calls on other streams have theirs, and a graph replays its zero.
        flag = torch.zeros(1, dtype=torch.int32, device=q.device)
        with on_device(q):
            lengths, counts = self._counts(key_lengths, q.shape[0])
            given = arguments(
                (q, k, v, out), self.tables, Results(flag, self._repairs, lse, sums),
                block_n=config.block_n, scale=scale, lengths=lengths, counts=counts,
            )  # fmt: skip
            self._launch(config, given)

    def _spread(self, lse: Tensor) -> Tensor:
        """Give each token of a row-shared head the log-sum-exp of the row that it takes.

        The kernel has written it row by row. Not worth a place in the kernel: one number a row.
        """
        pattern = self.pattern
        if pattern.copies is None or pattern.repetitive is None:
            return lse
        if self._rows is None:
            sources = pattern.copies.sources(pattern.query_length).astype(np.int64)
            both = (np.flatnonzero(pattern.repetitive), sources)
            self._rows = tuple(torch.from_numpy(index).to(lse.device) for index in both)
        heads, rows = self._rows
        return lse.index_copy(1, heads, lse[:, heads][:, :, rows])

    def _launch(self, config: HopperConfig, given: dict[str, object]) -> None:
        self._run(config, given, repair=False)
        if config.fixed:
            self.repair(config, given)

    def repair(self, config: HopperConfig, given: dict[str, object]) -> None:
        """Launch the exact form, which ends at once unless the call before raised its flag.

        Args:
            config: of that call.
            given: its arguments, of this kernel or of one of the same pattern and programs.
        """
        shared = given["tables"]
        assert isinstance(shared, TileTables)
        own = self.tables.arguments(shared.counts_ptr, shared.lengths_ptr)
        self._run(config, {**given, "tables": own}, repair=True)

    def _run(self, config: HopperConfig, given: dict[str, object], *, repair: bool) -> None:
        hopper_attention[(self.tables.programs,)](
            **given, VARIANT=config.variant(repair=repair), **self._indices(), **launch_options()
        )

    def _indices(self) -> dict[str, Any]:
        """Compile-time arguments that say where the key blocks come from: here, the tables."""
        return {"LITERALS": None, "RUNS": 0}

    def _counts(self, key_lengths: Tensor | None, batch: int) -> tuple[Tensor | None, ...]:
        if key_lengths is None:
            return None, None
        literal = self._indices()["LITERALS"] is not None
        if self.config.weighted or literal or key_lengths.shape != (batch,):
            raise KernelError(
                "these key lengths can't be served",
                expected=f"integer ({batch},), a pattern without weights, and tables",
                got=f"{tuple(key_lengths.shape)}, weights: {self.config.weighted}, "
                f"literals: {literal}",
                remedy="give one length for each batch item; take HopperAttention itself",
            )
        lengths = key_lengths.to(self.request.device, torch.int32).clamp(0, self.pattern.key_length)
        tiles = self.tables.count
        counts = torch.empty(batch + 1, tiles, dtype=torch.int32, device=self.request.device)
        hopper_counts[(-(-tiles // COUNT_TILES), batch + 1)](
            self.tables.tiles, self.tables.runs, lengths, counts, tiles, batch,
            BLOCK_N=self.pattern.block_n, TILES=COUNT_TILES, COPIES=self.config.copies, num_warps=4,
        )  # fmt: skip
        return lengths, counts


def shared_tables(
    pattern: BlockPattern,
    device: torch.device,
    programs: int,
    first_blocks: npt.NDArray[np.int64] | None,
    *,
    literals: bool = False,
) -> Tables:
    """Tables of `pattern` on `device`, shared by the kernels of equal patterns while one lives."""

    def make() -> Tables:
        runs = key_runs(pattern, first_blocks)
        made = make_schedule(pattern, runs, programs, literals=literals)
        copies = DeviceCopies.upload(pattern, device, whole=pattern.block_m)
        put = [to_device(x, device) for x in (made.tiles, made.starts, made.runs)]
        weights = block_codes(pattern, runs, made)
        codes, starts = (None if x is None else to_device(x, device) for x in weights)
        return Tables(put[0], put[1], put[2], codes, starts, copies, Uploaded(device))

    if first_blocks is not None:
        return make()
    return _tables.get((pattern.digest, str(device), programs, literals), make)
