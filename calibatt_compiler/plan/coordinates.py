"""Where tokens stand: coordinates that a model is given for its rotary embeddings, as a digest.

Some transformers do not receive the size of a video but the coordinates of each token (LTX's
`video_coords`, the `img_ids` of Flux). Two calls lay their tokens out alike if on each axis the
same tokens have equal coordinates and the coordinates rise alike: their scale, such as frames a
second, does not matter. So coordinates are brought to ranks, counted from 0 on each axis, and these
are hashed on the tensor's own device, without a wait for it.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

OF_VIDEO = ("video_coords", "img_ids", "image_ids", "latent_image_ids", "position_ids")
"""Arguments that place the video's tokens; `position_ids` perhaps those of the text too."""

OF_TEXT = ("txt_ids", "text_ids")
"""Arguments that place text tokens."""

_MIX = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))
"""Shifts and factors of the finaliser of splitmix64."""


def by_axis(name: str, coordinates: Tensor) -> Tensor | None:
    """Return coordinates as (samples, axes, tokens), or None if the shape is another.

    Args:
        name: of the argument; `..._coords` are (samples, axes, tokens[, start and end]), others
            ([samples,] tokens, axes).
        coordinates: the argument.
    """
    if name.endswith("_coords"):
        if coordinates.dim() == 4:
            coordinates = coordinates[..., 0]
        return coordinates if coordinates.dim() == 3 else None
    if coordinates.dim() == 2:
        coordinates = coordinates[None]
    return coordinates.transpose(1, 2) if coordinates.dim() == 3 else None


def ranks(coordinates: Tensor) -> Tensor:
    """Return int64 (..., tokens): how many smaller values each coordinate's row has."""
    rising, order = coordinates.sort(dim=-1, stable=True)
    steps = (rising[..., 1:] != rising[..., :-1]).long().cumsum(-1)
    of_rising = torch.nn.functional.pad(steps, (1, 0))
    return torch.empty_like(of_rising).scatter_(-1, order, of_rising)


def digests(coordinates: Tensor) -> Tensor:
    """Return int64 (samples): a hash of the ranks of coordinates (samples, axes, tokens).

    The sum, modulo 2^64, of splitmix64's finaliser over `token + 2^24 axis + 2^32 rank`.
    """
    found = ranks(coordinates)
    axes, tokens = found.shape[-2:]
    device = found.device
    mixed = (
        torch.arange(tokens, device=device)
        + (torch.arange(axes, device=device) << 24)[:, None]
        + (found << 32)
    )
    for shift, factor in _MIX:
        mixed = (mixed ^ _shifted(mixed, shift)) * factor
    return (mixed ^ _shifted(mixed, 31)).sum((-1, -2))


def _shifted(x: Tensor, by: int) -> Tensor:
    return (x >> by) & ((1 << (64 - by)) - 1)  # of an int64 as if it had no sign


def digest_of(coordinates: Tensor) -> str | None:
    """Return the digest of all samples as a plan records it, None if they differ; waits."""
    found = digests(coordinates).tolist()
    return f"{found[0] % 2**64:016x}" if len(set(found)) == 1 else None


def grid_of(coordinates: Tensor) -> tuple[int, int, int] | None:
    """Return (frames, height, width) of tokens in raster order, None if they are not; waits.

    Args:
        coordinates: (samples, axes, tokens). Of four axes or more those with one value, the last
            first, are left out until there are three.
    """
    counts = (ranks(coordinates[:1]).amax((0, 2)) + 1).tolist()
    while len(counts) > 3 and 1 in counts:
        counts.reverse()
        counts.remove(1)
        counts.reverse()
    if len(counts) > 3:
        return None
    grid = (*[1] * (3 - len(counts)), *counts)
    if math.prod(grid) != coordinates.shape[-1]:
        return None
    axes = coordinates.shape[1]
    expected = {grid_digest(grid, axes), grid_digest(grid, axes, last=False)}
    return (grid[0], grid[1], grid[2]) if digest_of(coordinates) in expected else None


@functools.lru_cache(maxsize=64)
def grid_digest(grid: tuple[int, ...], axes: int, *, last: bool = True) -> str:
    """Return the digest of a grid's tokens in raster order.

    Args:
        grid: tokens (frames, height, width).
        axes: of the coordinates. Fewer than three are the last of the grid's. More have the value
            0 everywhere, and are the last ones, or with `last=False` the first.
        last: see there.
    """
    tokens = torch.stack(
        torch.meshgrid(*(torch.arange(size) for size in grid), indexing="ij")
    ).flatten(1)
    if axes <= len(grid):
        tokens = tokens[len(grid) - axes :]
    else:
        rest = tokens.new_zeros(axes - len(grid), tokens.shape[1])
        tokens = torch.cat([tokens, rest] if last else [rest, tokens])
    return f"{int(digests(tokens[None])) % 2**64:016x}"
