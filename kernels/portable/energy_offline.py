"""Compile the kernels of block energies for a GPU that this process does not have."""

from __future__ import annotations

from typing import Any, Literal

import torch

from calibatt_compiler.kernels.portable.energy_parts import energy_launch
from calibatt_compiler.kernels.portable.launch import STRIDES
from calibatt_compiler.kernels.portable.offline import take_stand_in_driver
from calibatt_compiler.kernels.portable.tiles import TileSettings

EnergyKernel = Literal["fused", "one pass", "two passes"]


def compile_energy(
    kernel: EnergyKernel,
    *,
    arch: int,
    dtype: torch.dtype,
    head_dim: int,
    block: tuple[int, int] = (128, 128),
    settings: TileSettings | None = None,
) -> Any:
    """Compile for ragged queries and keys; only for processes that never launch.

    Args:
        kernel: with the output, or energies with a log-sum-exp that is given, or without.
        arch: compute capability as one number.
        dtype: of the operands.
        head_dim: elements a head.
        block: tokens a query block, tokens a key block.
        settings: tiles to use instead of the architecture's own.

    Returns:
        Triton's compiled kernel: `asm`, `metadata`.

    Raises:
        KernelError: dtype or head dim that no portable kernel takes.
    """
    from calibatt_compiler.kernels.portable import energy_fused as triton_fused_energy
    from calibatt_compiler.kernels.portable import energy_scores as triton_energy

    take_stand_in_driver(arch)
    length = 8 * block[1] - 7
    q = torch.empty(1, 1, length, head_dim, dtype=dtype, device="meta")
    config, _ = energy_launch(
        q, q, block, with_output=kernel == "fused", settings=settings, arch=arch
    )
    # Sizes are not specialised: any value stands for all.
    sizes = dict.fromkeys(("heads", "length_q", "length_k", "groups"), 16)
    common = {"scale_log2": 1.0, **sizes, **config.constexprs, **config.options}
    sums = torch.float32
    if kernel == "fused":
        strides = dict.fromkeys(STRIDES, 16)
        own = {"first_item": 16, "key_blocks": 16, "CHUNK": triton_fused_energy.CHUNK}
        pointers = (dtype, dtype, dtype, dtype, sums, sums)
        return triton_fused_energy.attention_and_energy.warmup(
            *pointers, grid=(1,), **strides, **own, **common
        )
    strides = dict.fromkeys(triton_energy.STRIDES, 16)
    return triton_energy.energy_tile.warmup(
        dtype, dtype, sums, sums, grid=(1, 1), **strides, key_tiles=16,
        HAS_LSE=kernel == "one pass", **common,
    )  # fmt: skip
