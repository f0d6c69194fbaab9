"""Patterns of one site as they stand in a plan file: encoded, decoded one at a time on demand."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, overload

import numpy as np
import numpy.typing as npt
from pydantic import Field

from calibatt_compiler.errors import PlanFormatError
from calibatt_compiler.plan import encoding
from calibatt_compiler.plan.copies import AnchorRows
from calibatt_compiler.plan.pattern import BlockPattern

CACHED = 2
"""Decoded patterns that a site keeps: the last ones asked for. Steps come in order, and a pattern
is decoded from the one before it."""

KEPT_WEIGHTS = "kept_weights"
"""Weights are written of the kept blocks alone: one byte each, row by row."""

Entry = tuple[str, encoding.Method, Annotated[int, Field(ge=0, le=1 << 40)]]
"""One array of a pattern: its name, how it is written, and in how many bytes."""

Entries = tuple[tuple[Entry, ...], ...]
"""For each pattern of a site its arrays, in the order in which their codes follow one another."""


@dataclass(frozen=True)
class PatternSize:
    """What all patterns of a site have in common; see `BlockPattern`."""

    heads: int
    query_length: int
    key_length: int
    block_m: int
    block_n: int
    pooled: int = 0
    copies: AnchorRows | None = None

    @classmethod
    def of(cls, pattern: BlockPattern) -> PatternSize:
        """Return the size of a pattern."""
        return cls(
            pattern.heads,
            pattern.query_length,
            pattern.key_length,
            pattern.block_m,
            pattern.block_n,
            pattern.pooled,
            pattern.copies,
        )

    @property
    def query_blocks(self) -> int:
        """Number of query blocks, the ragged last one included."""
        return -(-self.query_length // self.block_m)

    @property
    def key_blocks(self) -> int:
        """Number of key blocks, the ragged last one included."""
        return -(-self.key_length // self.block_n)

    @property
    def blocks(self) -> int:
        """All blocks, over all heads."""
        return self.heads * self.query_blocks * self.key_blocks


@dataclass(frozen=True)
class PatternOutline(PatternSize):
    """What is known of a pattern without decoding it, by the names of `BlockPattern`."""

    weighted: bool = False
    full: bool = False


def layout(size: PatternSize) -> dict[str, tuple[type[np.generic], tuple[int, ...]]]:
    """Return dtype and shape of each array that a pattern of this size may have, by name.

    The weights are meant as the pattern has them, 0 where a block is dropped.
    """
    rows = (size.heads, size.query_blocks)
    return {
        "bits": (np.uint8, (*rows, (size.key_blocks + 7) // 8)),
        KEPT_WEIGHTS: (np.uint8, (*rows, size.key_blocks)),
        "repetitive": (np.uint8, (size.heads,)),
    }


def layout_bytes(size: PatternSize) -> int:
    """Return the bytes of the largest array that a pattern of this size may have."""
    return max(
        np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in layout(size).values()
    )


def arrays_of(pattern: BlockPattern) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays that a pattern consists of, by name: `bits`, and others if it has them."""
    repetitive = None if pattern.repetitive is None else pattern.repetitive.view(np.uint8)
    others = {KEPT_WEIGHTS: pattern.weights, "repetitive": repetitive}
    return {"bits": pattern.bits, **{k: array for k, array in others.items() if array is not None}}


def pattern_of(size: PatternSize, arrays: Mapping[str, npt.NDArray[Any]]) -> BlockPattern:
    """Return the pattern of some arrays; the inverse of `arrays_of`.

    Raises:
        PlanError: sizes or arrays that make no pattern.
        ValueError: flags of heads that are neither 0 nor 1.
    """
    repetitive = arrays.get("repetitive")
    if repetitive is not None and (repetitive > 1).any():
        raise ValueError("a flag of a row-shared head is neither 0 nor 1")
    return BlockPattern(
        size.heads,
        size.query_length,
        size.key_length,
        size.block_m,
        size.block_n,
        arrays["bits"],
        arrays.get(KEPT_WEIGHTS),
        size.pooled,
        size.copies,
        None if repetitive is None else repetitive.astype(np.bool_),
    )


def _kept(bits: npt.NDArray[np.uint8], columns: int) -> npt.NDArray[np.int64]:
    """Return the numbers of the kept blocks, head * query_blocks * key_blocks + and so on."""
    found = np.unpackbits(bits, axis=-1, count=columns, bitorder="little")
    return np.flatnonzero(found.view(np.bool_))


def repetitive_heads(pattern: BlockPattern) -> int:
    """Return how many heads of a pattern are row-shared."""
    return 0 if pattern.repetitive is None else int(pattern.repetitive.sum())


@dataclass(eq=False)
class StoredPatterns(Sequence[BlockPattern]):
    """A sequence of patterns that decodes an item when it is asked for, and checks it.

    Safe for use by several threads.

    Attributes:
        size: of every pattern.
        code: uint8 (bytes,): the codes of all arrays back to back, perhaps a view of a file.
        entries: what the codes are.
        digests: `BlockPattern.digest` of each pattern.
        kept: kept blocks of each pattern.
        repetitive: row-shared heads of each pattern.
        source: what is named if something is wrong.

    Raises:
        PlanFormatError: when an item is asked for: it is not what was stored.
        PlanError: the array makes no pattern.
    """

    size: PatternSize
    code: encoding.Bytes
    entries: Entries
    digests: tuple[str, ...]
    kept: tuple[int, ...]
    repetitive: tuple[int, ...]
    source: str = "a stored plan"
    _cache: dict[int, BlockPattern] = field(default_factory=dict, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        lengths = [sum(length for _, _, length in entry) for entry in self.entries]
        self._starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).tolist()

    def __len__(self) -> int:
        return len(self.entries)

    @overload
    def __getitem__(self, index: int) -> BlockPattern: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[BlockPattern, ...]: ...
    def __getitem__(self, index: int | slice) -> BlockPattern | tuple[BlockPattern, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        with self._lock:
            pattern = self._cache.pop(index, None) or self._decode(index)
            self._cache[index] = pattern
            while len(self._cache) > CACHED:
                del self._cache[next(iter(self._cache))]
            return pattern

    def __iter__(self) -> Iterator[BlockPattern]:
        return (self[index] for index in range(len(self)))

    @property
    def weighted(self) -> bool:
        """Whether a pattern has weights."""
        return any(name == KEPT_WEIGHTS for entry in self.entries for name, *_ in entry)

    @classmethod
    def pack(cls, patterns: Sequence[BlockPattern]) -> StoredPatterns:
        """Encode patterns of one size; stored ones are returned as they are."""
        if isinstance(patterns, StoredPatterns):
            return patterns
        entries, codes = [], []
        previous: dict[str, encoding.Bytes] = {}
        for pattern in patterns:
            arrays, entry = arrays_of(pattern), []
            for name, array in arrays.items():
                data, before = encoding.as_bytes(array), previous.get(name)
                if name == KEPT_WEIGHTS:
                    kept = _kept(arrays["bits"], pattern.key_blocks)
                    data, before = data[kept], None if before is None else before[kept]
                method, code = encoding.encode(data, before)
                entry.append((name, method, len(code)))
                codes.append(code)
            entries.append(tuple(entry))
            previous = {name: encoding.as_bytes(array) for name, array in arrays.items()}
        return cls(
            PatternSize.of(patterns[0]),
            np.frombuffer(b"".join(codes), np.uint8),
            tuple(entries),
            tuple(pattern.digest for pattern in patterns),
            tuple(pattern.kept for pattern in patterns),
            tuple(repetitive_heads(pattern) for pattern in patterns),
        )

    def written_out(self) -> StoredPatterns:
        """Return the same with the bits of the first pattern as they are, not compressed.

        A file holds so much more than a few bytes where it stands for very large patterns: readers
        refuse one that does not.
        """
        (name, method, length), *others = self.entries[0]
        bits = encoding.as_bytes(self[0].bits)
        if method == "raw":
            return self
        return replace(
            self,
            code=np.concatenate([bits, self.code[length:]]),
            entries=(((name, "raw", len(bits)), *others), *self.entries[1:]),
        )

    def _decode(self, index: int) -> BlockPattern:
        first = index
        while first not in self._cache and self._relative(first):
            first -= 1
        arrays: dict[str, encoding.Bytes] = {}
        if first in self._cache:
            held = arrays_of(self._cache[first])
            arrays = {name: encoding.as_bytes(array) for name, array in held.items()}
            first += 1
        try:
            for at in range(first, index + 1):
                arrays = self._arrays(at, arrays)
            return self._checked(index, arrays)
        except (ValueError, LookupError, ArithmeticError, MemoryError) as error:
            raise self._wrong(index, "codes that can be decoded", error) from error

    def _relative(self, index: int) -> bool:
        return index > 0 and any(
            method.endswith("/previous") for _, method, _ in self.entries[index]
        )

    def _arrays(
        self, index: int, previous: Mapping[str, encoding.Bytes]
    ) -> dict[str, encoding.Bytes]:
        known = layout(self.size)
        at = self._starts[index]
        found: dict[str, encoding.Bytes] = {}
        for name, method, length in self.entries[index]:
            dtype, shape = known[name]
            size = math.prod(shape) * np.dtype(dtype).itemsize
            code, before = self.code[at : at + length], previous.get(name)
            if name == KEPT_WEIGHTS:
                kept = _kept(found["bits"].reshape(known["bits"][1]), self.size.key_blocks)
                before = None if before is None else before[kept]
                found[name] = np.zeros(size, np.uint8)
                found[name][kept] = encoding.decode(method, code, len(kept), before)
            else:
                found[name] = encoding.decode(method, code, size, before)
            at += length
        return found

    def _checked(self, index: int, arrays: Mapping[str, encoding.Bytes]) -> BlockPattern:
        known = layout(self.size)
        shaped = {
            name: data.view(known[name][0]).reshape(known[name][1]) for name, data in arrays.items()
        }
        pattern = pattern_of(self.size, shaped)
        if pattern.digest != self.digests[index]:
            raise self._wrong(index, f"digest {self.digests[index]}", pattern.digest)
        if pattern.kept != self.kept[index]:
            density = self.kept[index] / self.size.blocks
            raise self._wrong(index, f"the recorded density {density}", pattern.density)
        if repetitive_heads(pattern) != self.repetitive[index]:
            expected = f"{self.repetitive[index]} row-shared heads"
            raise self._wrong(index, expected, repetitive_heads(pattern))
        return pattern

    def _wrong(self, index: int, expected: str, got: object) -> PlanFormatError:
        return PlanFormatError(
            f"pattern {index} of {self.source} is not what was stored",
            expected=expected,
            got=got,
            remedy="copy or download the plan again, or calibrate again; a plan file must not "
            "be changed in place while it is in use",
        )
