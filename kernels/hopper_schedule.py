"""Which program of the Hopper kernel works on which tile, and in which order it takes the keys.

Made once for a pattern, on the host. A tile is one query block of one head. Programs are
persistent: each owns a list of tiles, so that none waits for another.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from calibatt_compiler.errors import KernelError
from calibatt_compiler.plan.intervals import expand, first_behind, runs_of_bits, sums_before
from calibatt_compiler.plan.pattern import BlockPattern

TILE_COST = 2
"""What a tile costs beyond its key blocks, in key blocks: filling the pipe, storing the output."""

TAIL_TILES = 4
"""The last tiles, this many a program, are taken longest first."""

Words = npt.NDArray[np.int32]


@dataclass(frozen=True)
class KeyRuns:
    """Key blocks of every row in the order in which a tile takes them.

    Row `r = head * query_blocks + block` takes its first block, then the others from the lowest
    upwards: programs that work on a head at the same time then ask for the same keys at about the
    same time.

    Attributes:
        offsets: int64 (rows + 1), first run of each row.
        starts: int32 (runs), first key block of each run.
        lengths: int32 (runs), at least 1.
        blocks: int64 (rows), kept key blocks.
        below: int64 (rows), those of them below the first one taken.
        masked: int64 (rows), position of the last key block among those taken, or -1.
    """

    offsets: npt.NDArray[np.int64]
    starts: Words
    lengths: Words
    blocks: npt.NDArray[np.int64]
    below: npt.NDArray[np.int64]
    masked: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Schedule:
    """Tables that the kernel reads.

    Attributes:
        tiles: int32 (T + 1, 4), program after program, and a spare that idle programs may read:
            head << 16 | query block;
            key blocks | (position of the block to mask + 1) << 16, 0 where none is;
            runs;
            first run of the tile, or with literals the number of kept blocks below the first one;
            less 2^31 where the head is repetitive.
        starts: int32 (programs + 1), first tile of each program.
        runs: int32 (runs + 1): first key block | length << 16, in the order of the tiles, and a
            spare; with literals only the spare.
    """

    tiles: Words
    starts: Words
    runs: Words


def diagonal_blocks(pattern: BlockPattern) -> npt.NDArray[np.int64]:
    """The key block of each query block's first token, int64 (heads, query_blocks).

    Where queries and keys are the same tokens its scores hold each query with itself, so its row
    maximum is representative: what a fixed softmax reference wants.
    """
    token = np.arange(pattern.query_blocks, dtype=np.int64) * pattern.block_m
    first = np.broadcast_to(token, (pattern.heads, pattern.query_blocks))
    if pattern.repetitive is not None:
        assert pattern.copies is not None
        computed = pattern.copies.computed(pattern.query_length)
        of_rows = computed[np.minimum(token, len(computed) - 1)]
        first = np.where(pattern.repetitive[:, None], of_rows, first)
    return np.minimum(first // pattern.block_n, pattern.key_blocks - 1)


def key_runs(pattern: BlockPattern, first_blocks: npt.NDArray[np.int64] | None = None) -> KeyRuns:
    """Order the key blocks of each row.

    Args:
        pattern: which blocks are kept.
        first_blocks: int (heads, query_blocks), the key block to start at: the first one taken is
            the lowest kept block from there on, or the lowest of all. Default: the diagonal.

    Raises:
        KernelError: first blocks that don't fit the pattern.
    """
    if first_blocks is None:
        first_blocks = diagonal_blocks(pattern)
    else:
        _check(pattern, first_blocks)
    columns = pattern.key_blocks
    found = runs_of_bits(pattern.bits)
    offsets, starts, ends = found.offsets, found.starts, found.ends
    counts = np.diff(offsets)
    lengths = ends - starts
    before = sums_before(lengths)  # kept blocks of all runs before
    blocks = np.diff(before[offsets])
    rows = np.flatnonzero(counts)
    # In each row the run with the first block taken: the first one that ends behind the block to
    # start at, or the row's first.
    wanted = first_blocks.reshape(-1)[rows]
    at = first_behind(found, rows, wanted, columns)
    wraps = at == offsets[rows + 1]
    at = np.where(wraps, offsets[rows], at)
    taken = np.where(wraps, starts[at], np.maximum(starts[at], wanted))
    # That run falls apart into the block itself, what is left of it and what is right.
    left, right = taken - starts[at], ends[at] - taken - 1
    pieces = np.ones(len(starts), np.int32)
    pieces[at] = (left > 0).astype(np.int32) + (right > 0)
    made = sums_before(pieces)
    firsts = sums_before(counts > 0)
    new_offsets = made[offsets] + firsts
    place = made[:-1] + np.repeat(firsts[1:], counts)
    # A run without pieces is overwritten by what comes behind it: the next run, the first block of
    # the next row, or the spare.
    new_starts = np.empty(new_offsets[-1] + 1, np.int32)
    new_lengths = np.empty(new_offsets[-1] + 1, np.int32)
    of_left, of_right = place[at][left > 0], (place[at] + (left > 0))[right > 0]
    new_starts[place], new_lengths[place] = starts, lengths
    new_lengths[of_left] = left[left > 0]
    new_starts[of_right], new_lengths[of_right] = (taken + 1)[right > 0], right[right > 0]
    new_starts[new_offsets[rows]], new_lengths[new_offsets[rows]] = taken, 1
    below = np.zeros(len(counts), np.int64)
    below[rows] = before[at] - before[offsets[rows]] + left
    to_the_end = ends[offsets[rows + 1] - 1] == columns
    last = np.where(taken == columns - 1, 0, blocks[rows] - 1)
    masked = np.full(len(counts), -1, np.int64)
    masked[rows] = np.where(to_the_end, last, -1)
    return KeyRuns(new_offsets, new_starts[:-1], new_lengths[:-1], blocks, below, masked)


def _check(pattern: BlockPattern, first_blocks: npt.NDArray[np.int64]) -> None:
    shape = (pattern.heads, pattern.query_blocks)
    fits = first_blocks.shape == shape and np.issubdtype(first_blocks.dtype, np.integer)
    if not fits or first_blocks.min() < 0 or first_blocks.max() >= pattern.key_blocks:
        raise KernelError(
            "the first key blocks don't fit the pattern",
            expected=f"integers {shape} from 0 to {pattern.key_blocks - 1}",
            got=f"{first_blocks.dtype} {first_blocks.shape}",
            remedy="give one key block for each head and query block",
        )


def assign(blocks: npt.NDArray[np.int64], heads: int, programs: int) -> list[npt.NDArray[np.int64]]:
    """Deal rows out to programs: each next row goes to the program with least work so far.

    Heads with most work come first, and the rows of a head stay together, in order: programs that
    run at the same time read the same keys, which then come from the L2 cache. The last rows are
    dealt longest first, so that all programs end together.

    Args:
        blocks: key blocks of each row, row = head * query_blocks + query block; none where it is
            not computed, which no program takes.
        heads: number of heads.
        programs: number of lists.

    Returns:
        The rows of each program, in order.
    """
    by_head = blocks.reshape(heads, -1)
    heads_in_order = np.argsort(-by_head.sum(1), kind="stable")
    rows = np.arange(len(blocks)).reshape(heads, -1)[heads_in_order].reshape(-1)
    rows = rows[blocks[rows] > 0]
    cut = max(0, len(rows) - TAIL_TILES * programs)
    tail = rows[cut:]
    rows = np.concatenate([rows[:cut], tail[np.argsort(-blocks[tail], kind="stable")]])
    load = [(0, program) for program in range(programs)]
    lists: list[list[int]] = [[] for _ in range(programs)]
    for row, cost in zip(rows.tolist(), (blocks[rows] + TILE_COST).tolist(), strict=True):
        work, program = load[0]
        lists[program].append(row)
        heapq.heapreplace(load, (work + cost, program))
    return [np.array(rows_of, np.int64) for rows_of in lists]


def make_schedule(
    pattern: BlockPattern, runs: KeyRuns, programs: int, *, literals: bool = False
) -> Schedule:
    """Write the tables of a pattern for a GPU with this many programs.

    Args:
        pattern: whose sizes are taken.
        runs: from `key_runs`.
        programs: how many run at a time: one a multiprocessor.
        literals: the kernel knows the runs from its source.
    """
    lists = assign(runs.blocks, pattern.heads, programs)
    rows = np.concatenate(lists)
    starts = sums_before(np.array([len(part) for part in lists]))
    counts = np.diff(runs.offsets)[rows]
    first_run = sums_before(counts)[:-1]
    source = expand(runs.offsets[rows], counts)
    packed = runs.starts[source] | runs.lengths[source] << 16
    ragged = pattern.key_length % pattern.block_n != 0
    masked = np.where(ragged, runs.masked[rows] + 1, 0)
    head, block = np.divmod(rows, pattern.query_blocks)
    last = runs.below[rows] if literals else first_run
    if pattern.repetitive is not None:
        last = np.where(pattern.repetitive[head], last - (1 << 31), last)
    words = [
        head << 16 | block,
        runs.blocks[rows] | masked << 16,
        counts,
        last,
    ]
    spare = np.zeros(1, np.int32)
    stream = spare if literals else np.concatenate([packed, spare]).astype(np.int32)
    tiles = np.zeros((len(rows) + 1, 4), np.int32)
    tiles[:-1] = np.stack(words, 1)
    return Schedule(tiles, starts.astype(np.int32), stream)


class BlockCodes(NamedTuple):
    """Weights of the blocks that tiles take, as the kernel reads them; None without weights.

    Attributes:
        codes: uint8 (blocks + 1), of each block as in `plan.weights`, tile after tile in the order
            in which it takes them, and a spare.
        starts: int32 (T + 1), where those of a tile begin.
    """

    codes: npt.NDArray[np.uint8] | None = None
    starts: Words | None = None


def block_codes(pattern: BlockPattern, runs: KeyRuns, schedule: Schedule) -> BlockCodes:
    """Write the weights of a pattern in the order of a schedule.

    Args:
        pattern: whose weights are taken.
        runs: from `key_runs`.
        schedule: from `make_schedule` with these runs.
    """
    if pattern.weights is None:
        return BlockCodes()
    head, block = np.divmod(schedule.tiles[:-1, 0].astype(np.int64), 1 << 16)
    rows = head * pattern.query_blocks + block
    starts = sums_before(runs.blocks[rows])
    counts = np.diff(runs.offsets)[rows]
    source = expand(runs.offsets[rows], counts)
    row_starts = np.repeat(rows * pattern.key_blocks, counts)
    taken = expand(row_starts + runs.starts[source], runs.lengths[source])
    codes = np.zeros(len(taken) + 1, np.uint8)
    codes[:-1] = pattern.weights.reshape(-1)[taken]
    return BlockCodes(codes, starts.astype(np.int32))
