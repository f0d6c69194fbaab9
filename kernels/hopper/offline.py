"""Compile the Hopper kernel without a Hopper GPU, by the launch path itself; see `offline`."""

from __future__ import annotations

from typing import Any

import torch

from calibatt_compiler.kernels.hopper.arguments import (
    Draw,
    Results,
    RowPointers,
    RowSizes,
    Sizes,
    TileTables,
)
from calibatt_compiler.kernels.hopper.launch import (
    COUNT_TILES,
    QUERY_ROWS,
    HopperConfig,
    descriptor,
    launch_options,
)
from calibatt_compiler.kernels.portable.offline import take_stand_in_driver

ARCH = 90


def compile_hopper(
    config: HopperConfig, *, repair: bool = False, literals: Any = None, runs: int = 0
) -> Any:
    """Compile `hopper_attention` into Triton's disk cache.

    Args:
        config: what it is specialised on.
        repair: the repair launch rather than the main one.
        literals: generated function that gives the key blocks, or None for tables.
        runs: intervals that it gives.

    Returns:
        Triton's compiled kernel: `asm`, `metadata`, `hash`.
    """
    from triton.runtime.jit import MockTensor

    from calibatt_compiler.kernels.hopper.kernel import hopper_attention

    take_stand_in_driver(ARCH)

    def pointer(dtype: torch.dtype, needed: bool = True) -> Any:
        return MockTensor.wrap_dtype(dtype) if needed else None

    operand = torch.zeros(1, 1, 1, config.head_dim, dtype=config.dtype)
    i32 = pointer(torch.int32)
    tables = TileTables(
        *(i32, i32, i32),
        codes_ptr=pointer(torch.uint8, config.weighted),
        code_starts_ptr=pointer(torch.int32, config.weighted),
        counts_ptr=pointer(torch.int32, config.lengths),
        lengths_ptr=pointer(torch.int32, config.lengths),
    )
    results = Results(
        *(i32, i32), pointer(torch.float32, config.lse), pointer(torch.float32, config.energy)
    )
    rows = RowPointers(
        *(pointer(config.dtype, config.copies), pointer(config.dtype, config.copies)),
        *(pointer(torch.int32, config.copies), pointer(torch.int32, config.copies)),
    )
    return hopper_attention.warmup(
        q_desc=descriptor(operand, QUERY_ROWS),
        k_desc=descriptor(operand, config.block_n),
        v_desc=descriptor(operand, config.block_n),
        o_desc=descriptor(operand, QUERY_ROWS),
        tables=tables,
        results=results,
        rows=rows,
        scale_log2=1.0,
        **dict.fromkeys(Sizes._fields, 16),
        **dict.fromkeys(RowSizes._fields, 16 if config.copies else None),
        **dict.fromkeys(Draw._fields, 16 if config.zones else None),
        VARIANT=config.variant(repair=repair),
        LITERALS=literals,
        RUNS=runs,
        grid=(1,),
        **launch_options(),
    )


def compile_counts(block_n: int, *, copies: bool = False) -> Any:
    """Compile `hopper_counts`; see `compile_hopper`."""
    from triton.runtime.jit import MockTensor

    from calibatt_compiler.kernels.hopper.kernel import hopper_counts

    take_stand_in_driver(ARCH)
    i32 = MockTensor.wrap_dtype(torch.int32)
    return hopper_counts.warmup(
        *(i32, i32, i32, i32, 16, 16), BLOCK_N=block_n, TILES=COUNT_TILES, COPIES=copies,
        num_warps=4, grid=(1, 1),
    )  # fmt: skip
