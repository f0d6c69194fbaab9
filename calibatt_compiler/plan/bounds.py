"""What a plan file may call for: memory in proportion to its size, judged before any is taken.

A compressed code of a few bytes can stand for gigabytes, and a short text for millions of objects.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from calibatt_compiler.plan.stored import PatternSize, layout_bytes

HEADER_BYTES = 1 << 23
"""Longest header: 100 sites of 500 steps that share no pattern take 7 MB."""

OBJECTS, MEMBERS = 1 << 14, 1 << 17
"""Most JSON objects in a header, and members of all: three and 30 a site, and a few more."""

SLACK, LIST_BYTES, VALUE_BYTES = 1 << 10, 8, 3
"""Most JSON lists and values in a text: so many, and one for each so many bytes."""

FREE_SITE, FREE_PLAN = 1 << 24, 1 << 27
"""Bytes of one decoded pattern of a site, and of one of each site, that any file may call for.

A pattern that keeps every block is written in a thousandth of its bits; those of 720p videos with
blocks of 128 tokens take 1.7 MB a site."""

RATIO = 32
"""Beyond these, decoded bytes for each byte of codes. Masks of real models take less than 10."""

DRAWN_BLOCKS, DRAWN_KEPT, DRAWN_PLAN = 1 << 26, 1 << 24, 1 << 30
"""Most blocks of a pattern that is drawn from zones, most of them that a step keeps, and most bytes
of one drawn pattern of each site. 720p videos have 14 million blocks of 128 tokens a site."""

MAX_BYTES = 1 << 28
"""Most bytes of one array: above it a size is taken for damage."""


def header_problem(path: Path) -> str | None:
    """Return why a file's header is not worth to be parsed; None if it is.

    Raises:
        OSError: the file can't be read.
    """
    with path.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        length = int.from_bytes(opened.read(8), "little")
        if length > min(HEADER_BYTES, max(0, size - 8)):
            most = f"at most {HEADER_BYTES} bytes of header, in a file of {size}"
            return f"its header would have {length} bytes; there can be {most}"
        return text_problem(opened.read(length))


def text_problem(text: bytes) -> str | None:
    """Return why a JSON text is not worth to be parsed: it would make too many objects."""
    limits = (
        ("objects", b"{", OBJECTS),
        ("members", b":", MEMBERS),
        ("lists", b"[", SLACK + len(text) // LIST_BYTES),
        ("values", b",", SLACK + len(text) // VALUE_BYTES),
    )
    for what, mark, most in limits:
        if (count := text.count(mark)) > most:
            return f"its header does not parse: {count} {what}, where {most} are the most"
    return None


@dataclass(frozen=True)
class Part:
    """What a file says of one site.

    Attributes:
        name: of the site.
        size: of each of its patterns.
        weighted: whether they have weights.
        codes: bytes of its tensor.
        drawn: most blocks that a step keeps, of patterns that are drawn from zones; else None.
    """

    name: str
    size: PatternSize
    weighted: bool
    codes: int
    drawn: int | None = None

    @property
    def decoded(self) -> int:
        """Bytes of a decoded pattern: a bit a block and, with weights, a byte more."""
        bits = self.size.heads * self.size.query_blocks * -(-self.size.key_blocks // 8)
        return bits + self.size.blocks * self.weighted

    @property
    def too_large(self) -> bool:
        """Whether its patterns are too large for its codes; zones are small by their nature."""
        if layout_bytes(self.size) > MAX_BYTES:
            return True
        if self.drawn is not None:
            return self.size.blocks > DRAWN_BLOCKS or self.drawn > DRAWN_KEPT
        return self.decoded > max(FREE_SITE, RATIO * self.codes)


def sizes_problem(parts: Iterable[Part]) -> str | None:
    """Return why sites are taken for damaged: their patterns are too large for their codes."""
    stored = drawn = codes = 0
    for part in parts:
        if part.too_large:
            said = f"{part.codes} bytes that stand for patterns of {part.decoded}"
            return f"site {part.name!r}: {said}"
        if part.drawn is None:
            stored, codes = stored + part.decoded, codes + part.codes
        else:
            drawn += part.decoded
    if stored > max(FREE_PLAN, RATIO * codes) or drawn > DRAWN_PLAN:
        return f"{codes} bytes of codes that stand for patterns of {stored + drawn}"
    return None
