"""Whether the Hopper kernel serves: the one place that knows its limits.

Each limit is a reason in words, so that a fallback to the portable kernel can say why.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module

import torch

from calibatt_compiler.plan.pattern import BlockPattern

HEAD_DIMS = (64, 128)
BLOCKS = ((128, 128), (128, 64))
DTYPES = (torch.bfloat16, torch.float16)
MAX_BLOCKS = (1 << 15) - 1
"""Query or key blocks: two numbers share each 32-bit word of the tables."""

DENSE_FROM = 1 << 14
"""Keys from which on it serves dense attention too: there a GPU is far from waiting for its host,
and it was 1.27 times as fast as cuDNN's kernel at twice that (`benchmarks/RESULTS.md`)."""

# What the kernel asks of Gluon, by module; of the names in a tuple one is enough (they changed).
_GLUON = "triton.experimental.gluon"
_NEEDED: dict[str, tuple[tuple[str, ...], ...]] = {
    _GLUON: (("jit",),),
    f"{_GLUON}.language": (
        ("allocate_shared_memory",),
        ("convert_layout",),
        ("inline_asm_elementwise",),
        ("warp_specialize",),
        ("BlockedLayout",),
        ("DotOperandLayout",),
        ("NVMMADistributedLayout",),
        ("NVMMASharedLayout",),
        ("SliceLayout",),
    ),
    f"{_GLUON}.language.nvidia.ampere.async_copy": (
        ("async_load", "async_copy_global_to_shared"),
        ("commit_group",),
        ("mbarrier_arrive",),
        ("wait_group",),
    ),
    f"{_GLUON}.language.nvidia.hopper": (
        ("fence_async_shared",),
        ("warpgroup_mma",),
        ("warpgroup_mma_wait",),
    ),
    f"{_GLUON}.language.nvidia.hopper.mbarrier": (
        ("MBarrierLayout",),
        ("arrive",),
        ("expect",),
        ("init",),
        ("wait",),
    ),
    f"{_GLUON}.language.nvidia.hopper.tma": (
        ("async_load", "async_copy_global_to_shared"),
        ("async_store", "async_copy_shared_to_global"),
        ("store_wait",),
    ),
    f"{_GLUON}.nvidia.hopper": (("TensorDescriptor",),),
}


def hopper_serves(
    device: torch.device, dtype: torch.dtype, head_dim: int, pattern: BlockPattern
) -> str | None:
    """Why the Hopper kernel can't serve such a call, or None if it can.

    Args:
        device: of the operands.
        dtype: of the operands.
        head_dim: of the operands.
        pattern: which blocks are kept.
    """
    return device_reason(device) or operand_reason(dtype, head_dim, pattern) or gluon_reason()


def dense_is_faster(
    device: torch.device, dtype: torch.dtype, head_dim: int, pattern: BlockPattern
) -> bool:
    """Whether the Hopper kernel is the fastest for a pattern that keeps every block.

    Args:
        device: of the operands.
        dtype: of the operands.
        head_dim: of the operands.
        pattern: which keeps every block.
    """
    long = pattern.key_length >= DENSE_FROM
    return long and hopper_serves(device, dtype, head_dim, pattern) is None


def device_reason(device: torch.device) -> str | None:
    """Why this device can't run it: it is of one generation only (compute capability 9.0)."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "it needs an NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return f"it needs a Hopper GPU (sm_90), this one is sm_{major}{minor}"
    return None


def operand_reason(dtype: torch.dtype, head_dim: int, pattern: BlockPattern) -> str | None:
    """Why it can't take such operands."""
    if dtype not in DTYPES:
        return f"it takes bfloat16 and float16, not {dtype}"
    if head_dim not in HEAD_DIMS:
        return f"it takes head dims {' and '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    block = (pattern.block_m, pattern.block_n)
    if block not in BLOCKS:
        return f"it takes blocks of 128x128 and 128x64 tokens, not {block[0]}x{block[1]}"
    if max(pattern.query_blocks, pattern.key_blocks) > MAX_BLOCKS:
        return f"its tables name at most {MAX_BLOCKS} blocks a side"
    if pattern.pooled:
        return "it takes no pooled keys"
    return None


@cache
def gluon_reason() -> str | None:
    """Why the installed triton's Gluon can't compile it: the interface is still experimental."""
    try:
        import triton

        version = triton.__version__
        for module, groups in _NEEDED.items():
            found = import_module(module)
            for names in groups:
                if not any(hasattr(found, name) for name in names):
                    return f"triton {version} has no {module}.{' or '.join(names)}"
        from triton.experimental.gluon.language import shared_memory_descriptor

        methods = ("index", "load", "permute", "reshape", "store")
        for either in (*((name,) for name in methods), ("reinterpret", "_reinterpret")):
            if not any(hasattr(shared_memory_descriptor, name) for name in either):
                words = " or ".join(either)
                return f"triton {version} has no shared_memory_descriptor.{words}"
    except ImportError as error:
        return f"the installed triton has no Gluon for Hopper: {error}"
    return None
