"""Tile sizes, warps and pipeline stages of the portable kernels: one small table per architecture.

A kernel tile divides a pattern's block, so that a kept block is a whole number of tiles. The table
holds upper limits; the tile is the largest power of two that divides the block and stays below.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from calibatt_compiler.errors import KernelError
from calibatt_compiler.plan.zones import ZonePattern

if TYPE_CHECKING:
    import torch

    from calibatt_compiler.plan.pattern import BlockPattern

MAX_HEAD_DIM = 256

HOPPER = 90
"""Compute capability of Hopper GPUs, as one number."""


@dataclass(frozen=True)
class TileSettings:
    """How one kernel is tiled and launched.

    Attributes:
        m: queries a program.
        n: keys an iteration.
        warps: warps a program.
        stages: software pipeline stages of the key and value loads.
        registers: most registers a thread may take; None leaves it to the compiler.
        descriptors: keys and values are loaded by TMA (sm_90 and newer).
    """

    m: int
    n: int
    warps: int
    stages: int
    registers: int | None = None
    descriptors: bool = False


# (largest head dim, limits), smallest first; chosen so that nothing spills and shared memory fits.
_HALF_PRECISION: dict[str, tuple[tuple[int, TileSettings], ...]] = {
    # 164 KB of shared memory, mma.sync.
    "sm_80": (
        (64, TileSettings(128, 64, 4, 3)),
        (128, TileSettings(128, 64, 8, 3)),
        (256, TileSettings(64, 32, 4, 2)),
    ),
    # 100 KB of shared memory: sm_86, sm_89, sm_120.
    "small": (
        (64, TileSettings(128, 32, 4, 2)),
        (128, TileSettings(128, 32, 8, 2)),
        (256, TileSettings(64, 32, 4, 2)),
    ),
    # 228 KB, wgmma: two warpgroups for D = 128, where one would spill.
    "sm_90": (
        (64, TileSettings(128, 64, 4, 3)),
        (128, TileSettings(128, 64, 8, 3)),
        (256, TileSettings(64, 32, 4, 2)),
    ),
    # 228 KB, tcgen05 with accumulators in tensor memory.
    "sm_100": (
        (64, TileSettings(128, 64, 4, 3)),
        (128, TileSettings(128, 64, 8, 3)),
        (256, TileSettings(64, 32, 4, 2)),
    ),
}
# Attention alone, without weights and pooled keys.
_ATTENTION = _HALF_PRECISION | {
    # Two programs a multiprocessor: one's exponentials beneath the other's products. For D = 128
    # that leaves 128 registers a thread, and a few bytes spill. Both that and TMA, which saves
    # pointers, are measured: docs/decisions/0003.
    "sm_90": (
        (128, TileSettings(128, 64, 8, 2, registers=128, descriptors=True)),
        (256, TileSettings(64, 32, 4, 2)),
    ),
    # With fewer warps, or stages, more would spill on sm_120.
    "small": (
        (64, TileSettings(128, 32, 8, 2)),
        (128, TileSettings(128, 32, 8, 3)),
        (256, TileSettings(64, 32, 4, 2)),
    ),
}
# With the sums that are kept for energies, four warps would spill.
_WITH_ENERGY = _HALF_PRECISION | {
    "sm_80": ((64, TileSettings(128, 64, 8, 3)), *_HALF_PRECISION["sm_80"][1:])
}
# Scores and exponentials without values. What counts is that other warps of the multiprocessor have
# products to do while one computes exponentials (on sm_90 and sm_100 two programs fit), and that
# the next keys are on their way meanwhile: of two stages one is loaded after the exponentials.
_SCORES_ONLY: dict[str, tuple[tuple[int, TileSettings], ...]] = {
    "sm_80": (
        (64, TileSettings(128, 64, 4, 3)),
        (128, TileSettings(128, 64, 8, 3)),
        (256, TileSettings(64, 32, 4, 2)),
    ),
    "small": (
        (64, TileSettings(128, 64, 4, 2)),
        (128, TileSettings(128, 64, 8, 2)),
        (256, TileSettings(64, 32, 4, 2)),
    ),
    # 256 queries share each key that comes from L2, which would else be the limit.
    "sm_90": (
        (128, TileSettings(256, 64, 8, 3)),
        (256, TileSettings(64, 64, 4, 2)),
    ),
    "sm_100": (
        (128, TileSettings(128, 64, 8, 3)),
        (256, TileSettings(64, 64, 4, 2)),
    ),
}
# Exact fp32 products take no tensor core: small tiles, or the accumulators spill.
_SINGLE_PRECISION = ((64, TileSettings(32, 32, 4, 2)), (256, TileSettings(16, 32, 4, 2)))
_SCORES_ONLY_SINGLE = ((64, TileSettings(16, 32, 4, 2)), (256, TileSettings(16, 16, 8, 2)))


def architecture(device: torch.device) -> int:
    """Compute capability of `device` as one number (90 for sm_90); 80 for a CPU (interpreter)."""
    if device.type != "cuda":
        return 80
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for a CPU (interpreter)."""
    if device.type != "cuda":
        return 1
    import torch

    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _family(arch: int) -> str:
    if arch == 80:
        return "sm_80"
    if 90 <= arch < 100:
        return "sm_90"
    if 100 <= arch < 120:
        return "sm_100"
    return "small"


def check_head_dim(head_dim: int) -> None:
    """Raise `KernelError` unless the portable kernels take a head dim."""
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise KernelError(
            "no kernel for this head dimension",
            expected=f"1 to {MAX_HEAD_DIM}",
            got=head_dim,
            remedy="leave this site out of the plan, so that it runs dense",
        )


def _limits(
    half: dict[str, tuple[tuple[int, TileSettings], ...]],
    single: tuple[tuple[int, TileSettings], ...],
    arch: int,
    dtype: torch.dtype,
    head_dim: int,
) -> TileSettings:
    """The table's row for a head dim, which it checks."""
    check_head_dim(head_dim)
    table = half[_family(arch)] if dtype.itemsize == 2 else single
    return next(settings for largest, settings in table if head_dim <= largest)


def tile_settings(
    pattern: BlockPattern | ZonePattern, *, arch: int, dtype: torch.dtype, head_dim: int
) -> TileSettings:
    """Choose tiles for a pattern.

    Args:
        pattern: whose blocks the tiles must divide.
        arch: compute capability as one number, such as 90.
        dtype: of queries, keys and values.
        head_dim: elements a head; padded to a power of two inside the kernel.

    Raises:
        KernelError: head_dim out of range.
    """
    special = not isinstance(pattern, ZonePattern) and (
        pattern.weights is not None or pattern.pooled > 0
    )
    half = _HALF_PRECISION if special else _ATTENTION
    limits = _limits(half, _SINGLE_PRECISION, arch, dtype, head_dim)
    if special:
        # Scaled scores beside raw ones: larger tiles, or fewer warps, would spill.
        limits = replace(limits, n=min(limits.n, 32), warps=max(limits.warps, 8))
    m = min(limits.m, pattern.block_m & -pattern.block_m)
    if limits.descriptors and m <= 64:
        # A warpgroup takes 64 rows; memory for keys then is what limits programs, not registers.
        limits = replace(limits, warps=4, registers=None)
    return replace(
        limits,
        m=m,
        n=min(limits.n, pattern.block_n & -pattern.block_n),
    )


def energy_settings(
    block_n: int, *, arch: int, dtype: torch.dtype, head_dim: int, with_output: bool
) -> TileSettings:
    """Choose tiles of the kernels of block energies: any query block, a part of a key block.

    Args:
        block_n: tokens a key block, which the tile divides.
        arch: compute capability as one number.
        dtype: of queries and keys.
        head_dim: elements a head.
        with_output: for the kernel that also computes the attention output.

    Raises:
        KernelError: head_dim out of range.
    """
    half, single = _SCORES_ONLY, _SCORES_ONLY_SINGLE
    if with_output:
        half, single = _WITH_ENERGY, _SINGLE_PRECISION
    limits = _limits(half, single, arch, dtype, head_dim)
    return replace(limits, n=min(limits.n, block_n & -block_n))
