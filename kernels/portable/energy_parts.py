"""Partial sums of block energies: where the Triton kernels put them, how they become energies.

A kernel's tile of queries is chosen for speed, whatever the query blocks are. It sums by groups of
queries that divide both, and by tiles of keys that divide the key blocks; the rest is a small sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calibatt_compiler.kernels.portable.launch import LaunchConfig, check_dtype, tiled_config
from calibatt_compiler.kernels.portable.tiles import TileSettings, architecture, energy_settings


@dataclass(frozen=True)
class EnergyParts:
    """Sizes of the partial sums of one call.

    Attributes:
        length_q: queries.
        length_k: keys.
        block: queries a query block, keys a key block.
        group: queries a partial sum.
        tile_n: keys a partial sum.
    """

    length_q: int
    length_k: int
    block: tuple[int, int]
    group: int
    tile_n: int

    @property
    def query_blocks(self) -> int:
        """Query blocks, the last one ragged or not."""
        return -(-self.length_q // self.block[0])

    @property
    def key_blocks(self) -> int:
        """Key blocks, the last one ragged or not."""
        return -(-self.length_k // self.block[1])

    @property
    def groups(self) -> int:
        """Groups of queries of one head, those of the last block all counted."""
        return self.query_blocks * self.block[0] // self.group

    @property
    def key_tiles(self) -> int:
        """Tiles of keys, those of the last block all counted."""
        return self.key_blocks * self.block[1] // self.tile_n

    def zeros(self, q: Tensor) -> Tensor:
        """Float32 (B, H, groups, key_tiles); groups and tiles past the end stay zero."""
        shape = (*q.shape[:2], self.groups, self.key_tiles)
        return torch.zeros(shape, dtype=torch.float32, device=q.device)

    def energy(self, parts: Tensor) -> Tensor:
        """Sum the parts (B, H, groups, key_tiles) by block, and divide by each block's queries."""
        groups, tiles = self.block[0] // self.group, self.block[1] // self.tile_n
        shape = (*parts.shape[:2], self.query_blocks, groups, self.key_blocks, tiles)
        energy: Tensor = parts.view(shape).sum((3, 5))
        energy[:, :, :-1] /= self.block[0]
        energy[:, :, -1] /= self.length_q - (self.query_blocks - 1) * self.block[0]
        return energy


def energy_launch(
    q: Tensor,
    k: Tensor,
    block: tuple[int, int],
    *,
    with_output: bool,
    settings: TileSettings | None = None,
    arch: int | None = None,
) -> tuple[LaunchConfig, EnergyParts]:
    """Derive the compile-time arguments of an energy kernel, and its partial sums.

    Args:
        q: (B, H, Sq, D).
        k: (B, H, Sk, D).
        block: tokens a query block, tokens a key block.
        with_output: for the kernel that also computes the attention output.
        settings: tiles to use instead of the table's; `n` must divide the key block.
        arch: compute capability as one number; default that of the device.

    Raises:
        KernelError: dtype or head dim that no portable kernel takes.
    """
    arch = architecture(q.device) if arch is None else arch
    length_q, head_dim = q.shape[2:]
    check_dtype(q.dtype)
    settings = settings or energy_settings(
        block[1], arch=arch, dtype=q.dtype, head_dim=head_dim, with_output=with_output
    )
    group = min(settings.m, block[0] & -block[0])
    blocks, tile_n = {"GROUP": group}, settings.n
    if with_output:
        # The fused kernel sums whole key blocks, for it has to keep the sums for a while.
        blocks["KEY_TILES"], tile_n = block[1] // settings.n, block[1]
    config = tiled_config(settings, blocks, k.shape[2], dtype=q.dtype, head_dim=head_dim)
    return config, EnergyParts(length_q, k.shape[2], block, group, tile_n)
