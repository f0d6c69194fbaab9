"""Block-sparse attention on a CPU as gather, matrix product, softmax, matrix product.

Each group of query blocks that keeps the same keys gathers these keys and values and runs dense
attention over them with the BLAS that torch brings. In float32 that BLAS runs at the same rate on
a gathered tile as in dense attention, but each tile is several small operations: with blocks of 64
and some thousand tokens their cost outweighs what is skipped (`benchmarks/RESULTS.md`).
FlexAttention's CPU template has a fixed register tile for q @ k.T in float32 and was slower still
where AVX-512 is there; in bfloat16 and float16 it is the faster one. `benchmarks/cpu_attention.py`
measures both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from calibatt_compiler.kernels.cpu_workers import balanced, run_shares
from calibatt_compiler.kernels.operands import check_operands, empty_output
from calibatt_compiler.plan.pattern import BlockPattern

SCORES = 1 << 19
"""Scores a worker holds at once: two MiB of float32, about a core's second-level cache."""

TILE = 256
"""Most query tokens that share one gather."""


@dataclass(frozen=True)
class Tile:
    """Consecutive query tokens of one head that keep the same keys.

    Attributes:
        head: which head.
        start: first query token.
        stop: last query token, exclusive.
        keys: int32, the kept key tokens in order; None if all are kept.
        count: number of kept key tokens.
    """

    head: int
    start: int
    stop: int
    keys: Tensor | None
    count: int


class GemmCpuAttention:
    """Block-sparse attention on a CPU for float32 and float64; half types go through float32.

    Attributes:
        kind: "gemm-cpu".
        density: the pattern's own density.
    """

    kind = "gemm-cpu"

    def __init__(self, pattern: BlockPattern) -> None:
        self.pattern = pattern
        self.density = pattern.density
        self._tiles = list(tiles(pattern))
        self._shares: dict[int, list[list[Tile]]] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        """Return the attention output, (B, H, Sq, D) laid out as contiguous (B, Sq, H, D).

        Args:
            q: (B, H, Sq, D) on the CPU, any strides.
            k: (B, H, Sk, D).
            v: (B, H, Sk, D).
            scale: factor on the scores; default 1 / sqrt(D).

        Raises:
            KernelError: the operands don't fit the pattern or one another.
        """
        check_operands(self.pattern, q, k, v)
        factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        out = empty_output(q)
        q, k, v = q.detach(), k.detach(), v.detach()
        threads = torch.get_num_threads()
        if threads not in self._shares:
            self._shares[threads] = balanced(
                self._tiles, lambda tile: tile.count * (tile.stop - tile.start), threads
            )

        def work(share: list[Tile]) -> None:
            for item in range(q.shape[0]):
                attend(share, q[item], k[item], v[item], factor, out[item])

        run_shares([lambda share=share: work(share) for share in self._shares[threads]])  # type: ignore[misc]
        return out


def tiles(pattern: BlockPattern) -> Iterator[Tile]:
    """Yield the tiles of a pattern, head by head in order of the queries."""
    mask = pattern.numpy_mask()
    key_block = torch.arange(pattern.key_length, dtype=torch.int32) // pattern.block_n
    known: dict[bytes, tuple[Tensor | None, int]] = {}
    merged = max(1, TILE // pattern.block_m)
    for head in range(pattern.heads):
        row = 0
        while row < pattern.query_blocks:
            first, bits = row, pattern.bits[head, row].tobytes()
            while (
                row < min(first + merged, pattern.query_blocks)
                and pattern.bits[head, row].tobytes() == bits
            ):
                row += 1
            if bits not in known:
                kept = torch.from_numpy(mask[head, first])
                keys = kept[key_block].nonzero().squeeze(1).to(torch.int32)
                known[bits] = (None if kept.all() else keys, keys.numel())
            stop = min(row * pattern.block_m, pattern.query_length)
            yield Tile(head, first * pattern.block_m, stop, *known[bits])


def attend(share: list[Tile], q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor) -> None:
    """Compute some tiles of one batch item, single-threaded.

    Args:
        share: the tiles.
        q: (H, Sq, D).
        k: (H, Sk, D).
        v: (H, Sk, D).
        scale: factor on the scores.
        out: (H, Sq, D), written where the tiles are.
    """
    dtype = q.dtype if q.dtype in (torch.float32, torch.float64) else torch.float32
    same = dtype == q.dtype
    most = max(tile.count for tile in share)
    keys, values = (torch.empty(most, q.shape[-1], dtype=q.dtype) for _ in range(2))
    scores = torch.empty(max(SCORES, most), dtype=dtype)
    for tile in share:
        if tile.keys is None:
            kept_keys, kept_values = k[tile.head], v[tile.head]
        else:
            kept_keys, kept_values = keys[: tile.count], values[: tile.count]
            torch.index_select(k[tile.head], 0, tile.keys, out=kept_keys)
            torch.index_select(v[tile.head], 0, tile.keys, out=kept_values)
        kept_keys, kept_values = kept_keys.to(dtype), kept_values.to(dtype)
        length = tile.stop - tile.start
        most_rows = max(1, SCORES // tile.count)
        step = -(-length // -(-length // most_rows))  # equal parts of at most that many rows
        for start in range(tile.start, tile.stop, step):
            stop = min(start + step, tile.stop)
            tile_q = q[tile.head, start:stop].to(dtype)
            s = scores[: (stop - start) * tile.count].view(stop - start, tile.count)
            torch.addmm(s, tile_q, kept_keys.T, beta=0, alpha=scale, out=s)
            torch.softmax(s, -1, out=s)
            if same:
                torch.mm(s, kept_values, out=out[tile.head, start:stop])
            else:
                out[tile.head, start:stop] = torch.mm(s, kept_values)
