"""The family of approximations that the study compares, and how each is computed.

A `Form` says, per head and query block, what stands for each key block: its own keys with a weight,
or keys pooled from it with a weight. The class token is kept apart: its key is exact in every row,
and its own query row is dense.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Form(NamedTuple):
    """One layer's approximation; every tensor is float (heads, query_blocks, key_blocks)."""

    exact: Tensor
    """Weight of the block's own keys; 0 drops them, 1 is plain attention."""
    pooled: Tensor | None = None
    """Weight of keys pooled from the block, each counted as often as it has tokens."""
    keys: int = 1
    """Pooled keys a block."""


def pool(x: Tensor, block: int, keys: int) -> tuple[Tensor, Tensor]:
    """Average each `block // keys` neighbouring tokens.

    Args:
        x: (..., tokens, D).
        block: tokens a block; `keys` divides it.
        keys: means a block.

    Returns:
        (..., blocks * keys, D) means, zero where a ragged block has no tokens; (blocks * keys,)
        tokens in each.
    """
    size = block // keys
    tokens = x.shape[-2]
    groups = -(-tokens // block) * keys
    padded = F.pad(x, (0, 0, 0, groups * size - tokens)).unflatten(-2, (groups, size))
    first = torch.arange(groups, device=x.device) * size
    count = (tokens - first).clamp(0, size)
    return padded.sum(-2) / count.clamp_min(1).unsqueeze(-1), count


def attend(q: Tensor, k: Tensor, v: Tensor, form: Form, block: int) -> Tensor:
    """Compute a form with stock attention and a bias: the plain way, one head at a time.

    Args:
        q: (1, heads, 1 + tokens, D), the class token first.
        k: like q.
        v: like q.
        form: weights of this layer.
        block: tokens a block.

    Returns:
        (1, heads, 1 + tokens, D).
    """
    out = torch.empty_like(q)
    tokens, rows = q.shape[2] - 1, form.exact.shape[1]
    out[:, :, :1] = F.scaled_dot_product_attention(q[:, :, :1], k, v)
    # Query blocks stand in the batch dimension, so that a bias of one row serves a whole block.
    queries = F.pad(q[0, :, 1:], (0, 0, 0, rows * block - tokens)).unflatten(1, (rows, 1, block))
    for head in range(q.shape[1]):
        keys, values = k[0, head], v[0, head]
        bias = form.exact[head].log().repeat_interleave(block, 1)[:, :tokens]
        biases = [bias.new_zeros(rows, 1), bias]
        if form.pooled is not None:
            pooled_k, count = pool(keys[1:], block, form.keys)
            pooled_v, _ = pool(values[1:], block, form.keys)
            keys, values = torch.cat([keys, pooled_k]), torch.cat([values, pooled_v])
            biases.append(form.pooled[head].log().repeat_interleave(form.keys, 1) + count.log())
        result = F.scaled_dot_product_attention(
            queries[head],
            keys.expand(rows, 1, *keys.shape),
            values.expand(rows, 1, *values.shape),
            attn_mask=torch.cat(biases, 1)[:, None, None],
        )
        out[0, head, 1:] = result.flatten(0, 2)[:tokens]
    return out


class Parts(NamedTuple):
    """Dense attention of some query blocks of one head, taken apart by key block.

    Everything is divided by exp(LSE). Any form is a weighted sum of these, so that hundreds of
    forms cost about as much as one dense attention.
    """

    numerator: Tensor
    """(columns, queries, D): sum over the column's keys of P times V."""
    denominator: Tensor
    """(columns, queries): sum over the column's keys of P."""
    cls_numerator: Tensor
    """(queries, D), of the class token's key."""
    cls_denominator: Tensor
    """(queries,)."""
    output: Tensor
    """(queries, D): dense attention."""


class Head:
    """One head's operands, made ready to be taken apart.

    Args:
        q: (1 + tokens, D), the class token first.
        k: like q.
        v: like q.
        block: tokens a block.
        pools: for each of these, more columns: the blocks pooled to so many keys.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, block: int, pools: tuple[int, ...]) -> None:
        self.block, self.pools = block, pools
        self.tokens = q.shape[0] - 1
        self.blocks = -(-self.tokens // block)
        pad = (0, 0, 0, self.blocks * block - self.tokens)
        self.queries = F.pad(q[1:], pad) / math.sqrt(q.shape[1])
        self.keys, self.values = F.pad(k[1:], pad), F.pad(v[1:], pad)
        self.cls_key, self.cls_value = k[0], v[0]
        pooled_k = [pool(k[1:], block, size) for size in pools]
        self.pooled_keys = [means for means, _ in pooled_k]
        self.log_counts = [count.log() for _, count in pooled_k]
        self.pooled_values = [pool(v[1:], block, size)[0] for size in pools]

    def chunks(self, rows: int = 8) -> list[range]:
        """Return the query blocks in groups that fit a processor's cache."""
        return [
            range(first, min(first + rows, self.blocks)) for first in range(0, self.blocks, rows)
        ]

    def take_apart(self, rows: range) -> Parts:
        """Return the parts of some query blocks; queries past the last token hold nonsense.

        Columns: the key blocks, then the key blocks pooled each way.
        """
        block, blocks = self.block, self.blocks
        queries = self.queries[rows.start * block : rows.stop * block]
        scores = queries @ self.keys.T
        scores[:, self.tokens :] = -math.inf
        cls_score = queries @ self.cls_key
        lse = torch.logaddexp(scores.logsumexp(-1), cls_score)
        p = scores.sub_(lse[:, None]).exp_().view(-1, blocks, block).transpose(0, 1)
        numerator, denominator = [p @ self.values.view(blocks, block, -1)], [p.sum(-1)]
        for size, keys, counts, values in zip(
            self.pools, self.pooled_keys, self.log_counts, self.pooled_values, strict=True
        ):
            pooled = (queries @ keys.T + counts - lse[:, None]).exp_()
            pooled = pooled.view(-1, blocks, size).transpose(0, 1)
            numerator.append(pooled @ values.view(blocks, size, -1))
            denominator.append(pooled.sum(-1))
        cls = (cls_score - lse).exp()
        cls_numerator = cls[:, None] * self.cls_value
        output = numerator[0].sum(0) + cls_numerator
        return Parts(torch.cat(numerator), torch.cat(denominator), cls_numerator, cls, output)

    def put_together(self, parts: Parts, weights: Tensor) -> Tensor:
        """Compute many forms.

        Args:
            parts: of some query blocks.
            weights: (those query blocks, forms, columns).

        Returns:
            (query blocks, forms, block, D).
        """
        rows, block = weights.shape[0], self.block
        columns, _, dim = parts.numerator.shape
        numerator = parts.numerator.view(columns, rows, block * dim).transpose(0, 1)
        denominator = parts.denominator.view(columns, rows, block).transpose(0, 1)
        top = (weights @ numerator).unflatten(-1, (block, dim))
        top += parts.cls_numerator.view(rows, 1, block, dim)
        bottom = weights @ denominator + parts.cls_denominator.view(rows, 1, block)
        return top.div_(bottom.unsqueeze(-1))
