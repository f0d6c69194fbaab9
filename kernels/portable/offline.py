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
    *, arch: int, dtype: torch.dtype, config: LaunchConfig, extra: dict[str, Any]
) -> Any:
    """Compile `portable_attention` for `arch` into Triton's disk cache.

    Args:
        arch: compute capability as one number.
        dtype: of the operands.
        config: compile-time arguments and options.
        extra: the other run-time arguments by name: a torch dtype for a pointer, or a number.

    Returns:
        Triton's compiled kernel: `asm`, `metadata`, `hash`.
    """
    from triton.runtime.jit import MockTensor

    from calibatt_compiler.kernels.portable.kernel import portable_attention

    take_stand_in_driver(arch)
    keys: Any = (dtype, dtype)
    if config.descriptors:
        some = torch.empty(1, 1, config.settings.n, int(config.constexprs["HEAD_DIM"]), dtype=dtype)
        keys = key_sources(some, some, config)
    # Batch and head strides are 64-bit by annotation; any small value stands for a token stride.
    strides = dict.fromkeys(STRIDES, 16)
    return portable_attention.warmup(
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


PADDING = {
    "bias_ptr": torch.float32, "bounds_ptr": torch.int32, "bias_stride": 16, "bounds_stride": 16,
    "PADDED": True, "PADDED_ROWS": True,
}  # fmt: skip
"""Arguments of a mask over keys."""


def table_arguments(
    dtype: torch.dtype,
    config: LaunchConfig,
    entry: torch.dtype = torch.int16,
    *,
    weighted: bool = False,
    pooled: int = 0,
    copies: bool = False,
    literals: Any = None,
    runs: int = 0,
    padded: bool = False,
) -> dict[str, Any]:
    """Arguments of `portable_attention` for a mask, for `compile_offline`.

    Args:
        dtype: of the operands.
        config: of the launch.
        entry: of the table's entries.
        weighted: blocks have weights.
        pooled: pooled keys a block.
        copies: some heads are row-shared.
        literals: generated function that gives the key blocks, or None for the table.
        runs: intervals that it gives.
        padded: calls have a mask over keys.
    """
    more: dict[str, Any] = {"WEIGHTED": weighted, "POOLED": pooled, "COPIES": copies}
    more |= {"offsets_ptr": torch.int32, "blocks_ptr": entry}
    more |= {"weights_ptr": torch.float16, "kept_ptr": torch.uint8}
    if pooled:
        more |= {"pooled_k_ptr": dtype, "pooled_v_ptr": dtype, "parts": 16}
    if copies:
        more |= {"repetitive_ptr": torch.uint8, "computed_ptr": torch.int32}
        more |= {"targets_ptr": torch.int32, "computed_rows": 16, "slots": 16}
    if literals is not None:
        more |= {"LITERALS": literals, "RUNS": runs}
    return _common(config) | more | (PADDING if padded else {})


def zone_arguments(
    config: LaunchConfig, literals: Any = None, *, padded: bool = False
) -> dict[str, Any]:
    """Arguments of `portable_attention` for zones, for `compile_offline`."""
    more: dict[str, Any] = {"ZONES": True, "LITERALS": literals}
    more |= {"rows_ptr": torch.int32, "runs_ptr": torch.int32}
    more |= PADDING if padded else {}
    return _common(config) | dict.fromkeys(("draw_phase", "left", "right"), 16) | more


def _common(config: LaunchConfig) -> dict[str, Any]:
    state = None if config.softmax == "exact" else torch.int32
    sizes = dict.fromkeys(("heads", "query_blocks", "length_q", "length_k"), 16)
    repair = config.softmax == "repair"
    return {"flag_ptr": state, "repairs_ptr": state, **sizes, "REPAIR": repair}
