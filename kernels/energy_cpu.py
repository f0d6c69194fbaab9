"""Block energies on a CPU, with or without the attention output of the same scores."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from calibatt_compiler.kernels.cpu_workers import run_shares
from calibatt_compiler.kernels.operands import empty_output

SCORES = 1 << 19
"""Scores a worker holds at once: two MiB of float32, about a core's second-level cache."""


class _Row(NamedTuple):
    """One query block of one head of one batch item."""

    item: int
    head: int
    row: int


def cpu_energy(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    block: tuple[int, int],
    scale: float,
    lse: Tensor | None,
) -> tuple[Tensor | None, Tensor]:
    """Return the attention output, if values are given, and the block energies.

    Computes in float32, or in float64 if the operands are.

    Args:
        q: (B, H, Sq, D) on the CPU.
        k: (B, H, Sk, D).
        v: (B, H, Sk, D) or None.
        block: tokens a query block, tokens a key block.
        scale: factor on the scores.
        lse: (B, H, Sq), natural log-sum-exp of the scaled scores, or None.

    Returns:
        (B, H, Sq, D) laid out as contiguous (B, Sq, H, D), or None; float32 (B, H, query_blocks,
        key_blocks).
    """
    batch, heads, length_q, _ = q.shape
    query_blocks, key_blocks = -(-length_q // block[0]), -(-k.shape[2] // block[1])
    out = None if v is None else empty_output(q)
    energy = torch.empty(batch, heads, query_blocks, key_blocks)
    rows = [
        _Row(item, head, row)
        for item in range(batch)
        for head in range(heads)
        for row in range(query_blocks)
    ]
    workers = min(torch.get_num_threads(), len(rows))
    bounds = [len(rows) * worker // workers for worker in range(workers + 1)]
    operands = [None if x is None else x.detach() for x in (q, k, v, lse)]
    run_shares(
        [
            partial(_energy_rows, rows[first:last], operands, out, energy, block, scale)
            for first, last in pairwise(bounds)
        ]
    )
    return out, energy


def _energy_rows(
    rows: list[_Row],
    operands: list[Tensor | None],
    out: Tensor | None,
    energy: Tensor,
    block: tuple[int, int],
    scale: float,
) -> None:
    """Compute some query blocks, single-threaded; rows of one head are next to one another."""
    q, k, v, lse = operands
    assert q is not None
    assert k is not None
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    length_q, length_k = q.shape[2], k.shape[2]
    key_blocks = energy.shape[-1]
    parts = -(-block[0] * length_k // SCORES)
    step = -(-block[0] // parts)
    buffer = torch.empty(step * length_k, dtype=dtype)
    ones = torch.ones(1, step, dtype=dtype)
    total = torch.zeros(1, key_blocks * block[1], dtype=dtype)  # zero past the last key
    sums = total[:, :length_k]
    keys = values = None
    previous = None
    for item, head, row in rows:
        if previous != (item, head):
            previous = (item, head)
            keys = k[item, head].to(dtype).T
            values = None if v is None else v[item, head].to(dtype)
        assert keys is not None
        first, last = row * block[0], min((row + 1) * block[0], length_q)
        for start in range(first, last, step):
            stop = min(start + step, last)
            p = buffer[: (stop - start) * length_k].view(stop - start, length_k)
            tile_q = q[item, head, start:stop].to(dtype)
            torch.addmm(p, tile_q, keys, beta=0, alpha=scale, out=p)
            if lse is None:
                torch.softmax(p, -1, out=p)
            else:
                p.sub_(lse[item, head, start:stop, None].to(dtype)).exp_()
            beta = 0 if start == first else 1
            torch.addmm(sums, ones[:, : stop - start], p, beta=beta, out=sums)
            if values is not None and out is not None:
                out[item, head, start:stop] = torch.mm(p, values)
        blocks = total.view(key_blocks, block[1]).sum(-1)
        energy[item, head, row] = blocks / (last - first)
