"""The definition of block-sparse attention, in plain torch: what every other kernel must equal.

For head `h` and query block `r` of a pattern, with `J` the tokens of all key blocks kept there:

    out[i] = softmax_{j in J}(scale * q[i] . k[j] + log w[j]) @ v[j]     for each token i of block r

with `w[j]` the weight of the block of `j`, 1 unless the pattern says otherwise. If the pattern
pools dropped blocks, their pooled keys and values (see `kernels.pooling`) take part as well.

In a row-shared head block `r` holds the positions `computed[r * block_m : (r + 1) * block_m]` of
`BlockPattern.copies`, and every position takes the output that `sources` names:

    out[i] = out[computed[sources[i]]]

A mask over keys adds its bias to their scores, and a query that is left without keys has the
output zero, as stock SDPA gives it; see `KeyPadding`.

Otherwise dropped keys take no part: a NaN or an infinity in a dropped block changes nothing, one in
a kept block does what it does in dense attention.
"""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from calibatt_compiler.kernels.common.operands import check_operands, empty_output
from calibatt_compiler.kernels.common.padding import KeyPadding
from calibatt_compiler.kernels.common.pooling import part_bias, pool
from calibatt_compiler.plan.pattern import BlockPattern


class ReferenceAttention:
    """Block-sparse attention by definition, one row of blocks at a time.

    Computes in float32, or in float64 if the operands are float64, on any device; never holds more
    scores than one query block against its kept keys.

    Attributes:
        kind: "reference".
        density: the pattern's own density, and the pooled keys as part of it.
    """

    kind = "reference"
    reason = None
    table_bytes = 0
    repairs = 0

    def __init__(self, pattern: BlockPattern) -> None:
        self.pattern = pattern
        self.density = pattern.computed_density

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        padding: KeyPadding | None = None,
    ) -> Tensor:
        """Return the attention output, (B, H, Sq, D) laid out as contiguous (B, Sq, H, D).

        Args:
            q: (B, H, Sq, D), any float dtype, any strides.
            k: (B, H, Sk, D).
            v: (B, H, Sk, D).
            scale: factor on the scores; default 1 / sqrt(D).
            padding: what a mask says of the keys, if there is one.

        Raises:
            KernelError: the operands don't fit the pattern or one another.
        """
        pattern = self.pattern
        check_operands(pattern, q, k, v, padding)
        exact = torch.float64 if q.dtype == torch.float64 else torch.float32
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        out = empty_output(q)
        mask, log_weights = pattern.mask(), torch.from_numpy(pattern.log_weights())
        key_block = torch.arange(pattern.key_length) // pattern.block_n
        k, v = k.to(exact), v.to(exact)
        pooled = (pool(k, pattern), pool(v, pattern)) if pattern.pooled else None
        parts = part_bias(pattern).to(k) if pattern.pooled else None
        computed = pattern.computed_rows()
        for head, row in product(range(pattern.heads), range(pattern.query_blocks)):
            if not computed[head, row]:
                continue
            rows = _positions(pattern, head)[row * pattern.block_m : (row + 1) * pattern.block_m]
            rows = rows.to(q.device)
            kept = mask[head, row, key_block].nonzero().squeeze(1).to(q.device)
            keys, values = k[:, head, kept], v[:, head, kept]
            bias = log_weights[head, row, key_block].to(keys)[kept]
            if pooled is not None and parts is not None:
                keys, values = (
                    torch.cat([x, y[:, head]], 1)
                    for x, y in zip((keys, values), pooled, strict=True)
                )
                bias = torch.cat([bias, parts[head, row]])
            scores = q[:, head, rows].to(exact) @ keys.mT * scale + bias
            if padding is not None:
                scores = scores + padding.bias[:, None, kept].to(exact)
            shares = scores.softmax(-1)
            if padding is not None:
                shares = shares.where(padding.valid[:, None, kept].any(-1, keepdim=True), 0)
            out[:, head, rows] = (shares @ values).to(q.dtype)
        _copy(out, pattern)
        return out if padding is None else padding.clear_rows(out)


def _positions(pattern: BlockPattern, head: int) -> Tensor:
    """Positions that a head computes, int64, increasing."""
    if pattern.copies is None or pattern.repetitive is None or not pattern.repetitive[head]:
        return torch.arange(pattern.query_length)
    return torch.from_numpy(pattern.copies.computed(pattern.query_length).astype(np.int64))


def _copy(out: Tensor, pattern: BlockPattern) -> None:
    """Give each position of the row-shared heads of `out` (B, H, Sq, D) the output it takes."""
    if pattern.copies is None or pattern.repetitive is None:
        return
    length = pattern.query_length
    taken = pattern.copies.computed(length)[pattern.copies.sources(length)]
    positions = torch.from_numpy(taken.astype(np.int64)).to(out.device)
    for head in np.flatnonzero(pattern.repetitive).tolist():
        out[:, head] = out[:, head, positions]


def masked_dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    *,
    scale: float | None = None,
    padding: KeyPadding | None = None,
) -> Tensor:
    """Dense SDPA under the pattern expanded to tokens, in the operands' own dtype: tests' oracle.

    Row-shared heads are computed in full, then their rows are copied.
    Quadratic in memory. With float64 operands it is the exact answer; with low-precision ones its
    error against float64 is the yardstick for the error that a kernel may make.

    Args:
        q: (B, H, Sq, D).
        k: (B, H, Sk, D).
        v: (B, H, Sk, D).
        pattern: which blocks are kept.
        scale: factor on the scores; default 1 / sqrt(D).
        padding: what a mask says of the keys, if there is one.

    Returns:
        (B, H, Sq, D), contiguous.
    """
    if padding is not None:
        check_operands(pattern, q, k, v, padding)
        weights = torch.from_numpy(pattern.log_weights()).double()
        bias = torch.where(pattern.mask(), weights, -torch.inf)
        bias = bias.repeat_interleave(pattern.block_n, -1)[..., : pattern.key_length]
        bias = pattern.rows_to_tokens(bias).to(q) + padding.bias[:, None, None].to(q)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
        out = out.masked_fill((bias == -torch.inf).all(-1, keepdim=True), 0)
        _copy(out, pattern)
        return padding.clear_rows(out)
    if pattern.weights is None and not pattern.pooled:
        mask = pattern.token_mask().to(q.device)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        _copy(out, pattern)
        return out
    blocks = torch.from_numpy(pattern.log_weights()).double()
    bias = torch.where(pattern.mask(), blocks, -torch.inf).repeat_interleave(pattern.block_n, -1)
    bias = bias[..., : pattern.key_length]
    if pattern.pooled:
        bias = torch.cat([bias, part_bias(pattern)], -1)
        k, v = (torch.cat([x, pool(x, pattern)], 2) for x in (k, v))
    mask = pattern.rows_to_tokens(bias).to(q)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    _copy(out, pattern)
    return out
