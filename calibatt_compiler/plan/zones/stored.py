"""Zone patterns in encoded form, as plan files hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np

from calibatt_compiler.errors import PlanError, PlanFormatError
from calibatt_compiler.plan import encoding
from calibatt_compiler.plan.stored import Entries, PatternSize
from calibatt_compiler.plan.text import TextPosition
from calibatt_compiler.plan.zones import ZonePattern
from calibatt_compiler.plan.zones.checks import ARRAYS
from calibatt_compiler.plan.zones.drawing import FORMULA
from calibatt_compiler.plan.zones.form import video_blocks

MAX_RUNS = 1 << 24
"""Most runs of a pattern: above it a number is taken for damage."""

FREE_RUNS, RUNS_A_BYTE = 1 << 20, 32
"""Groups or runs that any codes may stand for; beyond, for each of their bytes."""


@dataclass(frozen=True)
class ZoneSize:
    """What all zone patterns of a site have in common; see `ZonePattern`."""

    size: PatternSize
    video: int = 0
    text: TextPosition | None = None
    seed: int = 0
    formula: int = FORMULA

    @classmethod
    def of(cls, zones: ZonePattern) -> ZoneSize:
        """Return that of a pattern."""
        sizes = (zones.heads, zones.query_length, zones.key_length, zones.block_m, zones.block_n)
        return cls(PatternSize(*sizes), zones.video, zones.text, zones.seed, zones.formula)

    def make(self, arrays: Mapping[str, Any]) -> ZonePattern:
        """Return the pattern of some arrays.

        Raises:
            PlanError: they make none.
        """
        size = self.size
        sizes = (size.heads, size.query_length, size.key_length, size.block_m, size.block_n)
        return ZonePattern.from_arrays(
            sizes,
            arrays,
            video=self.video,
            text=self.text,
            seed=self.seed,
            formula=self.formula,
        )

    def groups(self, group_rows: Any) -> int:
        """Return how many groups all heads have together."""
        size = self.size
        top, bottom = video_blocks(size.query_length, self.video, size.block_m, self.text)
        left, right = video_blocks(size.key_length, self.video, size.block_n, self.text)
        if left == right or (group_rows < 1).any():
            return 0
        return int((-(-(bottom - top) // group_rows.astype(np.int64))).sum())


@dataclass(eq=False)
class StoredZones(Sequence[ZonePattern]):
    """Zone patterns of one site in encoded form; each is decoded and checked when first asked for.

    Attributes:
        common: what they have in common.
        code: uint8 (bytes,): the codes of all arrays back to back, perhaps a view of a file.
        entries: what the codes are.
        digests: `ZonePattern.digest` of each.
        source: what is named if something is wrong.
    """

    common: ZoneSize
    code: encoding.Bytes
    entries: Entries
    digests: tuple[str, ...]
    source: str = "a stored plan"
    _decoded: dict[int, ZonePattern] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.entries)

    @overload
    def __getitem__(self, index: int) -> ZonePattern: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[ZonePattern, ...]: ...
    def __getitem__(self, index: int | slice) -> ZonePattern | tuple[ZonePattern, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        index = range(len(self))[index]
        if index not in self._decoded:
            self._decoded[index] = self._decode(index)
        return self._decoded[index]

    @classmethod
    def pack(cls, patterns: Sequence[ZonePattern]) -> StoredZones:
        """Encode patterns of one size; stored ones are returned as they are."""
        if isinstance(patterns, StoredZones):
            return patterns
        entries, codes = [], []
        for zones in patterns:
            entry = []
            for name, array in zones.to_arrays().items():
                little = array.astype(array.dtype.newbyteorder("<"))
                method, code = encoding.encode(little, None)
                entry.append((name, method, len(code)))
                codes.append(code)
            entries.append(tuple(entry))
        return cls(
            ZoneSize.of(patterns[0]),
            np.frombuffer(b"".join(codes), np.uint8),
            tuple(entries),
            tuple(zones.digest for zones in patterns),
        )

    def _decode(self, index: int) -> ZonePattern:
        at = sum(length for entry in self.entries[:index] for *_, length in entry)
        arrays: dict[str, Any] = {}
        try:
            for name, method, length in self.entries[index]:
                dtype = np.dtype(ARRAYS[name]).newbyteorder("<")
                count = self._count(name, arrays)
                data = encoding.decode(
                    method, self.code[at : at + length], count * dtype.itemsize, None
                )
                arrays[name] = data.view(dtype).astype(ARRAYS[name])
                at += length
            zones = self.common.make(arrays)
        except (ValueError, LookupError, ArithmeticError, MemoryError, PlanError) as error:
            raise self._wrong(index, "codes of zones", error) from error
        if zones.digest != self.digests[index]:
            raise self._wrong(index, f"digest {self.digests[index]}", zones.digest)
        return zones

    def _count(self, name: str, arrays: Mapping[str, Any]) -> int:
        """How many numbers an array has, given those before it."""
        if name == "group_rows":
            return self.common.size.heads
        groups = self.common.groups(arrays["group_rows"])
        if groups > self._most:
            raise ValueError(f"{groups} groups of {len(self.code)} bytes")
        if name in ("diagonal", "leads", "counts"):
            return groups
        runs = int(arrays["counts"].sum(dtype=np.int64))
        if not groups <= runs <= self._most:
            raise ValueError(f"{runs} runs in {groups} groups")
        return runs - groups if name == "cuts" else runs

    @property
    def _most(self) -> int:
        """Most groups or runs that codes of this length are taken to stand for."""
        return min(MAX_RUNS, max(FREE_RUNS, RUNS_A_BYTE * len(self.code)))

    def _wrong(self, index: int, expected: str, got: object) -> PlanFormatError:
        return PlanFormatError(
            f"pattern {index} of {self.source} is not what was stored",
            expected=expected,
            got=got,
            remedy="copy or download the plan again, or calibrate again; a plan file must not "
            "be changed in place while it is in use",
        )
