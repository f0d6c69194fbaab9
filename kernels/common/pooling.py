"""Dropped blocks as pooled keys: what they are, for every kernel alike.

A pattern with `pooled = p` cuts each key block into p equal parts. Where a query block drops a key
block, each part takes part as one key and one value, the means over its tokens, with the logarithm
of its number of tokens added to the score: as if each token had the mean's key and value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calibatt_compiler.plan.pattern import BlockPattern


def part_sizes(pattern: BlockPattern) -> Tensor:
    """Tokens of each part, int64 (key_blocks * pooled); 0 past the end of the keys."""
    part = pattern.block_n // pattern.pooled
    starts = torch.arange(pattern.key_blocks * pattern.pooled) * part
    return (pattern.key_length - starts).clamp(0, part)


def pool(x: Tensor, pattern: BlockPattern) -> Tensor:
    """Mean over the tokens of each part, in float32 or, of float64, in float64.

    Args:
        x: keys or values, (B, H, Sk, D).
        pattern: whose parts; its `pooled` is at least 1.

    Returns:
        (B, H, key_blocks * pooled, D) in the dtype of x; zero for parts without tokens.
    """
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    part = pattern.block_n // pattern.pooled
    parts, whole = pattern.key_blocks * pattern.pooled, pattern.key_length // part
    batch, heads, length, head_dim = x.shape
    pooled = x.new_zeros(batch, heads, parts, head_dim)
    grouped = x[:, :, : whole * part].view(batch, heads, whole, part, head_dim)
    pooled[:, :, :whole] = grouped.mean(3, dtype=exact)
    if whole * part < length:
        pooled[:, :, whole] = x[:, :, whole * part :].mean(2, dtype=exact)
    return pooled


def part_bias(pattern: BlockPattern) -> Tensor:
    """What is added to the scores of the parts.

    Returns:
        float64 (heads, query_blocks, key_blocks * pooled): log of a part's size where its block is
        dropped, -inf where it is kept or where the part has no tokens.
    """
    dropped = (~pattern.mask()).repeat_interleave(pattern.pooled, -1)
    return torch.where(dropped, part_sizes(pattern).double().log(), -torch.inf)
