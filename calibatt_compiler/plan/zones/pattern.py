"""Octave zones: rates 2^-k, constant over runs of key blocks that groups of rows share.

A plan of zones stores runs; what a step keeps is drawn from them (`drawing`). A kept block
of octave k stands for 2^k blocks and has that weight, so nothing is left out on average, at
whatever rates: the runs may be coarse.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calibatt_compiler.plan import weights
from calibatt_compiler.plan.intervals import expand, sums_before
from calibatt_compiler.plan.pattern import BlockPattern
from calibatt_compiler.plan.sizes import check_sizes
from calibatt_compiler.plan.text import TextPosition, block_sources
from calibatt_compiler.plan.zones import drawing
from calibatt_compiler.plan.zones.checks import ARRAYS, check, wrong
from calibatt_compiler.plan.zones.drawing import BITS, OCTAVES, UNIT, DrawnRuns, Ints
from calibatt_compiler.plan.zones.form import ZoneForm, video_blocks
from calibatt_compiler.plan.zones.groups import exact_groups
from calibatt_compiler.plan.zones.rows import RowRuns, row_runs


@dataclass(frozen=True, eq=False)
class ZonePattern(ZoneForm):
    """Zones of one attention call, for the steps of one group.

    Blocks without a text token are numbered from the first one on, as queries and as keys. Row r of
    head h belongs to group `r // group_rows[h]` of the head; groups are counted head after head. A
    group's runs are stated in key blocks c, or where it is `diagonal` in c - r, so that they move
    along with the rows. Its first run reaches back without end and its last one forward: `cuts`
    are where the others begin. Blocks with text are of octave 0, as keys and as queries.

    Attributes:
        heads: number of heads.
        query_length: tokens on the query side.
        key_length: tokens on the key side.
        block_m: tokens a query block.
        block_n: tokens a key block.
        group_rows: int32 (heads,), rows a group of each head; the last group may have fewer.
        diagonal: uint8 (groups,), 1 where runs are stated in c - r.
        leads: int32 (groups,), stated as the runs are: a block of octave 0 of every row, which
            kernels visit first.
        counts: int32 (groups,), runs of each group, at least 1.
        cuts: int32 (runs - groups,), rising within a group.
        octaves: uint8 (runs,), 0 to 7; neighbours differ.
        video: tokens that are not text, on either side; 0 if there is no text.
        text: where text tokens stand.
        seed: added to every row's start, 0 to 127: tells sites apart.
        formula: version of the drawing formula, `drawing.FORMULA`.

    The arrays are read-only.

    Raises:
        PlanError: sizes, arrays or a formula that make no pattern, or a lead that is not of
            octave 0 or that some row of its group does not have.
    """

    def __post_init__(self) -> None:
        check_sizes(self.heads, self.query_length, self.key_length, self.block_m, self.block_n)
        check(self)

    @property
    def numbers(self) -> npt.NDArray[np.int64]:
        """What a kernel holds of each head: its runs, and a lead a group; int64 (heads,)."""
        head = sums_before(self.head_groups)
        return np.diff(self.run_offsets[head]) + self.head_groups

    def row_runs(self) -> RowRuns:
        """Return the runs that each row crosses, those of text included."""
        return row_runs(self)

    def draw_runs(self, step: int) -> DrawnRuns:
        """Draw what a step keeps, as progressions; kernels walk these."""
        runs = self.row_runs()
        start = self.starts(step).reshape(-1)
        return drawing.progressions(
            runs.offsets, runs.begins, runs.ends, runs.octaves, start, self.row_leads().reshape(-1)
        )

    def draw(self, step: int) -> BlockPattern:
        """Draw what a step keeps, with the weights, as a pattern that every kernel serves."""
        runs = self.draw_runs(step)
        columns, octaves = runs.blocks()
        row = np.repeat(np.arange(len(runs.leads)), runs.kept())
        shape = (self.heads, self.query_blocks, self.key_blocks)
        codes, mask = np.zeros(shape, np.uint8), np.zeros(shape, np.bool_)
        at = row * self.key_blocks + columns
        mask.reshape(-1)[at] = True
        codes.reshape(-1)[at] = octaves * np.uint8(weights.STEPS)
        bits = np.packbits(mask, axis=-1, bitorder="little")
        return BlockPattern(*self._sizes, bits, codes)

    def starts(self, step: int) -> Ints:
        """Where the sum of each row begins at a step, int32 (heads, query_blocks), 0 to 127."""
        top, bottom = self.rows
        found = np.zeros((self.heads, self.query_blocks), np.int32)
        found[:, top:bottom] = drawing.starts(self.heads, bottom - top)
        return found + np.int32(drawing.phase(step, self.seed)) & np.int32(UNIT - 1)

    def row_leads(self) -> Ints:
        """Key block that each row visits first, int32 (heads, query_blocks); 0 in text rows."""
        top, bottom = self.rows
        found = np.zeros((self.heads, self.query_blocks), np.int32)
        if len(self.leads):
            first, last = self.group_edges
            group, row = np.repeat(np.arange(len(first)), last - first), expand(first, last - first)
            leads = self.leads[group] + row * self.diagonal[group] + self.columns[0]
            found[:, top:bottom] = leads.reshape(self.heads, -1)
        return found

    def map_octaves(self) -> npt.NDArray[np.int8]:
        """Octave of each block, int8 (heads, query_blocks, key_blocks)."""
        runs = self.row_runs()
        found = np.repeat(runs.octaves.astype(np.int8), runs.ends - runs.begins)
        return found.reshape(self.heads, self.query_blocks, self.key_blocks)

    def octave_shares(self) -> npt.NDArray[np.float64]:
        """Share of each head's blocks that has each octave, float64 (heads, 8)."""
        runs = self.row_runs()
        row = np.repeat(np.arange(len(runs.offsets) - 1), np.diff(runs.offsets))
        at = row // self.query_blocks * OCTAVES + runs.octaves
        blocks = np.bincount(at, runs.ends - runs.begins, self.heads * OCTAVES)
        shares = blocks.reshape(self.heads, OCTAVES) / (self.query_blocks * self.key_blocks)
        found: npt.NDArray[np.float64] = shares
        return found

    @cached_property
    def _units(self) -> npt.NDArray[np.int64]:
        return self.row_runs().units()

    @property
    def density(self) -> float:
        """Expected kept blocks / all blocks, in (0, 1]."""
        return int(self._units.sum()) / (UNIT * len(self._units) * self.key_blocks)

    def kept_rows(self, step: int) -> npt.NDArray[np.int64]:
        """Blocks that each row keeps at a step, int64 (heads, query_blocks)."""
        return self.starts(step) + self._units.reshape(self.heads, -1) >> BITS

    def kept(self, step: int) -> int:
        """Kept blocks at a step over all heads."""
        return int(self.kept_rows(step).sum())

    def density_at(self, step: int) -> float:
        """Kept blocks / all blocks at a step; asked for at each call, so known from the first."""
        phase = drawing.phase(step, self.seed)
        found = self._densities.get(phase)
        if found is None:
            blocks = self.heads * self.query_blocks * self.key_blocks
            found = self._densities[phase] = self.kept(step) / blocks
        return found

    @cached_property
    def _densities(self) -> dict[int, float]:
        return {}

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) over sizes, text, seed, formula and runs."""
        said = (*self._sizes, self.video, self.text, self.seed, self.formula)
        h = hashlib.sha256(repr(said).encode())
        for name in ARRAYS:
            array = getattr(self, name)
            h.update(f"{name} {len(array)}".encode())
            h.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
        return h.hexdigest()

    def with_lengths(self, query_length: int, key_length: int) -> ZonePattern:
        """Return the zones of sequences with another length of text.

        Blocks without text keep their octaves. With the text first and its length changed by no
        multiple of the block, blocks cut the video elsewhere: each then takes the lowest octave of
        the old ones that it overlaps, so that none is kept less often than it was.

        Raises:
            PlanError: there is no text, or lengths that hold no more than the video.
        """
        to = (query_length, key_length)
        if self.text is None or min(to) <= self.video:
            raise wrong("other lengths of zones", "text beside the video, as before", to)
        blocks = (self.block_m, self.block_n)
        lengths = (self.query_length, self.key_length)
        shifts = [(new - old) % b for new, old, b in zip(to, lengths, blocks, strict=True)]
        if self.text == "last" or not any(shifts):
            return replace(self, query_length=query_length, key_length=key_length)
        (row, next_row, text_rows), (column, next_column, text_columns) = (
            [part.numpy() for part in block_sources(old, new, self.video, size, self.text)]
            for old, new, size in zip(lengths, to, blocks, strict=True)
        )
        octaves = self.map_octaves()
        octaves = np.minimum(octaves[:, row], octaves[:, next_row])
        octaves = np.minimum(octaves[..., column], octaves[..., next_column])
        octaves[:, text_rows] = 0
        octaves[..., text_columns] = 0
        return self.from_octaves(
            torch.from_numpy(octaves),
            query_length=query_length,
            key_length=key_length,
            block=blocks,
            video=self.video,
            text=self.text,
            seed=self.seed,
        )

    def with_seed(self, seed: int) -> ZonePattern:
        """Return the same zones with another seed."""
        return replace(self, seed=seed)

    @property
    def _sizes(self) -> tuple[int, int, int, int, int]:
        return (self.heads, self.query_length, self.key_length, self.block_m, self.block_n)

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays of a plan file, by name, in the order of `ARRAYS`."""
        return {name: getattr(self, name) for name in ARRAYS}

    @classmethod
    def from_arrays(
        cls, sizes: tuple[int, int, int, int, int], arrays: Mapping[str, Any], **others: Any
    ) -> ZonePattern:
        """Make a pattern of sizes (heads to block_n), of its arrays and of `video` to `formula`.

        Raises:
            PlanError: they make no pattern.
        """
        parts = {name: np.array(arrays[name]) for name in ARRAYS}
        return cls(*sizes, **parts, **others)  # type: ignore[misc, arg-type]

    @classmethod
    def from_octaves(
        cls,
        octaves: Tensor,
        *,
        query_length: int | None = None,
        key_length: int | None = None,
        block: tuple[int, int] = (128, 128),
        video: int = 0,
        text: TextPosition | None = None,
        seed: int = 0,
    ) -> ZonePattern:
        """Make zones of an octave map: exactly these octaves, in the largest groups that have them.

        Args:
            octaves: integers (heads, query_blocks, key_blocks), 0 to 7; each row has a 0.
            query_length: tokens on the query side; default `query_blocks * block[0]`.
            key_length: tokens on the key side; default `key_blocks * block[1]`.
            block: tokens a query block, tokens a key block.
            video: see the class.
            text: see the class; blocks with text must have octave 0.
            seed: see the class.

        Raises:
            PlanError: another form, an octave out of range, or a row without octave 0.
        """
        if octaves.dim() != 3 or octaves.is_floating_point() or octaves.dtype == torch.bool:
            raise wrong(
                "an octave map",
                "integers (heads, query_blocks, key_blocks)",
                f"{octaves.dtype} {tuple(octaves.shape)}",
            )
        heads, rows, columns = octaves.shape
        query_length = rows * block[0] if query_length is None else query_length
        key_length = columns * block[1] if key_length is None else key_length
        check_sizes(heads, query_length, key_length, *block)
        expected = (heads, -(-query_length // block[0]), -(-key_length // block[1]))
        if octaves.shape != expected:
            raise wrong("an octave map", f"{expected} blocks", tuple(octaves.shape))
        if octaves.numel() and not 0 <= int(octaves.min()) <= int(octaves.max()) < OCTAVES:
            got = (int(octaves.min()), int(octaves.max()))
            raise wrong("octaves of zones", f"0 to {OCTAVES - 1}", got)
        found = octaves.to("cpu", torch.uint8).numpy()
        top, bottom = video_blocks(query_length, video, block[0], text)
        left, right = video_blocks(key_length, video, block[1], text)
        inner = np.zeros(found.shape, np.bool_)
        inner[:, top:bottom, left:right] = True
        if found[~inner].any():
            raise wrong("octaves of blocks with text", 0, int(found[~inner].max()))
        groups = exact_groups(found[:, top:bottom, left:right])
        sizes = (heads, query_length, key_length, *block)
        return cls.from_arrays(sizes, groups, video=video, text=text, seed=seed)
