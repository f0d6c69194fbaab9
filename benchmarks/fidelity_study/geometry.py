"""How far apart two tokens of a video are, by several measures, and two blocks of tokens.

A place is a token's (frame, row, column) in the latent grid. A measure takes places of queries
(m, 3) and of keys (n, 3), int64, and returns float (m, n).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from calibatt_compiler.plan.order import TokenOrder

Grid = tuple[int, int, int]
Measure = Callable[[Tensor, Tensor], Tensor]


def places(grid: Grid, order: TokenOrder) -> Tensor:
    """Return the place of the token at each position of an order, int64 (tokens, 3)."""
    sizes = [torch.arange(size) for size in grid]
    raster = torch.cartesian_prod(*sizes)
    tokens = order.tokens(grid)
    return raster if tokens is None else raster[torch.from_numpy(tokens)]


def block_tile(block: int) -> Grid:
    """Return the tile (frames, height, width) of one block of tokens, as near a cube as can be.

    The block is a multiple of 16: 1x4x4, 2x4x4, 4x4x4, 4x4x8, 4x8x8 for 16 to 256.
    """
    frames, height, width = block // 16, 4, 4
    while frames > 4 and frames % 2 == 0:
        frames //= 2
        if height < width:
            height *= 2
        else:
            width *= 2
    return frames, height, width


def ranks(measure: Measure, at: Tensor, block: int) -> Tensor:
    """Rank the key blocks of each query block from near to far.

    Two blocks are as far apart as their nearest pair of tokens; of blocks equally far the one
    whose pairs are nearer on average comes first, then the one of lower index. The block itself
    has rank 0.

    Args:
        measure: distance of tokens.
        at: places of the tokens in the order that blocks are cut from, (tokens, 3).
        block: tokens a block; the last may be ragged.

    Returns:
        int64 (blocks, blocks), a permutation in each row: the first n ranks are a mask of n blocks.
    """
    parts = at.split(block)
    least, mean = [], []
    for part in parts:
        distance = measure(part, at).split(block, dim=1)
        least.append(torch.stack([piece.amin() for piece in distance]))
        mean.append(torch.stack([piece.mean() for piece in distance]))
    own = torch.eye(len(parts), dtype=torch.bool)
    first = torch.stack(least).masked_fill(own, -torch.inf)
    by_mean = torch.stack(mean).argsort(dim=-1, stable=True)
    by_least = first.gather(-1, by_mean).argsort(dim=-1, stable=True)
    return by_mean.gather(-1, by_least).argsort(-1)


def tiles_apart(tile: Grid, reach: tuple[float, float, float]) -> Measure:
    """Return a window of tiles: the largest number of tiles between two along any axis.

    Args:
        tile: frames, height and width of a tile.
        reach: what the window's extents are in proportion to; (1, 1, 1) is a cube of tiles.
    """

    def measure(queries: Tensor, keys: Tensor) -> Tensor:
        size, scale = torch.tensor(tile), torch.tensor(reach)
        apart = (queries[:, None] // size - keys // size).abs() / scale
        return apart.amax(-1)

    return measure


def radial(grid: Grid) -> Measure:
    """Return a window in raster positions within the frame that halves as frames get farther.

    d frames apart, two tokens at positions l and l' of their frames are |l - l'| / (s / 2^b) apart,
    s being a frame's tokens and b the bit length of d: 0, 1, 2, 2, 3, ... (Radial Attention,
    arXiv 2506.19852, with the widths of its release for Wan). The sum of the windows of all frames
    is O(s log frames) a query.
    """
    size = grid[1] * grid[2]

    def measure(queries: Tensor, keys: Tensor) -> Tensor:
        frames = (queries[:, None, 0] - keys[:, 0]).abs()
        bits = (frames + 1).double().log2().ceil()
        apart = (_in_frame(queries, grid)[:, None] - _in_frame(keys, grid)).abs()
        return apart * 2**bits / size

    return measure


def spatial(grid: Grid) -> Measure:
    """Return the distance in raster order: the same frame, then its neighbours.

    SVG's spatial heads (arXiv 2502.01776).
    """
    size = grid[1] * grid[2]

    def index(at: Tensor) -> Tensor:
        return at[:, 0] * size + _in_frame(at, grid)

    return lambda queries, keys: (index(queries)[:, None] - index(keys)).abs().float()


def temporal(grid: Grid) -> Measure:
    """Return the distance in the order that has all frames of one place together.

    SVG's temporal heads: diagonals with the stride of a frame.
    """

    def index(at: Tensor) -> Tensor:
        return _in_frame(at, grid) * grid[0] + at[:, 0]

    return lambda queries, keys: (index(queries)[:, None] - index(keys)).abs().float()


def whole_frame(measure: Measure) -> Measure:
    """Return a measure by which all tokens of one frame are at no distance."""

    def nearer(queries: Tensor, keys: Tensor) -> Tensor:
        return measure(queries, keys).masked_fill(queries[:, None, 0] == keys[:, 0], 0.0)

    return nearer


def with_sink(measure: Measure) -> Measure:
    """Return a measure to which the keys of the first frame are nearest to every query."""

    def nearer(queries: Tensor, keys: Tensor) -> Tensor:
        return measure(queries, keys).masked_fill(keys[:, 0] == 0, -1.0)

    return nearer


def _in_frame(at: Tensor, grid: Grid) -> Tensor:
    return at[:, 1] * grid[2] + at[:, 2]
