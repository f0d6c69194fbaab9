"""Compile the Hopper kernel without a Hopper GPU, by the launch path itself; see `offline`."""

from __future__ import annotations

from typing import Any

import torch

from calibatt_compiler.kernels.hopper.launch import (
    COUNT_TILES,
    QUERY_ROWS,
    ZONE_SIZES,
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

    from calibatt_compiler.kernels.hopper.kernel import COPY_SIZES, RUN_TIME_SIZES, hopper_attention

    take_stand_in_driver(ARCH)

    def pointer(dtype: torch.dtype, needed: bool = True) -> Any:
        return MockTensor.wrap_dtype(dtype) if needed else None

    operand = torch.zeros(1, 1, 1, config.head_dim, dtype=config.dtype)
    i32 = pointer(torch.int32)
    return hopper_attention.warmup(
        q_desc=descriptor(operand, QUERY_ROWS),
        k_desc=descriptor(operand, config.block_n),
        v_desc=descriptor(operand, config.block_n),
        o_desc=descriptor(operand, QUERY_ROWS),
        tiles_ptr=i32,
        starts_ptr=i32,
        runs_ptr=i32,
        counts_ptr=pointer(torch.int32, config.lengths),
        lengths_ptr=pointer(torch.int32, config.lengths),
        codes_ptr=pointer(torch.uint8, config.weighted),
        code_starts_ptr=pointer(torch.int32, config.weighted),
        lse_ptr=pointer(torch.float32, config.lse),
        flag_ptr=i32,
        repairs_ptr=i32,
        sums_ptr=pointer(torch.float32, config.energy),
        scale_log2=1.0,
        **dict.fromkeys(RUN_TIME_SIZES, 16),
        q_ptr=pointer(config.dtype, config.copies),
        o_ptr=pointer(config.dtype, config.copies),
        computed_ptr=pointer(torch.int32, config.copies),
        targets_ptr=pointer(torch.int32, config.copies),
        **dict.fromkeys(COPY_SIZES, 16 if config.copies else None),
        **dict.fromkeys(ZONE_SIZES, 16 if config.zones else None),
        **config.constexprs(repair=repair),
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
