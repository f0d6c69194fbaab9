"""Dense attention and its block energies on Hopper GPUs: the energies cost next to nothing more.

The consumers of the Hopper kernel have each row's sum of exponentials over a key block anyway. With
`ENERGY` they store its log2, 4 bytes for each query and key block, and a second, small kernel reads
them back once the rows' log-sum-exp is known. As many heads share a launch as fit a budget.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from calibatt_compiler.kernels.common.operands import empty_output
from calibatt_compiler.kernels.hopper.attention import HopperAttention
from calibatt_compiler.kernels.hopper.kernel import hopper_energies
from calibatt_compiler.kernels.portable.launch import on_device
from calibatt_compiler.kernels.portable.tiles import multiprocessors
from calibatt_compiler.kernels.request import KernelRequest
from calibatt_compiler.kernels.tiered import FirstLaunch
from calibatt_compiler.plan.pattern import BlockPattern

SUMS_BYTES = 512 << 20
"""Most that the kept sums of one launch may take, unless one head's take more."""

POSITIONS = 16
"""Key blocks that one program of `hopper_energies` sums."""


_launches: dict[tuple[torch.dtype, tuple[int, int]], FirstLaunch] = {}
"""Whether launches turned out to be possible here, by dtype and block."""


@lru_cache(maxsize=16)
def _kernel(
    heads: int,
    lengths: tuple[int, int],
    block: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
) -> HopperAttention:
    """Kept, for its schedule takes longer to make than to run."""
    pattern = BlockPattern.dense(heads, *lengths, block)
    request = KernelRequest(pattern, device=device, dtype=dtype, head_dim=head_dim)
    return HopperAttention(request)


def heads_a_launch(heads: int, length_q: int, key_blocks: int, programs: int) -> int:
    """How many heads share a launch: within the budget, the number that leaves programs least idle.

    Args:
        heads: of the call.
        length_q: queries.
        key_blocks: of a row.
        programs: that run at a time.
    """
    tiles = -(-length_q // 128)
    fit = min(heads, max(1, SUMS_BYTES // (4 * 128 * tiles * (key_blocks | 1))))

    def idle(count: int) -> tuple[float, int]:
        rounds = count * tiles / programs
        return round(math.ceil(rounds) / rounds, 2), -count

    return min(range(1, fit + 1), key=idle)


def hopper_attention_and_energy(
    q: Tensor, k: Tensor, v: Tensor, block: tuple[int, int], scale: float
) -> tuple[Tensor, Tensor]:
    """Return dense attention's output and its block energies.

    Args:
        q: (B, H, Sq, D), bfloat16 or float16; strides that TMA can't read cost a copy.
        k: (B, H, Sk, D).
        v: (B, H, Sk, D).
        block: (128, 128) or (128, 64) tokens a query block, a key block.
        scale: factor on the scores.

    Returns:
        (B, H, Sq, D) laid out as contiguous (B, Sq, H, D); float32 (B, H, query_blocks,
        key_blocks).

    Raises:
        KernelError: the Hopper kernel takes no such operands.
    """
    q, k, v = q.detach(), k.detach(), v.detach()
    batch, heads, length_q, head_dim = q.shape
    length_k = k.shape[2]
    query_blocks, key_blocks = -(-length_q // block[0]), -(-length_k // block[1])
    out = empty_output(q)
    energy = q.new_empty(batch, heads, query_blocks, key_blocks, dtype=torch.float32)
    step = heads_a_launch(heads, length_q, key_blocks, multiprocessors(q.device))
    sums = q.new_empty(step, query_blocks, key_blocks | 1, 128, dtype=torch.float32)
    lse = q.new_empty(1, step, length_q, dtype=torch.float32)
    for first in range(0, heads, step):
        part = slice(first, min(first + step, heads))
        count = part.stop - part.start
        kernel = _kernel(count, (length_q, length_k), block, q.device, q.dtype, head_dim)
        for item in range(batch):
            here = slice(item, item + 1), part
            kernel.write(
                (q[here], k[here], v[here], out[here]),
                scale=scale, lse=lse[:, :count], sums=sums[None, :count],
            )  # fmt: skip
            with on_device(q):
                hopper_energies[(count * query_blocks, -(-key_blocks // POSITIONS))](
                    sums, lse, energy[item, part], query_blocks, key_blocks, length_q,
                    BLOCK_N=block[1], POSITIONS=POSITIONS, num_warps=4,
                )  # fmt: skip
    return out, energy


def try_hopper(
    q: Tensor, k: Tensor, v: Tensor, block: tuple[int, int], scale: float
) -> tuple[Tensor, Tensor] | None:
    """Do `hopper_attention_and_energy`; None where it turns out not to compile here."""
    first = _launches.setdefault((q.dtype, block), FirstLaunch("no Hopper kernel: "))
    if first.reason is not None:
        return None
    return first.attempt(lambda: hopper_attention_and_energy(q, k, v, block, scale))
