"""Token orders: which patch stands where in the sequence."""

from __future__ import annotations

import torch
from torch import Tensor


def tile_order(grid: tuple[int, int], tile: tuple[int, int]) -> Tensor:
    """Return the raster index of the patch at each place, whole tiles first.

    Patches of one tile are neighbours; within a tile its four quadrants follow one another, so that
    a quarter of its tokens is a compact piece of the picture. What is left of a grid that does not
    divide (a strip at the right, one below) comes last, so that it shifts no tile.

    Args:
        grid: rows and columns of patches.
        tile: rows and columns of a tile; (1, anything) or a tile of one row as wide as the grid
            gives raster order.

    Returns:
        int64 (patches,).
    """
    rows, columns = grid
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    whole = (y < rows // tile[0] * tile[0]) & (x < columns // tile[1] * tile[1])
    half = (max(1, tile[0] // 2), max(1, tile[1] // 2))
    inside_y, inside_x = y % tile[0], x % tile[1]
    keys = [~whole, y // tile[0], x // tile[1], inside_y // half[0], inside_x // half[1]]
    index = torch.arange(rows * columns)
    # Stable sorts from the least significant key on; ties stay in raster order.
    for key in reversed(keys):
        index = index[key.flatten()[index].to(torch.int64).argsort(stable=True)]
    return index


def raster_order(grid: tuple[int, int]) -> Tensor:
    """Return 0, 1, 2, ...: row by row."""
    return torch.arange(grid[0] * grid[1])


def block_centres(order: Tensor, grid: tuple[int, int], block: int) -> Tensor:
    """Return the mean row and column of the patches of each block, float (blocks, 2)."""
    places = torch.stack([order // grid[1], order % grid[1]], 1).float()
    return torch.stack([part.mean(0) for part in places.split(block)])
