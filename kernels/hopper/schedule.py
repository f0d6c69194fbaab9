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
from calibatt_compiler.plan.intervals import Intervals, first_behind, runs_of_bits, sums_before
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
        words: int32 (runs), first key block of each run | its length, at least 1, << 16.
        blocks: int64 (rows), kept key blocks.
        below: int64 (rows), those of them below the first one taken.
        masked: int64 (rows), position of the last key block among those taken, or -1.
    """

    offsets: npt.NDArray[np.int64]
    words: Words
    blocks: npt.NDArray[np.int64]
    below: npt.NDArray[np.int64]
    masked: npt.NDArray[np.int64]

    @property
    def starts(self) -> Words:
        """First key block of each run, int32 (runs)."""
        return self.words & 0xFFFF


@dataclass(frozen=True)
class Schedule:
    """Tables that the kernel reads.

    Attributes:
        tiles: int32 (T + 1, 4), program after program, and a spare that idle programs may read:
            head << 16 | query block;
            key blocks | (position of the block to mask + 1) << 16, 0 where none is;
            runs;
            first run of the tile, or with literals the number of kept blocks below the first one;
            less 2^31 where the head is row-shared.
        starts: int32 (programs + 1), first tile of each program.
        runs: int32 (runs + 1): first key block | length << 16, as `KeyRuns` has them, row by row,
            and a spare; with literals only the spare.
    """

    tiles: Words
    starts: Words
    runs: Words


def diagonal_blocks(pattern: BlockPattern) -> npt.NDArray[np.int64]:
    """The key block of each query block's first token, int64 (heads, query_blocks).

    Where queries and keys are the same tokens its scores hold each query with itself, so its row
    maximum is representative: what a fixed softmax shift wants.
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
    found = runs_of_bits(pattern.bits)
    split = _split(found, first_blocks.reshape(-1), pattern.key_blocks)
    rows, at, taken = split.rows, split.at, split.taken
    before = sums_before(found.ends - found.starts)  # kept blocks of all runs before
    blocks = np.diff(before[found.offsets])
    below = np.zeros(len(blocks), np.int64)
    below[rows] = before[at] - before[found.offsets[rows]] + split.left
    to_the_end = found.ends[found.offsets[rows + 1] - 1] == pattern.key_blocks
    last = np.where(taken == pattern.key_blocks - 1, 0, blocks[rows] - 1)
    masked = np.full(len(blocks), -1, np.int64)
    masked[rows] = np.where(to_the_end, last, -1)
    return KeyRuns(*_reordered(found, split), blocks, below, masked)


class _Split(NamedTuple):
    """Where the first block of each row that keeps any comes from; int64, one number a row.

    Attributes:
        rows: these rows.
        at: the run that has the block.
        taken: the block.
        left: blocks of that run below it.
        right: and above it.
    """

    rows: npt.NDArray[np.int64]
    at: npt.NDArray[np.int64]
    taken: npt.NDArray[np.int64]
    left: npt.NDArray[np.int64]
    right: npt.NDArray[np.int64]


def _split(found: Intervals, first_blocks: npt.NDArray[np.int64], columns: int) -> _Split:
    rows = np.flatnonzero(np.diff(found.offsets))
    wanted = first_blocks[rows]
    # The first run that ends behind the block to start at, or the row's first.
    at = first_behind(found, rows, wanted, columns)
    wraps = at == found.offsets[rows + 1]
    at = np.where(wraps, found.offsets[rows], at)
    start, end = found.starts[at].astype(np.int64), found.ends[at].astype(np.int64)
    taken = np.where(wraps, start, np.maximum(start, wanted))
    return _Split(rows, at, taken, taken - start, end - taken - 1)


def _reordered(found: Intervals, split: _Split) -> tuple[npt.NDArray[np.int64], Words]:
    """Offsets and words of the runs of each row with its first block before them."""
    rows, at, taken, left, right = split
    # A run that loses the block falls apart into what is left of it and what is right.
    pieces = (left > 0).astype(np.int64) + (right > 0)
    copies = np.ones(len(found.starts), np.int64)
    copies[at] = pieces
    copies[found.offsets[rows]] += 1
    more = np.zeros(len(found.offsets) - 1, np.int64)
    more[rows] = pieces  # one run more for the block itself, and one less
    offsets = found.offsets + sums_before(more)
    # Each run as often as the new ones that it makes room for, which are then written over it.
    words = np.repeat(found.starts | (found.ends - found.starts) << 16, copies)
    first = offsets[rows]
    words[first] = taken | 1 << 16
    piece = first + 1 + at - found.offsets[rows]
    has_left, has_right = left > 0, right > 0
    words[piece[has_left]] = (found.starts[at] | left << 16)[has_left]
    words[(piece + has_left)[has_right]] = (taken + 1 | right << 16)[has_right]
    return offsets, words


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


def assign(
    blocks: npt.NDArray[np.int64],
    heads: int,
    programs: int,
    *,
    tile_cost: int = TILE_COST,
    order: npt.NDArray[np.int64] | None = None,
) -> list[npt.NDArray[np.int64]]:
    """Deal rows out to programs: each next row goes to the program with least work so far.

    Heads with most work come first, and the rows of a head stay together, in order: programs that
    run at the same time read the same keys, which then come from the L2 cache. The last rows are
    dealt longest first, so that all programs end together.

    Args:
        blocks: key blocks of each row, row = head * query_blocks + query block; none where it is
            not computed, which no program takes.
        heads: number of heads.
        programs: number of lists.
        tile_cost: what a tile costs beyond its key blocks, in the unit of `blocks`.
        order: (heads, query_blocks), rows in which order each head takes them; default upwards.

    Returns:
        The rows of each program, in order.
    """
    by_head = blocks.reshape(heads, -1)
    heads_in_order = np.argsort(-by_head.sum(1), kind="stable")
    order = np.arange(len(blocks)).reshape(heads, -1) if order is None else order
    rows = order[heads_in_order].reshape(-1)
    rows = rows[blocks[rows] > 0]
    cut = max(0, len(rows) - TAIL_TILES * programs)
    tail = rows[cut:]
    rows = np.concatenate([rows[:cut], tail[np.argsort(-blocks[tail], kind="stable")]])
    load = [(0, program) for program in range(programs)]
    lists: list[list[int]] = [[] for _ in range(programs)]
    for row, cost in zip(rows.tolist(), (blocks[rows] + tile_cost).tolist(), strict=True):
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
    ragged = pattern.key_length % pattern.block_n != 0
    masked = np.where(ragged, runs.masked[rows] + 1, 0)
    head, block = np.divmod(rows, pattern.query_blocks)
    last = runs.below[rows] if literals else runs.offsets[rows]
    if pattern.repetitive is not None:
        last = np.where(pattern.repetitive[head], last - (1 << 31), last)
    words = [
        head << 16 | block,
        runs.blocks[rows] | masked << 16,
        counts,
        last,
    ]
    stream = np.append(runs.words[:0] if literals else runs.words, np.int32(0))
    tiles = np.zeros((len(rows) + 1, 4), np.int32)
    tiles[:-1] = np.stack(words, 1)
    return Schedule(tiles, starts.astype(np.int32), stream)


class BlockCodes(NamedTuple):
    """Weights of the blocks that tiles take, as the kernel reads them; None without weights.

    Attributes:
        codes: uint8 (blocks + 1), of each block, see `plan.weights`, row by row, each in the order
            in which a tile takes its blocks, and a spare.
        starts: int32 (T + 1), where those of a tile begin.
    """

    codes: npt.NDArray[np.uint8] | None = None
    starts: Words | None = None


def block_codes(pattern: BlockPattern, runs: KeyRuns, schedule: Schedule) -> BlockCodes:
    """Write the weights of a pattern in the order in which tiles take its blocks.

    Args:
        pattern: whose weights are taken.
        runs: from `key_runs`.
        schedule: from `make_schedule` with these runs.
    """
    if pattern.weights is None:
        return BlockCodes()
    head, block = np.divmod(schedule.tiles[:, 0].astype(np.int64), 1 << 16)
    offsets = sums_before(runs.blocks)
    starts = offsets[head * pattern.query_blocks + block]
    # The block that a row takes first moves to its front, and those below it up by one.
    moved = runs.below > 0
    begin = offsets[:-1][moved]
    first = begin + runs.below[moved]
    edges = np.zeros(offsets[-1] + 1, np.int8)
    edges[begin + 1] = 1
    edges[first + 1] = -1
    up = np.cumsum(edges, dtype=np.int8).view(np.bool_)
    kept = pattern.kept_weights()
    codes = np.zeros(len(kept) + 1, np.uint8)
    codes[:-1] = kept
    np.copyto(codes[1:], kept, where=up[1:])
    codes[begin] = kept[first]
    return BlockCodes(codes, starts.astype(np.int32))
