"""Write a block mask as few intervals whose bounds are affine in the query block.

Straight-line source holds every interval bound as a literal, so a kernel has a budget of them. A
head is cut into segments of consecutive query blocks; within a segment each interval of key blocks
runs from `slope * r + offset` to another such bound, r being the query block:

- slope 0: the same key blocks for all rows of the segment (frame-local rectangles, global columns);
- the diagonal's slope (block_m / block_n, mostly 1): bands at a fixed distance from the diagonal,
  clipped to the keys, between a prefix and a suffix of global columns.

Segments start as single rows and are merged wherever that adds no block and saves literals. A mask
that still takes more than the budget has no cover: tables serve it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.baked.cover_merge import HeadSegments
from calibatt_compiler.kernels.baked.cover_template import Cover
from calibatt_compiler.plan.pattern import BlockPattern


@dataclass(frozen=True)
class CoverLimits:
    """What a cover may take.

    Attributes:
        literals: that a kernel may hold: interval bounds, and one row boundary a segment.
        intervals: that a row may have: their bounds stay in registers while the kernel runs.
    """

    literals: int = 2048
    intervals: int = 16


EXACT = CoverLimits()
"""The limits of what is generated."""

PORTABLE_INTERVALS = 6
"""Intervals that a row may have in a portable kernel. There every thread finds the next key tile by
itself, with two operations an interval: with 14 of them the loop is a sixth longer than that of the
table kernel, spills, and takes 16 % more time on an H100 (decision 4); with 6 it is as long."""


class CoverError(KernelError):
    """A mask can't be covered within its limits."""


def cover_pattern(pattern: BlockPattern, limits: CoverLimits = EXACT) -> Cover:
    """Write `pattern` as intervals within limits; equal heads share one form, which counts once.

    Raises:
        CoverError: it takes more.
    """
    mask = _filled(pattern)
    forms, head_forms = _distinct_heads(mask)
    aligned = pattern.block_m % pattern.block_n == 0
    slope = pattern.block_m // pattern.block_n if aligned else 1
    most = f"{limits.literals} literals and {limits.intervals} intervals a row"
    cover = Cover(
        pattern.query_blocks,
        pattern.key_blocks,
        forms=tuple(HeadSegments(mask[h], slope, limits.intervals).segments() for h in forms),
        head_forms=tuple(head_forms),
    )
    if cover.literals > limits.literals or cover.max_intervals > limits.intervals:
        raise CoverError(f"the mask takes more than {most}")
    assert denotes(cover, pattern), "a cover must keep the blocks of its mask and no others"
    return cover


def denotes(cover: Cover, pattern: BlockPattern) -> bool:
    """Whether a cover of its size keeps the blocks of `pattern`, in the rows that are computed."""
    mask = cover.mask() & pattern.computed_rows()[..., None]
    return np.array_equal(np.packbits(mask, axis=-1, bitorder="little"), pattern.bits)


def _filled(pattern: BlockPattern) -> npt.NDArray[np.bool_]:
    """The mask, with rows that are not computed like the last one that is: no row is empty."""
    mask, computed = pattern.numpy_mask(), pattern.computed_rows()
    for head in np.flatnonzero(~computed.all(1)).tolist():
        rows = int(computed[head].sum())
        mask[head, rows:] = mask[head, rows - 1]
    return mask


def _distinct_heads(mask: npt.NDArray[np.bool_]) -> tuple[list[int], list[int]]:
    """First head of each distinct form, and each head's index into that list."""
    known: dict[bytes, int] = {}
    first: list[int] = []
    forms = []
    for head, rows in enumerate(np.packbits(mask, axis=-1)):
        form = known.setdefault(rows.tobytes(), len(first))
        if form == len(first):
            first.append(head)
        forms.append(form)
    return first, forms
