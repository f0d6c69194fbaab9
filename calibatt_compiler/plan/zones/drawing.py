"""How octave zones are drawn: in whole numbers, so that every implementation agrees bit for bit.

A block of octave k is kept at the rate 2^-k, which is `UNIT >> k` units of 1 / `UNIT`. A row is
walked in the order of keys with a running sum of rates that begins at the row's start, a whole
number of units: a block is kept if the sum passes a multiple of `UNIT` in it (the systematic sample
of Madow, Ann. Math. Stat. 20, 1949). All sums are whole, so a start that is finer than a unit would
draw nothing else, and over the `UNIT` starts each block is kept in exactly its rate of them.

Within a run of one octave the kept blocks are an arithmetic progression. With x the sum at the
run's first block modulo `UNIT`, block j of the run is kept if `(x >> 7 - k) + j` is 2^k - 1 modulo
2^k: the first is `2^k - 1 - (x >> 7 - k)`, then every 2^k-th. A run of n blocks has
`(x + (n << 7 - k)) >> 7` of them and leaves `(x + (n << 7 - k)) & 127` to the next. Blocks of
octave 0 are whole, so they leave the sum as it was.

The start of a row is `start(head, row) + phase(step)` modulo `UNIT`. A kernel takes the phase as a
number; heads and rows are spread by Weyl sequences, which are even along either. The phase is the
step with its bits reversed (van der Corput's sequence): 2^k steps in a row, from a multiple of 2^k
on, keep each block of octave k exactly once. So errors of the draw cancel over steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from calibatt_compiler.plan.intervals import expand, sums_before

FORMULA = 1
"""Version of the formula, as plans record it. Another one needs another number."""

OCTAVES = 8
"""Octaves are 0 to 7."""

BITS = OCTAVES - 1
UNIT = 1 << BITS
"""Units of the running sum in a whole block."""

ROW, HEAD = 0x9E3779B9, 0xC13FA9A9
"""Weyl constants modulo 2^32: the inverse golden ratio and the inverse plastic number."""

Ints = npt.NDArray[np.int32]


def starts(heads: int, rows: int) -> Ints:
    """Return the starts of rows at phase 0, int32 (heads, rows): 0 to `UNIT` - 1."""
    head = np.arange(heads, dtype=np.uint32)[:, None] * np.uint32(HEAD)
    row = np.arange(rows, dtype=np.uint32) * np.uint32(ROW)
    found: Ints = ((head + row) >> np.uint32(32 - BITS)).astype(np.int32)
    return found


def phase(step: int, seed: int = 0) -> int:
    """Return what a step adds to the starts of all rows, 0 to `UNIT` - 1.

    Args:
        step: the diffusion step, from 0.
        seed: of the pattern, 0 to `UNIT` - 1: tells sites apart.
    """
    bits = step % UNIT
    reversed_bits = sum((bits >> bit & 1) << BITS - 1 - bit for bit in range(BITS))
    return (reversed_bits + seed) % UNIT


def seed_of(site: int) -> int:
    """Return the seed of the plan's site of a number: spread evenly, as rows are."""
    return site * ROW % (1 << 32) * UNIT >> 32


def sample(
    octaves: npt.NDArray[np.integer], start: npt.NDArray[np.integer]
) -> npt.NDArray[np.bool_]:
    """Draw by the definition: the plain form that all others must equal.

    Args:
        octaves: integers (..., key_blocks), 0 to 7.
        start: integers (...), 0 to `UNIT` - 1.

    Returns:
        bool like `octaves`, the kept blocks.
    """
    rates = UNIT >> octaves.astype(np.int64)
    upper = rates.cumsum(-1) + start[..., None]
    kept: npt.NDArray[np.bool_] = (upper >> BITS) > (upper - rates >> BITS)
    return kept


@dataclass(frozen=True)
class DrawnRuns:
    """The kept blocks of one step as progressions, row by row, the way of a compressed row matrix.

    Row `head * query_blocks + query_block` owns the progressions `offsets[row]` to
    `offsets[row + 1]`, in the order of keys. Progression i keeps the `counts[i]` blocks
    `firsts[i] + j * 2^octaves[i]`, each with the weight 2^octaves[i]; none is empty.

    Attributes:
        offsets: int64 (rows + 1,).
        firsts: int32.
        counts: int32, at least 1.
        octaves: uint8.
        leads: int32 (rows,): the block that a kernel visits first, of octave 0, since its scores
            are the softmax shift. The others follow in the order of keys.
    """

    offsets: npt.NDArray[np.int64]
    firsts: Ints
    counts: Ints
    octaves: npt.NDArray[np.uint8]
    leads: Ints

    def kept(self) -> npt.NDArray[np.int64]:
        """Kept blocks of each row, int64 (rows,)."""
        return np.diff(sums_before(self.counts)[self.offsets])

    def blocks(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
        """All kept key blocks in the order of keys, row after row, and their octaves."""
        each = np.repeat(np.arange(len(self.counts)), self.counts)
        index = expand(np.zeros_like(self.counts), self.counts)
        octaves = self.octaves[each]
        return self.firsts[each] + (index << octaves), octaves

    def walk(self) -> npt.NDArray[np.int64]:
        """All kept key blocks in the order in which a kernel visits them, row after row."""
        columns, _ = self.blocks()
        row = np.repeat(np.arange(len(self.leads)), self.kept())
        leads = columns == self.leads[row]
        return columns[np.lexsort((columns, ~leads, row))]


def progressions(
    offsets: npt.NDArray[np.int64],
    begins: Ints,
    ends: Ints,
    octaves: npt.NDArray[np.uint8],
    start: npt.NDArray[np.integer],
    leads: Ints,
) -> DrawnRuns:
    """Draw in closed form.

    Args:
        offsets: int64 (rows + 1,), which runs each row owns.
        begins: int32, first key block of each run.
        ends: int32, one past its last.
        octaves: uint8, of each run.
        start: integers (rows,), where each row's sum begins.
        leads: see `DrawnRuns`.
    """
    shift = (BITS - octaves).astype(np.int64)
    units = (ends - begins).astype(np.int64) << shift
    # The sum at each run: the row's start and the units of the row's runs before it.
    before = sums_before(units)
    row = np.repeat(np.arange(len(start)), np.diff(offsets))
    at = (before[:-1] - before[offsets[row]] + start[row]) & UNIT - 1
    counts = at + units >> BITS
    firsts = begins + (1 << octaves.astype(np.int64)) - 1 - (at >> shift)
    some = counts > 0
    return DrawnRuns(
        sums_before(some)[offsets],
        firsts[some].astype(np.int32),
        counts[some].astype(np.int32),
        octaves[some],
        leads,
    )
