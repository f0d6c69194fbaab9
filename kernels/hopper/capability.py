"""The limits of the Hopper kernel, and what it asks of the installed triton.

Each is a reason in words, so that a fallback to the portable kernel can say why.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module

import torch

from calibatt_compiler.kernels.common.zone_table import MAX_BLOCKS as MAX_ZONE_BLOCKS
from calibatt_compiler.plan.pattern import BlockPattern
from calibatt_compiler.plan.stored import PatternOutline
from calibatt_compiler.plan.zones import ZonePattern

HEAD_DIMS = (64, 128)
BLOCKS = ((128, 128), (128, 64))
DTYPES = (torch.bfloat16, torch.float16)
MAX_BLOCKS = (1 << 15) - 1
"""Query or key blocks: two numbers share each 32-bit word of the tables."""

# What the kernel asks of Gluon, by module; of the names in a tuple one is enough (they changed).
_GLUON = "triton.experimental.gluon"
_NEEDED: dict[str, tuple[tuple[str, ...], ...]] = {
    _GLUON: (("jit",),),
    f"{_GLUON}.language": (
        ("allocate_shared_memory",),
        ("convert_layout",),
        ("inline_asm_elementwise",),
        ("warp_specialize",),
        ("barrier", "thread_barrier"),
        ("BlockedLayout",),
        ("DotOperandLayout",),
        ("NVMMADistributedLayout",),
        ("NVMMASharedLayout",),
        ("SliceLayout",),
        ("tuple",),
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
    "triton.language.core": (("_aggregate",), ("base_value",)),
}


def operand_reason(
    dtype: torch.dtype, head_dim: int, pattern: BlockPattern | PatternOutline | ZonePattern
) -> str | None:
    """Why it can't take such operands, or None if it can."""
    if dtype not in DTYPES:
        return f"it takes bfloat16 and float16, not {dtype}"
    if head_dim not in HEAD_DIMS:
        return f"it takes head dims {' and '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    block = (pattern.block_m, pattern.block_n)
    if block not in BLOCKS:
        return f"it takes blocks of 128x128 and 128x64 tokens, not {block[0]}x{block[1]}"
    if max(pattern.query_blocks, pattern.key_blocks) > MAX_BLOCKS:
        return f"its tables name at most {MAX_BLOCKS} blocks a side"
    if isinstance(pattern, ZonePattern):
        if max(pattern.query_blocks, pattern.key_blocks) > MAX_ZONE_BLOCKS:
            return f"the words of zones name at most {MAX_ZONE_BLOCKS} blocks a side"
    elif pattern.pooled:
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
