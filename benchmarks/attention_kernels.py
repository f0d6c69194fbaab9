"""Kernels that `attention.py` compares: dense and sparse attention of others, and ours.

A contestant is made for a pattern and operands. One that can't be made says why; nothing is left
out in silence.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from calibatt_compiler.kernels.request import KernelRequest, Target
from calibatt_compiler.plan.pattern import BlockPattern

Operands = tuple[Tensor, Tensor, Tensor]
Run = Callable[[], Tensor]
BAKED_SECONDS = 90.0


@dataclass(frozen=True)
class Contestant:
    """A kernel ready to run.

    Attributes:
        run: one call; returns (1, H, S, D).
        density: blocks computed / all blocks.
        pattern: what it computes, or None where that is everything.
        kernel: ours, for what it counts.
    """

    run: Run
    density: float
    pattern: BlockPattern | None
    kernel: Any = None


def fa3_function() -> Callable[..., Any]:
    """`flash_attn_func` of FlashAttention-3: its own build, or the wheel `fa3-fwd`."""
    try:
        return importlib.import_module("flash_attn_interface").flash_attn_func  # type: ignore[no-any-return]
    except ImportError:
        # The wheel's interface asks for its config under the name of the source build.
        config = importlib.import_module("fa3_fwd_config")
        sys.modules.setdefault("flash_attn_config", config)
        return importlib.import_module("fa3_fwd_interface").flash_attn_func  # type: ignore[no-any-return]


def fa3(_: BlockPattern, operands: Operands) -> Contestant:
    """FlashAttention-3, dense."""
    function = fa3_function()
    q, k, v = (x.transpose(1, 2) for x in operands)

    def run() -> Tensor:
        result = function(q, k, v)
        out: Tensor = result[0] if isinstance(result, tuple) else result
        return out.transpose(1, 2)

    return Contestant(run, 1.0, None)


def _fa4(*, sparse: bool) -> Callable[[BlockPattern, Operands], Contestant]:
    """FlashAttention-4 (`pip install --pre flash-attn-4`): dense, or block-sparse."""

    def make(pattern: BlockPattern, operands: Operands) -> Contestant:
        function = importlib.import_module("flash_attn.cute").flash_attn_func
        q, k, v = (x.transpose(1, 2) for x in operands)
        given: dict[str, Any] = {}
        if sparse:
            module = importlib.import_module("flash_attn.cute.block_sparsity")
            counts, indices = (x[None].to(q.device) for x in pattern.kv_blocks())
            given["block_sparse_tensors"] = module.BlockSparseTensorsTorch(
                mask_block_cnt=torch.zeros_like(counts),
                mask_block_idx=indices,
                full_block_cnt=counts,
                full_block_idx=indices,
                block_size=(pattern.block_m, pattern.block_n),
            )

        def run() -> Tensor:
            result = function(q, k, v, **given)
            out: Tensor = result[0] if isinstance(result, tuple) else result
            return out.transpose(1, 2)

        return Contestant(run, *((pattern.density, pattern) if sparse else (1.0, None)))

    return make


def _sdpa(backend: SDPBackend) -> Callable[[BlockPattern, Operands], Contestant]:
    def make(_: BlockPattern, operands: Operands) -> Contestant:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*operands)

        return Contestant(run, 1.0, None)

    return make


def _flex(**options: int) -> Callable[[BlockPattern, Operands], Contestant]:
    def make(pattern: BlockPattern, operands: Operands) -> Contestant:
        from torch.nn.attention.flex_attention import BlockMask, flex_attention

        counts, indices = (x[None].to(operands[0].device) for x in pattern.kv_blocks())
        mask = BlockMask.from_kv_blocks(
            torch.zeros_like(counts),
            indices,
            counts,
            indices,
            BLOCK_SIZE=(pattern.block_m, pattern.block_n),
            seq_lengths=(pattern.query_length, pattern.key_length),
        )
        compiled = torch.compile(flex_attention, dynamic=False)

        def run() -> Tensor:
            out: Tensor = compiled(*operands, block_mask=mask, kernel_options=options)
            return out

        return Contestant(run, pattern.density, pattern)

    return make


def _ours(pattern: BlockPattern, operands: Operands, kernel: Any) -> Contestant:
    return Contestant(lambda: kernel(*operands), kernel.density, kernel.pattern, kernel)


def _where(operands: Operands) -> dict[str, Any]:
    q = operands[0]
    return {"device": q.device, "dtype": q.dtype, "head_dim": q.shape[-1]}


def table(pattern: BlockPattern, operands: Operands) -> Contestant:
    """Ours, portable, by tables."""
    from calibatt_compiler.kernels.portable.attention import TableAttention

    return _ours(pattern, operands, TableAttention(KernelRequest(pattern, **_where(operands))))


def _baked(target: Target) -> Callable[[BlockPattern, Operands], Contestant]:
    def make(pattern: BlockPattern, operands: Operands) -> Contestant:
        from calibatt_compiler.kernels.baked.attention import BakedTier

        tier = BakedTier(KernelRequest(pattern, **_where(operands)), target)
        if not tier.wait(BAKED_SECONDS):
            raise RuntimeError(tier.reason or f"not compiled after {BAKED_SECONDS:.0f} s")
        return _ours(pattern, operands, tier.kernel())

    return make


def _hopper(softmax: str) -> Callable[[BlockPattern, Operands], Contestant]:
    def make(pattern: BlockPattern, operands: Operands) -> Contestant:
        from calibatt_compiler.kernels.hopper.attention import HopperAttention

        kernel = HopperAttention(KernelRequest(pattern, **_where(operands), softmax=softmax))  # type: ignore[arg-type]
        return _ours(pattern, operands, kernel)

    return make


def _weighted(make: Callable[[BlockPattern, Operands], Contestant]) -> Any:
    """The same with a weight of its own, from 1 to 16, for each kept block."""

    def make_weighted(pattern: BlockPattern, operands: Operands) -> Contestant:
        mask = pattern.mask()
        octaves = 4 * torch.rand(mask.shape, generator=torch.Generator().manual_seed(2))
        weighted = BlockPattern.from_mask(
            mask,
            query_length=pattern.query_length,
            key_length=pattern.key_length,
            block=(pattern.block_m, pattern.block_n),
            weight=2.0**octaves,
        )
        return make(weighted, operands)

    return make_weighted


def reference(pattern: BlockPattern, operands: Operands) -> Contestant:
    """The definition."""
    from calibatt_compiler.kernels.reference.attention import ReferenceAttention

    return _ours(pattern, operands, ReferenceAttention(pattern))


def cpu(pattern: BlockPattern, operands: Operands) -> Contestant:
    """Ours on a CPU."""
    from calibatt_compiler.kernels.attention import make_attention

    kernel = make_attention(KernelRequest(pattern, lowering="table", **_where(operands)))
    return Contestant(lambda: kernel(*operands), pattern.density, pattern, kernel)


DENSE = {
    "fa3": fa3,
    "fa4": _fa4(sparse=False),
    "cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "flash": _sdpa(SDPBackend.FLASH_ATTENTION),
    "math": _sdpa(SDPBackend.MATH),
}
SPARSE = {
    "fa4 sparse": _fa4(sparse=True),
    "flex": _flex(),
    "flex 128x64": _flex(BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=3),
    "flex 128x128": _flex(BLOCK_M=128, BLOCK_N=128, num_warps=8, num_stages=2),
    "table": table,
    "baked": _baked("portable"),
    "hopper exact": _hopper("exact"),
    "hopper fixed": _hopper("fixed"),
    "hopper literals": _baked("hopper"),
    "table weighted": _weighted(table),
    "hopper weighted": _weighted(_hopper("fixed")),
    "reference": reference,
    "cpu": cpu,
}
ALL = DENSE | SPARSE
