"""Block energy: how much attention each query block pays to each key block.

    E[r, c] = 1 / |I_r| * sum_{i in I_r, j in J_c} softmax_j(scale * q[i] . k[j])

with I_r the tokens of query block r and J_c those of key block c (CalibAtt, arXiv 2603.05503; the
last blocks may be ragged, and a ragged query block divides by its own size). Rows of E sum to 1.

Under a mask over keys the softmax is over those that take part, for padded queries as for others,
so padded keys have no energy; a sample without any key has none at all.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.common.dense import dense_attention, dense_attention_and_lse
from calibatt_compiler.kernels.common.operands import token_major
from calibatt_compiler.kernels.common.padding import TAIL, KeyPadding
from calibatt_compiler.kernels.cpu.attention import native_energy
from calibatt_compiler.kernels.dispatch import DeviceFacts, EnergyRequest, choose_energy
from calibatt_compiler.logs import logger

log = logger("kernels")


def block_energy(
    q: Tensor,
    k: Tensor,
    *,
    block: tuple[int, int] = (128, 128),
    scale: float | None = None,
    lse: Tensor | None = None,
    queries: float = 1.0,
    padding: KeyPadding | None = None,
) -> Tensor:
    """Return the block energies of dense attention, never holding a full attention matrix.

    Deterministic: equal operands on one device give equal bits. On a GPU one pass over the keys
    with the log-sum-exp, two without it.

    Args:
        q: (B, H, Sq, D), any strides.
        k: (B, H, Sk, D), same dtype and device.
        block: tokens a query block, tokens a key block.
        scale: factor on the scores; default 1 / sqrt(D).
        lse: float (B, H, Sq), natural log-sum-exp of the scaled scores, if a dense kernel has
            returned it already.
        queries: 1 / n: take the means over the queries 0, n, 2n, ... of each query block only, in
            1 / n of the time; n must divide the query block.
        padding: what a mask says of the keys; the host then waits for the device.

    Returns:
        float32 (B, H, query_blocks, key_blocks), contiguous.

    Raises:
        KernelError: the operands don't fit one another.
    """
    _check(q, k, block, lse)
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    every = _stride(queries, block)
    if every > 1:
        # The block is a multiple of the stride: what is left of each block is a smaller block.
        q, block = q[:, :, ::every], (block[0] // every, block[1])
        lse = None if lse is None else lse[:, :, ::every]
    if padding is None:
        return _energy(q, k, block, factor, lse)
    padding.check(q.shape[0], k.shape[2])
    parts = []
    for part, count in _by_tail(padding, q.shape[0]):
        if count < 1:
            some = _chunked_energy(q[part], k[part], block, factor, None, padding.part(part))
        else:
            some = _energy(q[part], k[part, :, :count], block, factor, None)
        parts.append(F.pad(some, (0, -(-k.shape[2] // block[1]) - some.shape[-1])))
    return torch.cat(parts)


def _energy(
    q: Tensor, k: Tensor, block: tuple[int, int], scale: float, lse: Tensor | None
) -> Tensor:
    """As `block_energy`, of all queries and keys."""
    kernel = _chosen(q, k, block)
    if kernel == "native-energy":
        return native_energy(q, k, None, block, scale, lse)[1]
    if kernel == "triton-energy":
        from calibatt_compiler.kernels.portable.energy_scores import triton_energy

        return triton_energy(q, k, block, scale, lse)
    return _chunked_energy(q, k, block, scale, lse)


def attention_with_energy(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: tuple[int, int] = (128, 128),
    scale: float | None = None,
    queries: float = 1.0,
    fused: bool | None = None,
    padding: KeyPadding | None = None,
) -> tuple[Tensor, Tensor]:
    """Return dense attention's output and its block energies.

    On a CPU one pass serves both. On a GPU it is one kernel for both, or stock SDPA, which also
    gives the log-sum-exp, and a pass for the energies.

    Args:
        q: (B, H, Sq, D), any strides.
        k: (B, H, Sk, D), same dtype and device.
        v: (B, H, Sk, D), same dtype and device.
        block: tokens a query block, tokens a key block.
        scale: factor on the scores; default 1 / sqrt(D).
        queries: as for `block_energy`; the output is always that of all queries.
        fused: on a GPU, one kernel (True) or SDPA and a pass (False); default: see
            `dispatch.fuses`.
        padding: what a mask says of the keys; the host then waits for the device.

    Returns:
        The output (B, H, Sq, D), laid out as contiguous (B, Sq, H, D), in the dtype of q; the
        energies as from `block_energy`.

    Raises:
        KernelError: the operands don't fit one another.
    """
    _check(q, k, block, None)
    if v.shape != k.shape or v.dtype != k.dtype or v.device != k.device:
        raise KernelError(
            "attention values don't fit the keys",
            expected=f"{tuple(k.shape)} {k.dtype} on {k.device}",
            got=f"{tuple(v.shape)} {v.dtype} on {v.device}",
            remedy="pass k and v of one attention call",
        )
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if padding is not None:
        return _padded(q, k, v, block, factor, queries, fused, padding)
    every = _stride(queries, block)
    kernel = _chosen(q, k, block, every=every, output=True, fused=fused)
    if kernel == "native-fused":
        out, energy = native_energy(q, k, v, block, factor, None)
        assert out is not None
        return out, energy
    if kernel == "hopper-fused":
        from calibatt_compiler.kernels.hopper.energy import try_hopper

        both = try_hopper(q, k, v, block, factor)
        if both is not None:
            return both
    if kernel in ("hopper-fused", "triton-fused"):
        from calibatt_compiler.kernels.portable.energy_fused import triton_attention_and_energy

        return triton_attention_and_energy(q, k, v, block, factor)
    known: Tensor | None = None
    if kernel == "triton-energy":
        out, known = dense_attention_and_lse(q, k, v, factor)
    else:
        out = dense_attention(q, k, v, factor)
    return out, block_energy(q, k, block=block, scale=factor, lse=known, queries=queries)


def _padded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: tuple[int, int],
    scale: float,
    queries: float,
    fused: bool | None,
    padding: KeyPadding,
) -> tuple[Tensor, Tensor]:
    """As `attention_with_energy`: a padded tail is left out, by the kernels that serve the rest."""
    padding.check(q.shape[0], k.shape[2])
    outs, energies = [], []
    for part, count in _by_tail(padding, q.shape[0]):
        one = padding.part(part)
        if count < 1:
            log.info("energies by plain torch: the keys that a mask cuts are not the last ones")
            outs.append(dense_attention(q[part], k[part], v[part], scale, one))
            energy = block_energy(
                q[part], k[part], block=block, scale=scale, queries=queries, padding=one
            )
        else:
            out, energy = attention_with_energy(
                q[part], k[part, :, :count], v[part, :, :count],
                block=block, scale=scale, queries=queries, fused=fused,
            )  # fmt: skip
            outs.append(one.clear_rows(out))
            energy = F.pad(energy, (0, -(-k.shape[2] // block[1]) - energy.shape[-1]))
        energies.append(energy)
    return token_major(torch.cat(outs)), torch.cat(energies)


def _by_tail(padding: KeyPadding, batch: int) -> list[tuple[slice, int]]:
    """Samples that are alike, and `KeyPadding.bounds[:, TAIL]` of them; waits for the device."""
    counts = padding.bounds[:, TAIL].tolist()
    if len(set(counts)) == 1:
        return [(slice(0, batch), counts[0])]
    return [(slice(sample, sample + 1), count) for sample, count in enumerate(counts)]


def _chosen(
    q: Tensor,
    k: Tensor,
    block: tuple[int, int],
    *,
    every: int = 1,
    output: bool = False,
    fused: bool | None = None,
) -> str:
    """What serves; see `choose_energy`."""
    lengths = q.shape[2], k.shape[2]
    asked = EnergyRequest(q.device, q.dtype, q.shape[3], lengths, block, every, output, fused)
    return choose_energy(asked, DeviceFacts.of(q.device)).kernel


def _stride(queries: float, block: tuple[int, int]) -> int:
    """n of `queries` = 1 / n."""
    stride = round(1 / queries) if 0 < queries <= 1 else 0
    if not stride or abs(stride * queries - 1) > 1e-6 or block[0] % stride:
        raise KernelError(
            "the share of queries is out of range",
            expected=f"1 / n where n divides the query block of {block[0]} tokens",
            got=queries,
            remedy="use 1, 1/2, 1/4 or 1/8",
        )
    return stride


CHUNK = 1 << 26
"""Scores of all heads that the plain path holds at once."""


def _chunked_energy(
    q: Tensor,
    k: Tensor,
    block: tuple[int, int],
    scale: float,
    lse: Tensor | None,
    padding: KeyPadding | None = None,
) -> Tensor:
    """Plain torch, for devices, head dims and masks without a kernel of their own."""
    batch, heads, length_q, _ = q.shape
    length_k = k.shape[2]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys = k.to(dtype).mT
    key_blocks = -(-length_k // block[1])
    pad = key_blocks * block[1] - length_k
    rows = max(1, CHUNK // (batch * heads * length_k))
    energy = []
    for first in range(0, length_q, block[0]):
        last = min(first + block[0], length_q)
        total = torch.zeros(batch, heads, length_k + pad, dtype=dtype, device=q.device)
        for start in range(first, last, rows):
            part = slice(start, min(start + rows, last))
            scores = q[:, :, part].to(dtype) @ keys * scale
            if padding is not None:
                p = (scores + padding.bias[:, None, None]).softmax(-1)
                p = p.where(padding.valid.any(-1)[:, None, None, None], 0)
            elif lse is None:
                p = scores.softmax(-1)
            else:
                p = scores.sub_(lse[:, :, part, None].to(dtype)).exp_()
            total[..., :length_k] += p.sum(2)
        blocks = total.view(batch, heads, key_blocks, block[1]).sum(-1)
        energy.append(blocks / (last - first))
    return torch.stack(energy, 2).float()


def _check(q: Tensor, k: Tensor, block: tuple[int, int], lse: Tensor | None) -> None:
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
    if len(block) != 2 or any(size < 16 or size > 1024 or size % 16 for size in block):
        raise KernelError(
            "the block size of the energies is out of range",
            expected="two multiples of 16, up to 1024",
            got=block,
            remedy="use blocks of 32, 64 or 128 tokens",
        )
    if lse is not None and (lse.shape != q.shape[:3] or lse.device != q.device):
        raise KernelError(
            "the log-sum-exp doesn't fit the queries",
            expected=f"{tuple(q.shape[:3])} on {q.device}",
            got=f"{tuple(lse.shape)} on {lse.device}",
            remedy="pass the natural log-sum-exp of the scaled scores, one a query token",
        )
