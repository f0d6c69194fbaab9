"""The cheapest runs along a line of blocks: dynamic programming over octaves, many lines at once.

A block of energy x that is kept with rate p and weight 1/p adds x^2 (1/p - 1) to the variance of
its row's output, relative to the row. So a run of octave k costs S (2^k - 1) + price n 2^-k, with S
the sum of its blocks' squared energies, n their number and `price` what a kept block is worth. Each
run costs `number` kept blocks beside.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from calibatt_compiler.calibration.select.zones import native
from calibatt_compiler.plan.zones.drawing import OCTAVES

Floats = npt.NDArray[np.float64]

_VARIANCE = np.exp2(np.arange(OCTAVES)) - 1
_RATE = np.exp2(-np.arange(OCTAVES, dtype=np.float64))


@dataclass(frozen=True)
class Lines:
    """Lines of blocks, each of the rows of one group together.

    Attributes:
        squares: float64 (lines, places), sums of squared energies.
        blocks: float64 (groups, places) or (groups, 1), how many blocks each place stands for, of
            the groups of one head: all heads have the same.
        leads: int64 (lines,), a place that has octave 0 in any case; -1: the line can't be used.
    """

    squares: Floats
    blocks: Floats
    leads: npt.NDArray[np.int64]

    @property
    def bytes(self) -> int:
        """Memory of the arrays."""
        return self.squares.nbytes + self.blocks.nbytes + self.leads.nbytes


@dataclass(frozen=True)
class Solved:
    """The cheapest runs of lines.

    Attributes:
        octaves: uint8 (lines, places).
        variance: float64 (lines,).
        kept: float64 (lines,), expected kept blocks.
        runs: int64 (lines,).
    """

    octaves: npt.NDArray[np.uint8]
    variance: Floats
    kept: Floats
    runs: npt.NDArray[np.int64]

    def cost(self, price: float, number: float) -> Floats:
        """Price of each line in kept blocks, float64 (lines,)."""
        return self.variance / price + self.kept + number * self.runs


def solve(lines: Lines, price: float, number: float, *, compiled: bool = False) -> Solved:
    """Find the octaves of least cost along each line.

    Of equal costs a run goes on rather than ends, and the lower octave is taken.

    Args:
        lines: what is to be covered.
        price: variance that a kept block is worth, positive.
        number: kept blocks that a run is worth, at least 0.
        compiled: in C++, with the same result; see `native.pays`.
    """
    if compiled:
        return Solved(*native.solve(lines.squares, lines.blocks, lines.leads, price, number))
    squares = np.ascontiguousarray(lines.squares.T) / price  # places first
    of_heads = np.tile(lines.blocks, (squares.shape[1] // len(lines.blocks), 1))
    blocks = np.ascontiguousarray(np.broadcast_to(of_heads.T, squares.shape))
    places, count = squares.shape
    forced = _by_place(lines.leads, places)
    best_octave = np.empty((places, count), np.uint8)
    goes_on = np.empty((places, count), np.uint8)  # a bit an octave
    costs = np.zeros((OCTAVES, count))
    # In front of the first place nothing has begun: its run costs the same whatever its octave.
    for place in range(places):
        if place:
            best_octave[place] = costs.argmin(0)
            switch = costs.min(0) + number
            goes_on[place] = np.packbits(costs <= switch, axis=0, bitorder="little")[0]
            np.minimum(costs, switch, out=costs)
        costs += squares[place] * _VARIANCE[:, None]
        costs += blocks[place] * _RATE[:, None]
        if place in forced:
            costs[1:, forced[place]] = np.inf
    octaves = np.empty((places, count), np.uint8)
    octave = costs.argmin(0).astype(np.uint8)
    for place in range(places - 1, -1, -1):
        octaves[place] = octave
        if place:
            stays = (goes_on[place] >> octave) & 1
            octave = np.where(stays == 1, octave, best_octave[place])
    return Solved(
        np.ascontiguousarray(octaves.T),
        price * _sum(squares * _VARIANCE[octaves]),
        _sum(blocks * _RATE[octaves]),
        1 + np.count_nonzero(octaves[1:] != octaves[:-1], axis=0),
    )


def _sum(places_first: Floats) -> Floats:
    """Sum over places one after the other; numpy's own sum takes them otherwise if it can."""
    total: Floats = np.add.accumulate(places_first)[-1]
    return total


def _by_place(leads: npt.NDArray[np.int64], places: int) -> dict[int, npt.NDArray[np.int64]]:
    """The lines whose lead is at a place, by place."""
    order = np.argsort(leads, kind="stable")
    bounds = np.searchsorted(leads[order], np.arange(places + 1))
    return {
        place: order[bounds[place] : bounds[place + 1]]
        for place in range(places)
        if bounds[place] < bounds[place + 1]
    }


def absolute_lines(squares: npt.NDArray[np.floating], rows: int) -> Lines:
    """Sum groups of rows in key blocks.

    Args:
        squares: float (heads, query_blocks, key_blocks), mean squared energies.
        rows: rows a group; the last may have fewer.

    Returns:
        Lines of all groups, head after head.
    """
    height, width = squares.shape[1:]
    firsts = np.arange(0, height, rows)
    sums = np.add.reduceat(squares, firsts, axis=1, dtype=np.float64).reshape(-1, width)
    members = np.minimum(firsts + rows, height) - firsts
    return Lines(sums, members.astype(np.float64)[:, None], sums.argmax(1))


def diagonal_lines(squares: npt.NDArray[np.floating], rows: int) -> Lines:
    """Sum groups of rows in key block minus row; place 0 is the first block of a group's last row.

    Args and result: see `absolute_lines`; each line has `key_blocks + rows - 1` places, some of
    which the last group of a head may not have. Its place 0 is that of a whole group.
    """
    heads, height, width = squares.shape
    groups = -(-height // rows)
    sums = np.zeros((heads, groups, width + rows - 1))
    blocks = np.zeros((groups, width + rows - 1))
    for row in range(rows):
        members = squares[:, row::rows]
        first = rows - 1 - row
        sums[:, : members.shape[1], first : first + width] += members
        blocks[: members.shape[1], first : first + width] += 1
    # Places that all rows of a group have.
    sizes = np.minimum(rows, height - np.arange(groups) * rows)
    place = np.arange(width + rows - 1)
    common = (place >= rows - 1) & (place < width + rows - sizes[:, None])
    leads = np.where(common, sums, -1.0).argmax(-1)
    leads = np.where(common.any(-1), leads, -1)
    return Lines(sums.reshape(heads * groups, -1), blocks, leads.reshape(-1))
