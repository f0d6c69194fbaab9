"""Zones as kernels read them: one line of words a row of blocks, and the runs of all groups.

The step is not in them. A kernel adds the step's phase to where a row's sum of rates begins, and
draws the row's blocks by whole numbers as it walks the runs: see `plan.zones.drawing`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from calibatt_compiler.errors import KernelError
from calibatt_compiler.plan.intervals import expand, sums_before
from calibatt_compiler.plan.zones import drawing

if TYPE_CHECKING:
    from calibatt_compiler.plan.zones import ZonePattern

Words = npt.NDArray[np.int32]

MAX_BLOCKS = (1 << 14) - 1
"""Query or key blocks: 128 units for each, a start and an octave share a word."""

_ENDLESS = (1 << 16) - 1
"""Stands for the end of a run that goes on behind all keys."""


@dataclass(frozen=True)
class ZoneTable:
    """The words of a pattern.

    Attributes:
        rows: int32 (heads * query_blocks, 4), row after row of head after head:
            head << 16 | query block;
            where the row's sum begins at phase 0 | units of the row << 7 | octave of the last key
            block << 28, less 2^31 where the lead is the last key block;
            lead | runs << 16;
            the first run; less 2^31 where the group is diagonal.
        runs: int32 (runs + 1), group after group, equal groups once: octave | the key block before
            which the run ends << 3, and a spare. A run begins where the one before ends, the first
            at key block 0. In diagonal groups the query block is added to the end. Ends are clamped
            to the key blocks without text, but the last run of a group ends with the keys.
        heads: int32 (runs), the lowest head that has the run.
        units: int64 (heads, query_blocks), expected kept blocks in units of 1 / 128.
        left: first key block without text.
        right: one past the last.
    """

    rows: Words
    runs: Words
    heads: Words
    units: npt.NDArray[np.int64]
    left: int
    right: int


def zone_table(zones: ZonePattern) -> ZoneTable:
    """Write the words of a pattern.

    Raises:
        KernelError: more blocks than the words can name.
    """
    blocks = max(zones.query_blocks, zones.key_blocks)
    if blocks > MAX_BLOCKS:
        raise KernelError(
            "a pattern of zones has too many blocks",
            expected=f"at most {MAX_BLOCKS} a side",
            got=blocks,
            remedy="use larger blocks, or the option lowering='reference'",
        )
    (top, bottom), (left, right) = zones.rows, zones.columns
    head, block = np.divmod(np.arange(zones.heads * zones.query_blocks), zones.query_blocks)
    runs = zones.row_runs()
    units = runs.units()
    start = np.zeros((zones.heads, zones.query_blocks), np.int64)
    start[:, top:bottom] = drawing.starts(zones.heads, bottom - top)
    leads = zones.row_leads().reshape(-1).astype(np.int64)
    last = runs.octaves[runs.offsets[1:] - 1].astype(np.int64)
    drawn = start.reshape(-1) | units << 7 | last << 28
    drawn -= np.where(leads == zones.key_blocks - 1, 1 << 31, 0)

    stream, owners, first, number = _streams(zones)
    groups = np.zeros((zones.heads, zones.query_blocks), np.int64)
    if len(zones.counts):
        begin, end = zones.group_edges
        of_rows = np.repeat(np.arange(len(begin)), end - begin)
        groups[:, top:bottom] = of_rows.reshape(zones.heads, -1) + 1
    group = groups.reshape(-1)
    diagonal = np.concatenate([[0], zones.diagonal])[group] == 1
    words = [
        head << 16 | block,
        drawn,
        leads | number[group] << 16,
        first[group] - np.where(diagonal, 1 << 31, 0),
    ]
    return ZoneTable(
        np.stack(words, 1).astype(np.int32),
        np.append(stream, 0).astype(np.int32),
        owners.astype(np.int32),
        units.reshape(zones.heads, -1),
        left,
        right,
    )


def _streams(zones: ZonePattern) -> tuple[npt.NDArray[np.int64], ...]:
    """Words of all groups, equal ones once, and the head of each word.

    Group 0 is that of rows with text, which keep all keys: one run. Its words come first.

    Returns:
        Words; heads; the first word of each group and how many it has.
    """
    (top, _), (left, right) = zones.rows, zones.columns
    counts = zones.counts.astype(np.int64)
    before, after = int(left > 0), int(right < zones.key_blocks)
    # A run ends where its group's next one begins, the last one behind all keys.
    ends = np.full(len(zones.octaves), _ENDLESS, np.int64)
    last = zones.run_offsets[1:] - 1
    inner = np.ones(len(ends), np.bool_)
    inner[last] = False
    slanted = np.repeat(zones.diagonal == 1, counts)
    # The query block will be added, of which the first without text counts as row 0.
    origin = left - np.where(slanted, top, 0)
    ends[inner] = np.clip(zones.cuts + origin[inner], -_ENDLESS, _ENDLESS - MAX_BLOCKS)
    words = zones.octaves | ends << 3
    number = counts + before + after
    offsets = sums_before(number)
    full = np.zeros(offsets[-1], np.int64)
    if before:
        full[offsets[:-1]] = -_ENDLESS << 3  # clamped to the first key block without text
    full[np.repeat(offsets[:-1] + before, counts) + expand(np.zeros_like(counts), counts)] = words
    # Equal groups share their words; a word of octave 0 and end 0 is all that text rows need.
    found: dict[bytes, int] = {b"": 0}
    parts, owners, first, held = [np.zeros(1, np.int64)], [0], [0], 1
    heads = np.repeat(np.arange(zones.heads), zones.head_groups)
    for group, head in enumerate(heads.tolist()):
        part = full[offsets[group] : offsets[group + 1]]
        at = found.setdefault(part.tobytes(), held)
        first.append(at)
        if at == held:
            parts.append(part)
            owners += [head] * len(part)
            held += len(part)
    sizes = np.concatenate([[1], number])
    return np.concatenate(parts), np.array(owners), np.array(first), sizes
