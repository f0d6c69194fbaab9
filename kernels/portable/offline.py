"""Compile a Triton kernel for a GPU that this process does not have, by the launch path itself.

Triton's own `warmup` derives signature, alignment attributes and options exactly as a launch does,
so that the launch later finds the entry in Triton's disk cache. It asks a driver which GPU is
current: a stand-in answers. Only for processes that never launch: the driver is process-wide.
"""

from __future__ import annotations

from typing import Any

import torch

from calibatt_compiler.kernels.portable.launch import STRIDES, LaunchConfig, key_sources


class _StandInDriver:
    """Answers the three questions that `JITFunction.run` asks before it compiles."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        # Triton keeps compiled kernels by device number: one number an architecture.
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def take_stand_in_driver(arch: int) -> None:
    """Let Triton compile for `arch` whatever GPU is here, for the rest of the process."""
    from triton.runtime.driver import driver

    driver.set_active(_StandInDriver(arch))


def compile_offline(
    kernel: Any, *, arch: int, dtype: torch.dtype, config: LaunchConfig, extra: dict[str, Any]
) -> Any:
    """Compile `kernel` for `arch` into Triton's disk cache.

    Args:
        kernel: a jit function whose first arguments are q, k, v and o pointers.
        arch: compute capability as one number.
        dtype: of the operands.
        config: compile-time arguments and options.
        extra: the other run-time arguments by name: a torch dtype for a pointer, or a number.

    Returns:
        Triton's compiled kernel: `asm`, `metadata`, `hash`.
    """
    from triton.runtime.jit import MockTensor

    take_stand_in_driver(arch)
    keys: Any = (dtype, dtype)
    if config.descriptors:
        some = torch.empty(1, 1, config.settings.n, int(config.constexprs["HEAD_DIM"]), dtype=dtype)
        keys = key_sources(some, some, config)
    # Batch and head strides are 64-bit by annotation; any small value stands for a token stride.
    strides = dict.fromkeys(STRIDES, 16)
    return kernel.warmup(
        dtype,
        *keys,
        dtype,
        grid=(1, 1),
        **strides,
        scale_log2=1.0,
        **{name: MockTensor.wrap_dtype(value) for name, value in extra.items()},
        **config.constexprs,
        **config.options,
    )


def table_arguments(
    dtype: torch.dtype,
    config: LaunchConfig,
    entry: torch.dtype = torch.int16,
    *,
    weighted: bool = False,
    pooled: int = 0,
    copies: bool = False,
) -> dict[str, Any]:
    """The table kernel's own arguments, for `compile_offline`; `dtype` of the operands."""
    state = None if config.softmax == "exact" else torch.int32
    pointers = {
        "flag_ptr": state,
        "repairs_ptr": state,
        "offsets_ptr": torch.int32,
        "blocks_ptr": entry,
        "weights_ptr": torch.float16,
        "kept_ptr": torch.uint8,
        "pooled_k_ptr": dtype,
        "pooled_v_ptr": dtype,
        "repetitive_ptr": torch.uint8 if copies else None,
        "computed_ptr": torch.int32 if copies else None,
        "targets_ptr": torch.int32 if copies else None,
    }
    names = ("heads", "query_blocks", "length_q", "length_k", "parts", "computed_rows", "slots")
    repair = config.softmax == "repair"
    forms = {"WEIGHTED": weighted, "POOLED": pooled, "COPIES": copies, "REPAIR": repair}
    return pointers | dict.fromkeys(names, 16) | forms


def zone_arguments(config: LaunchConfig, literals: Any = None) -> dict[str, Any]:
    """The arguments of the kernel of zones, for `compile_offline`."""
    from calibatt_compiler.kernels.portable.zones import RUN_TIME_SIZES

    state = None if config.softmax == "exact" else torch.int32
    pointers = {"flag_ptr": state, "repairs_ptr": state}
    tables = {"rows_ptr": torch.int32, "runs_ptr": torch.int32}
    forms = {"REPAIR": config.softmax == "repair", "LITERALS": literals}
    return pointers | tables | dict.fromkeys(RUN_TIME_SIZES, 16) | forms


def baked_arguments(config: LaunchConfig, *, copies: bool) -> dict[str, Any]:
    """A generated kernel's own run-time arguments, for `compile_offline`."""
    tables = {"computed_ptr": torch.int32, "targets_ptr": torch.int32} if copies else {}
    return {"flag_ptr": None if config.softmax == "exact" else torch.int32, **tables}
