"""Gradients of block-sparse attention, in plain torch on any device, one row of blocks at a time.

With `p` the weights of a query over the keys that take part, `o = p @ v` its output and `g` the
gradient there, each row of a block adds

    dv += p^T g     ds = scale * p * (g v^T - sum(g * o))     dq = ds k     dk += ds^T q

The weights are computed again from the log-sum-exp of their row, and no more than `AT_A_TIME`
numbers of scores and gathered keys are held.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from calibatt_compiler.kernels.common.operands import check_operands, token_major
from calibatt_compiler.kernels.common.padding import KeyPadding
from calibatt_compiler.kernels.common.pooling import part_bias, part_sizes, pool
from calibatt_compiler.plan.pattern import BlockPattern

AT_A_TIME = 1 << 25
"""Most numbers of scores and gathered keys held at a time, unless one head needs more."""

DENSE_ROW = 128
"""Queries of a row of blocks where there is no pattern."""


def attention_gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern | None,
    scale: float,
    padding: KeyPadding | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values.

    Computes in float32, or in float64 if the operands are float64.

    Args:
        grad: gradient of the output, (B, H, Sq, D), any strides.
        q: (B, H, Sq, D), any float dtype, any strides.
        k: (B, H, Sk, D).
        v: (B, H, Sk, D).
        pattern: which blocks the output was computed from; None: all of them.
        scale: factor on the scores.
        padding: what a mask says of the keys; None: there is none.

    Returns:
        Like q, k and v, each laid out as contiguous (B, S, H, D).

    Raises:
        KernelError: the operands don't fit the pattern or one another.
    """
    if pattern is not None:
        check_operands(pattern, q, k, v, padding)
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    dtype = q.dtype
    grad, q, k, v = (x.detach().to(exact) for x in (grad, q, k, v))
    if padding is not None:
        grad = padding.clear_rows(grad.clone())
    sums = _Sums(grad, q, k, v, pattern, scale, padding)
    if pattern is None:
        sums.add_dense()
    else:
        for head_group, positions, rows in _groups(pattern, sums.grad):
            sums.add(pattern, head_group, positions, rows)
    found = sums.finished()
    return found[0].to(dtype), found[1].to(dtype), found[2].to(dtype)


def masked_gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: KeyPadding | Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of dense attention under any mask; arguments: see `dense_attention`."""
    if not isinstance(mask, Tensor):
        return attention_gradients(grad, q, k, v, None, scale, mask)
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        found = torch.autograd.grad(out, (q, k, v), grad)
    return token_major(found[0]), token_major(found[1]), token_major(found[2])


def _groups(pattern: BlockPattern, grad: Tensor) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Walk heads of one kind: the heads, the positions they compute, and gradients there.

    A row-shared head's output goes to several positions, whose gradients add up.
    """
    repetitive = pattern.repetitive
    of_blocks = np.ones(pattern.heads, np.bool_) if repetitive is None else ~repetitive
    if of_blocks.any():
        heads = np.flatnonzero(of_blocks).tolist()
        yield heads, torch.arange(pattern.query_length, device=grad.device), grad[:, heads]
    if repetitive is not None and repetitive.any():
        assert pattern.copies is not None
        heads = np.flatnonzero(repetitive).tolist()
        computed, sources = (
            torch.from_numpy(table(pattern.query_length).astype(np.int64)).to(grad.device)
            for table in (pattern.copies.computed, pattern.copies.sources)
        )
        batch, _, _, head_dim = grad.shape
        summed = grad.new_zeros(batch, len(heads), len(computed), head_dim)
        yield heads, computed, summed.index_add_(2, sources, grad[:, heads])


@dataclass
class _Kept:
    """Keys that a few heads keep in one row of blocks, padded to the same number."""

    read: Tensor  # int64 (h, K): where padded, a key that is kept
    write: Tensor  # int64 (h, K): where padded, one past the last key
    bias: Tensor  # (h, K): log of the block's weight; -inf where padded


class _Sums:
    """Operands, and gradients summed up so far; keys have one place more, for padding."""

    def __init__(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: BlockPattern | None,
        scale: float,
        padding: KeyPadding | None = None,
    ) -> None:
        # (B, 1, Sk): what is added to the scores of each key.
        self._key_bias = None if padding is None else padding.bias.to(k)[:, None]
        self.grad, self._q, self._k, self._v, self._scale = grad, q, k, v, scale
        batch, heads, length, head_dim = k.shape
        self._dq = torch.zeros_like(q)
        self._dk, self._dv = (k.new_zeros(batch, heads, length + 1, head_dim) for _ in range(2))
        self._pooled: tuple[Tensor, Tensor] | None = None
        if pattern is not None and pattern.pooled:
            self._pooled = pool(k, pattern), pool(v, pattern)
            self._d_pooled = [torch.zeros_like(x) for x in self._pooled]
            self._part_bias = part_bias(pattern).to(k)
            self._part_sizes = part_sizes(pattern).to(k.device)

    def add_dense(self) -> None:
        """Add attention of all queries to all keys."""
        heads, length = self._k.shape[1:3]
        for part in self._parts(list(range(heads)), DENSE_ROW, length):
            k, v = self._k[:, part], self._v[:, part]
            for first in range(0, self._q.shape[2], DENSE_ROW):
                rows = slice(first, first + DENSE_ROW)
                found = self._row(
                    self._q[:, part, rows], k, v, self.grad[:, part, rows], self._key_bias
                )
                self._dq[:, part, rows] = found[0]
                self._dk[:, part, :length] += found[1]
                self._dv[:, part, :length] += found[2]

    def add(self, pattern: BlockPattern, heads: list[int], positions: Tensor, grad: Tensor) -> None:
        """Add attention of some heads.

        Args:
            pattern: of all heads.
            heads: which.
            positions: int64 (n), the queries that they compute.
            grad: (B, h, n, D), gradient of the output there.
        """
        log_weights = pattern.log_weights() if pattern.weights is not None else None
        for row, first in enumerate(range(0, len(positions), pattern.block_m)):
            rows = positions[first : first + pattern.block_m]
            mask = pattern.row_mask(row)
            most = int(mask[heads].sum(-1).max()) * pattern.block_n
            most += pattern.pooled * pattern.key_blocks
            for part in self._parts(heads, len(rows), most):
                weights = None if log_weights is None else log_weights[part, row]
                kept = self._kept(pattern, mask[part], weights)
                place = [heads.index(head) for head in part]
                self._add_row(part, row, rows, kept, grad[:, place, first : first + len(rows)])

    def _parts(self, heads: list[int], queries: int, keys: int) -> Iterator[list[int]]:
        """Walk as many heads at a time as may be held."""
        batch, _, _, head_dim = self._k.shape
        step = max(1, AT_A_TIME // max(1, batch * keys * (queries + 4 * head_dim)))
        for first in range(0, len(heads), step):
            yield heads[first : first + step]

    def _kept(self, pattern: BlockPattern, mask: np.ndarray, weights: np.ndarray | None) -> _Kept:
        """Return the keys of the blocks in `mask`, bool (h, key_blocks), with log weights alike."""
        counts = mask.sum(-1, keepdims=True)
        blocks = np.argsort(~mask, axis=-1, kind="stable")[:, : int(counts.max())]
        beyond = np.arange(blocks.shape[1]) >= counts
        block_bias = (
            np.zeros(blocks.shape) if weights is None else np.take_along_axis(weights, blocks, -1)
        )
        starts = np.where(beyond, pattern.key_length, blocks * pattern.block_n)
        tokens = (starts[..., None] + np.arange(pattern.block_n)).reshape(len(mask), -1)
        padded = tokens >= pattern.key_length
        bias = np.where(padded, -np.inf, block_bias.repeat(pattern.block_n, -1))
        read = np.where(padded, blocks[:, :1] * pattern.block_n, tokens)
        write = np.where(padded, pattern.key_length, tokens)
        device = self._k.device
        return _Kept(
            torch.from_numpy(read).to(device),
            torch.from_numpy(write).to(device),
            torch.from_numpy(bias).to(self._k),
        )

    def _add_row(self, part: list[int], row: int, rows: Tensor, kept: _Kept, grad: Tensor) -> None:
        heads = torch.tensor(part, device=self._k.device)[:, None]
        keys, values = self._k[:, heads, kept.read], self._v[:, heads, kept.read]
        bias = kept.bias
        if self._key_bias is not None:
            bias = bias + self._key_bias[:, 0, kept.read]
        if self._pooled is not None:
            keys, values = (
                torch.cat([x, y[:, part]], 2)
                for x, y in zip((keys, values), self._pooled, strict=True)
            )
            bias = torch.cat([bias, self._part_bias[part, row]], -1)
        found = self._row(self._q[:, heads, rows], keys, values, grad, bias)
        self._dq[:, heads, rows] = found[0]
        count = kept.read.shape[1]
        self._dk[:, heads, kept.write] += found[1][:, :, :count]
        self._dv[:, heads, kept.write] += found[2][:, :, :count]
        if self._pooled is not None:
            self._d_pooled[0][:, part] += found[1][:, :, count:]
            self._d_pooled[1][:, part] += found[2][:, :, count:]

    def _row(
        self, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of a few queries (B, h, m, D) and of all keys (B, h, K, D).

        The bias of the keys is (h, K), (B, h, K) or (B, 1, K).
        """
        scores = q @ k.mT * self._scale
        if bias is not None:
            scores = scores + bias[..., None, :]
        total = scores.logsumexp(-1, keepdim=True)
        if self._key_bias is not None:
            total = total.where(total != -torch.inf, 0)  # a query without keys
        weights = (scores - total).exp_()
        inner = (grad * (weights @ v)).sum(-1, keepdim=True)
        d_scores = (grad @ v.mT - inner).mul_(weights).mul_(self._scale)
        return d_scores @ k, d_scores.mT @ q, weights.mT @ grad

    def finished(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients, those of pooled keys and values handed on to their tokens."""
        length = self._k.shape[2]
        found = [self._dk[:, :, :length], self._dv[:, :, :length]]
        if self._pooled is not None:
            sizes = self._part_sizes
            for tokens, pooled in zip(found, self._d_pooled, strict=True):
                share = pooled / sizes.clamp(min=1)[:, None]
                tokens.add_(share.repeat_interleave(sizes, 2))
        return token_major(self._dq), token_major(found[0]), token_major(found[1])
