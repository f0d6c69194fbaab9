"""Cover a block mask by few intervals whose bounds are affine in the query block.

Straight-line source holds every interval bound as a literal, so a kernel has a budget of them. A
head is cut into segments of consecutive query blocks; within a segment each interval of key blocks
runs from `slope * r + offset` to another such bound, r being the query block:

- slope 0: the same key blocks for all rows of the segment (frame-local rectangles, global columns);
- the diagonal's slope (block_m / block_n, mostly 1): bands at a fixed distance from the diagonal,
  clipped to the keys, between a prefix and a suffix of global columns.

Segments start as single rows, where the cover is exact, and are merged, the cheapest merge first:
fewest added blocks for each literal saved. Merges that add nothing always happen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.baked.cover_merge import Merger, TooManyBlocks
from calibatt_compiler.kernels.baked.cover_template import Cover
from calibatt_compiler.plan.pattern import BlockPattern


@dataclass(frozen=True)
class CoverLimits:
    """What a cover may take.

    Attributes:
        literals: that a kernel may hold: interval bounds, and one row boundary a segment.
        intervals: that a row may have: their bounds stay in registers while the kernel runs.
        widening: blocks that may be added / blocks that the mask keeps; 0: the mask itself.
    """

    literals: int = 2048
    intervals: int = 16
    widening: float = 0.0


EXACT = CoverLimits()
"""What is generated without being asked for: the table kernel, which serves meanwhile, gives the
same bits."""

WIDENED = CoverLimits(widening=0.05)
"""What `calibatt build` generates. Literals are no faster than tables by more than that
(`docs/decisions/0004`), so a cover that adds more is not worth it."""

PORTABLE_INTERVALS = 6
"""Intervals that a row may have in a portable kernel. There every thread finds the next key tile by
itself, with two operations an interval: with 14 of them the loop is a sixth longer than that of the
table kernel, spills, and takes 16 % more time on an H100 (decision 4); with 6 it is as long."""


@dataclass(frozen=True)
class Covering:
    """A cover and what it costs.

    Attributes:
        cover: the symbolic form.
        pattern: the exact mask that the cover denotes; keeps at least what was asked for.
        added_density: (blocks of `pattern` - blocks asked for) / all blocks.
    """

    cover: Cover
    pattern: BlockPattern
    added_density: float


class CoverError(KernelError):
    """A mask can't be covered within its limits."""


def cover_pattern(pattern: BlockPattern, limits: CoverLimits = EXACT) -> Covering:
    """Cover `pattern` within limits.

    Exact when the exact form fits both. Equal heads share one form, which counts once.

    Raises:
        CoverError: a cover would add more than `limits.widening`; the search ends as soon as
            that is certain.
        KernelError: a budget too small for even one interval a head (three literals), or less than
            3 intervals a row (a prefix, a band, a suffix).
    """
    mask = _filled(pattern)
    forms, head_forms = _distinct_heads(mask)
    if limits.literals < 3 * len(forms) or limits.intervals < 3:
        raise KernelError(
            "the budget of literals is too small to cover this pattern at all",
            expected=f"at least {3 * len(forms)} literals and 3 intervals a row",
            got=f"{limits.literals} literals, {limits.intervals} intervals",
            remedy="raise the budget, or take lowering='table'",
        )
    aligned = pattern.block_m % pattern.block_n == 0
    slope = pattern.block_m // pattern.block_n if aligned else 1
    rows = [mask[head] for head in forms]
    allowed = limits.widening * pattern.kept
    work = Merger(rows, slope, limits.literals, limits.intervals, allowed)
    try:
        segments = work.run()
    except TooManyBlocks as error:
        raise _too_large(limits) from error
    cover = Cover(
        pattern.query_blocks,
        pattern.key_blocks,
        forms=tuple(tuple(segments[form]) for form in range(len(forms))),
        head_forms=tuple(head_forms),
    )
    superset = denoted_pattern(cover, pattern)
    added = superset.kept - pattern.kept
    assert not (pattern.bits & ~superset.bits).any(), "a cover must keep every block of its mask"
    if added == 0:
        return Covering(cover, pattern, 0.0)
    if added > allowed:
        raise _too_large(limits)
    return Covering(cover, superset, added / mask.size)


def denoted_pattern(cover: Cover, pattern: BlockPattern) -> BlockPattern:
    """Return `pattern` with the blocks that a cover of it denotes, in the rows that it computes."""
    mask = cover.mask() & pattern.computed_rows()[..., None]
    return replace(pattern, bits=np.packbits(mask, axis=-1, bitorder="little"))


def _filled(pattern: BlockPattern) -> npt.NDArray[np.bool_]:
    """The mask, with rows that are not computed like the last one that is: no row is empty."""
    mask, computed = pattern.numpy_mask(), pattern.computed_rows()
    for head in np.flatnonzero(~computed.all(1)).tolist():
        rows = int(computed[head].sum())
        mask[head, rows:] = mask[head, rows - 1]
    return mask


def _too_large(limits: CoverLimits) -> CoverError:
    most = f"{limits.literals} literals and {limits.intervals} intervals a row"
    if not limits.widening:
        return CoverError(f"the mask takes more than {most}")
    return CoverError(f"{most} cover the mask only with over {limits.widening:.0%} of it added")


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
