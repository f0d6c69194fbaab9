"""From octaves to the ragged arrays of zones: lines of octaves to runs, equal rows to groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from calibatt_compiler.errors import PlanError

Octaves = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class HeadGroups:
    """The groups of one head, each with the octaves along its coordinates.

    Group g holds the rows `g * rows` to `(g + 1) * rows`, the last one perhaps fewer. In absolute
    coordinates place i of its line is key block i; in diagonal ones place i is key block minus row
    `i - (g + 1) * rows + 1`, and a line has `columns + rows - 1` places.

    Attributes:
        rows: rows a group.
        diagonal: bool (groups,).
        leads: int64 (groups,), places of the blocks that lead.
        lines: uint8 (groups, columns + rows - 1); of absolute groups the first `columns` count.
    """

    rows: int
    diagonal: npt.NDArray[np.bool_]
    leads: npt.NDArray[np.int64]
    lines: Octaves

    @classmethod
    def none(cls, rows: int) -> HeadGroups:
        """Return those of a head whose rows or columns all have text: none."""
        lines = np.zeros((0, 1), np.uint8)
        return cls(max(rows, 1), np.zeros(0, np.bool_), np.zeros(0, np.int64), lines)


def pack(heads: Sequence[HeadGroups], rows: int, columns: int) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of `ZonePattern`.

    Args:
        heads: the groups of each head; without rows or columns they have none.
        rows: query blocks without text.
        columns: key blocks without text.
    """
    found: dict[str, list[npt.NDArray[Any]]] = {
        name: [] for name in ("diagonal", "leads", "counts", "cuts", "octaves")
    }
    for head in heads:
        group = np.arange(len(head.diagonal))
        last = np.minimum((group + 1) * head.rows, rows) - 1
        origin = np.where(head.diagonal, (group + 1) * head.rows - 1, 0)
        # The places that some row of the group has.
        low = np.where(head.diagonal, origin - last, 0)
        high = np.where(head.diagonal, origin - group * head.rows + columns, columns)
        place = np.arange(head.lines.shape[1])
        change = np.zeros(head.lines.shape, np.bool_)
        change[:, 1:] = head.lines[:, 1:] != head.lines[:, :-1]
        change &= (place > low[:, None]) & (place < high[:, None])
        begins = change | (place == low[:, None])
        which, cut = np.nonzero(change)
        found["diagonal"].append(head.diagonal)
        found["leads"].append(head.leads - origin)
        found["counts"].append(begins.sum(1))
        found["cuts"].append(cut - origin[which])
        found["octaves"].append(head.lines[begins])
    arrays = {name: np.concatenate(parts) for name, parts in found.items()}
    types = {"diagonal": np.uint8, "octaves": np.uint8}
    return {
        "group_rows": np.array([head.rows for head in heads], np.int32),
        **{name: array.astype(types.get(name, np.int32)) for name, array in arrays.items()},
    }


def exact_groups(octaves: Octaves) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of `ZonePattern` for given octaves, in the largest groups that fit.

    Args:
        octaves: uint8 (heads, rows, columns), blocks without text.

    Raises:
        PlanError: a row without a block of octave 0.
    """
    heads, rows, columns = octaves.shape
    if not rows or not columns:
        return pack([HeadGroups.none(rows)] * heads, rows, columns)
    empty = np.argwhere(~(octaves == 0).any(-1))
    if len(empty):
        raise PlanError(
            "a row of an octave map has no block that is kept for certain",
            expected="a block of octave 0 in each row",
            got=f"none in head {empty[0, 0]}, row {empty[0, 1]}",
            remedy="set the block of highest energy of each row to octave 0",
        )
    return pack([_largest(head) for head in octaves], rows, columns)


def _largest(octaves: Octaves) -> HeadGroups:
    """The groups of most rows that have one line in common."""
    rows = len(octaves)
    alike = (octaves[1:] == octaves[:-1]).all(1)
    shifted = (octaves[1:, 1:] == octaves[:-1, :-1]).all(1)
    for size in range(rows, 0, -1):
        starts = range(0, rows, size)
        spans = [slice(first, min(first + size, rows) - 1) for first in starts]
        if all(alike[span].all() or shifted[span].all() for span in spans):
            found = _grouped(octaves, size, [bool(alike[span].all()) for span in spans])
            if found is not None:
                return found
    raise AssertionError("groups of one row always fit")


def _grouped(octaves: Octaves, size: int, absolute: Sequence[bool]) -> HeadGroups | None:
    """The groups of a head; None if the rows of one have no block of octave 0 in common."""
    columns = octaves.shape[1]
    lines = np.zeros((len(absolute), columns + size - 1), np.uint8)
    leads = np.zeros(len(absolute), np.int64)
    for group, is_absolute in enumerate(absolute):
        first = group * size
        members = octaves[first : first + size]
        if is_absolute:
            lines[group, :columns] = members[0]
            common = np.arange(columns)
        else:
            for row, values in enumerate(members):
                lines[group, size - 1 - row : size - 1 - row + columns] = values
            common = np.arange(size - 1, columns + size - len(members))
        certain = common[lines[group, common] == 0]
        if not len(certain):
            return None
        # Of several the one nearest to the diagonal, which tells most of a row's scores.
        diagonal = first + (len(members) - 1) / 2 if is_absolute else first + size - 1
        leads[group] = certain[np.abs(certain - diagonal).argmin()]
    return HeadGroups(size, ~np.array(absolute), leads, lines)
