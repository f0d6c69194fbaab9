"""The sizes that a pattern may have."""

from __future__ import annotations

from calibatt_compiler.errors import PlanError

MAX_LENGTH = 1 << 24
"""Longest sequence a pattern may describe, in tokens: above it a size is taken for damage."""

MAX_ORDERED = 1 << 21
"""Likewise of a grid whose tokens are laid out anew, and of a sequence whose rows are copied: these
take tables of all tokens. 720p videos of 81 frames have 75,600."""

MAX_SITES = 1 << 12
"""Most attention calls of a plan."""

MAX_STEPS = 10_000
"""Most diffusion steps of a plan."""

MAX_HEADS = 1 << 12


def check_sizes(heads: int, query_length: int, key_length: int, block_m: int, block_n: int) -> None:
    """Raise `PlanError` unless all sizes are integers in a sensible range."""
    limits = (
        ("heads", heads, MAX_HEADS),
        ("query_length", query_length, MAX_LENGTH),
        ("key_length", key_length, MAX_LENGTH),
        ("block_m", block_m, 1024),
        ("block_n", block_n, 1024),
    )
    for name, value, limit in limits:
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
            raise PlanError(
                f"{name} of a pattern is out of range",
                expected=f"an integer from 1 to {limit}",
                got=repr(value),
                remedy="check the plan's sizes, or calibrate again",
            )
    for name, value in (("block_m", block_m), ("block_n", block_n)):
        if value % 16:
            raise PlanError(
                f"{name} of a pattern can't be tiled",
                expected="a multiple of 16",
                got=value,
                remedy="use blocks of 32, 64 or 128 tokens",
            )
