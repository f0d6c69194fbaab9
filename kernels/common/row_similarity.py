"""Row similarity: how alike the rows of a frame attend.

A frame of the latent grid (F, H, W) has H rows of W tokens. With P = softmax(scale * q k^T) over
all keys, the pattern of row y of frame f is the matrix P[f, y] in R^(W x Sk), one line a column of
the frame. The score of a head is the mean cosine similarity of two rows' patterns, each flattened,

    1 / F * sum_f 2 / (H (H - 1)) * sum_{y < y'} <P[f, y], P[f, y']> / (|P[f, y]| |P[f, y']|)

with <., .> and |.| over column and key together. CalibAtt (arXiv 2603.05503) names the mean cosine
similarity of flattened rows and not its normalisation: the choice made here is that rows are
flattened whole, so that columns weigh by how peaked they are, and that a row is not compared with
itself. The score lies in (0, 1]; 1: all rows of a frame attend alike.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from calibatt_compiler.errors import KernelError

FRAMES = 4
"""Frames that the mean is over by default, at most."""

CHUNK = 1 << 20
"""Scores taken at once on a CPU, 4 MiB in float32; on other devices 64 times as many."""


def row_similarity(
    q: Tensor,
    k: Tensor,
    *,
    grid: tuple[int, int, int],
    first: int = 0,
    scale: float | None = None,
    frames: int = FRAMES,
) -> Tensor:
    """Return the score of each head; the formula is that of the module.

    Never holds a full attention matrix: of one frame some columns at a time, of one head at least
    one column, H * Sk scores.

    Args:
        q: (B, H, Sq, D), any strides, tokens in raster order.
        k: (B, H, Sk, D), same dtype and device; in any order.
        grid: tokens (frames, height, width) among the queries; at least 2 rows.
        first: query of the grid's first token.
        scale: factor on the scores; default 1 / sqrt(D).
        frames: take the mean over this many frames, evenly spread, instead of all.

    Returns:
        float64 (B, H).

    Raises:
        KernelError: the operands don't fit one another or the grid.
    """
    _check(q, k, grid, first, frames)
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    batch, heads = q.shape[:2]
    of_grid = slice(first, first + math.prod(grid))
    columns, at_once = _division(grid, k.shape[2], q.device)
    taken = spread(min(frames, grid[0]), grid[0])
    groups = [
        (sample, slice(start, start + at_once))
        for sample in range(batch)
        for start in range(0, heads, at_once)
    ]
    scores = [
        _of_heads(q[sample, group, of_grid], k[sample, group].mT, grid, factor, columns, taken)
        for sample, group in groups
    ]
    return torch.cat(scores).view(batch, heads)


def working_bytes(
    grid: tuple[int, int, int], keys: int, channels: int, device: torch.device
) -> int:
    """Return how much memory `row_similarity` takes beside its operands, at most.

    Args:
        grid: as there.
        keys: tokens on the key side.
        channels: of a head.
        device: of the operands.
    """
    columns, heads = _division(grid, keys, device)
    scores, queries = heads * columns * grid[1] * keys, heads * columns * grid[1] * channels
    return 4 * (3 * scores + queries + heads * keys * channels)


def _division(grid: tuple[int, int, int], keys: int, device: torch.device) -> tuple[int, int]:
    """Columns of a frame, and heads, to take at a time."""
    per_column = grid[1] * keys
    limit = max(per_column, CHUNK * (1 if device.type == "cpu" else 64))
    columns = min(grid[2], limit // per_column)
    return columns, max(1, limit // (per_column * columns))


def spread(count: int, of: int) -> list[int]:
    """Return `count` indices of `of`, each in the middle of its equal share."""
    return [(2 * index + 1) * of // (2 * count) for index in range(count)]


def _of_heads(
    q: Tensor,
    keys: Tensor,
    grid: tuple[int, int, int],
    scale: float,
    columns: int,
    frames: list[int],
) -> Tensor:
    """Score some heads: q (N, F * H * W, D), keys (N, D, Sk)."""
    heads, _, channels = q.shape
    _, height, width = grid
    rows = q.view(heads, *grid, channels)
    native = q.is_cuda and torch.version.hip is None and q.dtype.itemsize == 2
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys = keys if native else keys.to(exact)
    total = torch.zeros(heads, dtype=torch.float64, device=q.device)
    for frame in frames:
        gram = torch.zeros(heads, height, height, dtype=torch.float64, device=q.device)
        for start in range(0, width, columns):
            part = rows[:, frame, :, start : start + columns].reshape(heads, -1, channels)
            # Products of 16-bit numbers are exact in float32, so tensor cores lose nothing.
            scores = torch.bmm(part, keys, out_dtype=exact) if native else part.to(exact) @ keys
            patterns = scores.mul_(scale).softmax(-1).view(heads, height, -1)
            gram += patterns @ patterns.mT
        norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
        cosines = gram / (norms[:, :, None] * norms[:, None, :])
        # Each row is as similar to itself as can be, which says nothing.
        total += (cosines.sum((-1, -2)) - height) / (height * (height - 1))
    return (total / len(frames)).clamp_(0.0, 1.0)


def _check(q: Tensor, k: Tensor, grid: tuple[int, int, int], first: int, frames: int) -> None:
    fits = (
        q.dim() == 4
        and k.dim() == 4
        and min(q.numel(), k.numel()) > 0
        and (*q.shape[:2], q.shape[3]) == (*k.shape[:2], k.shape[3])
        and q.dtype == k.dtype
        and q.dtype.is_floating_point
        and q.device == k.device
    )
    if not fits:
        raise KernelError(
            "queries and keys don't fit one another",
            expected="float q (B, H, Sq, D) and k (B, H, Sk, D), one dtype, one device, not empty",
            got=f"q {tuple(q.shape)} {q.dtype} {q.device}, k {tuple(k.shape)} {k.dtype} {k.device}",
            remedy="pass q and k of one attention call",
        )
    inside = min(grid) >= 1 and 0 <= first <= q.shape[2] - math.prod(grid)
    if not inside or grid[1] < 2 or frames < 1:
        raise KernelError(
            "rows can't be compared",
            expected=f"a grid of at least two rows within {q.shape[2]} queries, and a frame",
            got=f"{grid} from query {first} on, {frames} frames",
            remedy="pass the latent grid (frames, height, width) of the queries",
        )
