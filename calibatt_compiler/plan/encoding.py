"""How an array of a pattern is written: two sources, three codes, whichever is smallest.

An array is taken as its bytes, and these either as they are or XORed with those of the array of the
same name in the site's previous pattern (`/previous`): masks of neighbouring steps differ in few
blocks. What results is written by one of

- `raw`: as it is;
- `deflate`: compressed by zlib; what regular masks and numbers take;
- `gaps`: the distances between its set bits, compressed by zlib. A gap is written as its number of
  unset bits: a byte below 255 ends it, a byte of 255 stands for 255 unset bits and goes on. Noise
  at the edges of masks takes this: Huffman codes of gaps come within some per cent of its entropy.

Measured against lzma, zstandard and XOR with the row above in `docs/decisions/0008`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Method = Literal["raw", "deflate", "gaps", "raw/previous", "deflate/previous", "gaps/previous"]
METHODS: tuple[Method, ...] = get_args(Method)

LEVEL = 6
GO_ON = 255
"""Byte of a gap that does not end it."""

GAPS_BELOW, DEFLATE_ABOVE = 0.25, 0.01
"""Share of set bits below which gaps, and above which plain bytes, are worth a try."""

SMALL = 1 << 18
"""Bytes up to which every code is tried: there time does not matter."""

PIECE = 1 << 16
"""Bytes that are unpacked at a time."""

_ONES = np.array([bin(value).count("1") for value in range(256)], np.uint8)


def encode(array: npt.NDArray[np.generic], previous: Bytes | None) -> tuple[Method, bytes]:
    """Return how an array is written and its code.

    Args:
        array: any dtype and shape.
        previous: `as_bytes` of the array of the same name and size in the previous pattern, if any.
    """
    plain = as_bytes(array)
    ones = _share(plain)
    if previous is None:
        return _shortest(plain, ones)
    delta = plain ^ previous
    changed = _share(delta)
    # Few changes are the rule. Both are tried only where neither is clearly shorter.
    if _entropy(changed) > _entropy(ones):
        return _shortest(plain, ones)
    method, code = _shortest(delta, changed)
    found: tuple[Method, bytes] = (f"{method}/previous", code)  # type: ignore[assignment]
    return found


def decode(method: Method, code: Bytes, length: int, previous: Bytes | None) -> Bytes:
    """Return the bytes of an array; the inverse of `encode`.

    Args:
        method: how it was written.
        code: what was written.
        length: how many bytes are expected.
        previous: as for `encode`; needed by the methods `.../previous`.

    Raises:
        ValueError: the code is no such code, or of another length.
    """
    name, _, relative = method.partition("/")
    if name == "raw":
        if len(code) != length:
            raise ValueError(f"{len(code)} bytes instead of {length}")
        found = np.array(code)
    elif name == "deflate":
        found = np.concatenate([np.empty(0, np.uint8), *_inflate(code, length)])
        if len(found) != length:
            raise ValueError(f"{len(found)} bytes instead of {length}")
    else:
        most = 8 * length + 8 * length // GO_ON + 1
        found = _from_gaps(_inflate(code, most), length)
    if relative:
        if previous is None or len(previous) != length:
            raise ValueError("there is no previous array of this size")
        found = found ^ previous
    return found


def as_bytes(array: npt.NDArray[np.generic]) -> Bytes:
    """Return the bytes of an array, uint8 (bytes,); a view where it is contiguous."""
    flat: Bytes = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return flat


def _shortest(data: Bytes, ones: float) -> tuple[Method, bytes]:
    raw = data.tobytes()
    every = len(raw) <= SMALL
    found: list[tuple[Method, bytes]] = [("raw", raw)]
    if every or ones > DEFLATE_ABOVE:
        found.append(("deflate", _deflate(raw, zlib.Z_DEFAULT_STRATEGY)))
    if every or ones < GAPS_BELOW:
        gaps = _gaps(data).tobytes()
        found.append(("gaps", _deflate(gaps, zlib.Z_HUFFMAN_ONLY)))
        if len(gaps) <= SMALL:
            found.append(("gaps", _deflate(gaps, zlib.Z_DEFAULT_STRATEGY)))
    return min(found, key=lambda item: len(item[1]))


def _deflate(data: bytes, strategy: int) -> bytes:
    packer = zlib.compressobj(LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS, 9, strategy)
    return packer.compress(data) + packer.flush()


def _inflate(code: Bytes, longest: int) -> Iterator[Bytes]:
    """Unpack at most `longest` bytes, by pieces: a damaged code must not fill the memory."""
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    length = 0
    for at in range(0, len(code), PIECE):
        waiting = code[at : at + PIECE].tobytes()
        while waiting or at + PIECE >= len(code):
            try:
                data = unpacker.decompress(waiting, PIECE)
            except zlib.error as error:
                raise ValueError(str(error)) from error
            length += len(data)
            if length > longest or unpacker.unused_data:
                raise ValueError("a compressed array does not end where it should")
            if data:
                yield np.frombuffer(data, np.uint8)
            elif not unpacker.unconsumed_tail:
                break
            waiting = unpacker.unconsumed_tail
    if not unpacker.eof:
        raise ValueError("a compressed array does not end where it should")


def _gaps(data: Bytes) -> Bytes:
    where = np.flatnonzero(np.unpackbits(data, bitorder="little").view(np.bool_))
    whole, rest = np.divmod(np.diff(where, prepend=-1) - 1, GO_ON)
    gaps = np.full(len(rest) + int(whole.sum()), GO_ON, np.uint8)
    gaps[np.cumsum(whole + 1) - 1] = rest
    return gaps


def _from_gaps(pieces: Iterable[Bytes], length: int) -> Bytes:
    found = np.zeros(length, np.uint8)
    # Bits behind the last gap; whether that one has ended.
    at, ended = 0, True
    for gaps in pieces:
        ends = gaps != GO_ON
        # A byte that ends a gap stands for its unset bits and the set one; one that goes on for
        # itself.
        reach = at + np.cumsum(np.minimum(gaps, GO_ON - 1) + np.uint8(1), dtype=np.int64)
        where = reach[ends] - 1
        if reach[-1] > 8 * length:
            raise ValueError("gaps past the end of an array")
        if len(where):
            first = int(where[0]) // 8
            bits = np.zeros(int(where[-1]) + 1 - 8 * first, np.bool_)
            bits[where - 8 * first] = True
            packed = np.packbits(bits, bitorder="little")
            found[first : first + len(packed)] |= packed
        at, ended = int(reach[-1]), bool(ends[-1])
    if not ended:
        raise ValueError("gaps past the end of an array")
    return found


def _share(data: Bytes) -> float:
    """Set bits / all bits."""
    return float(_ONES[data].sum(dtype=np.int64)) / max(1, 8 * len(data))


def _entropy(share: float) -> float:
    """Bits a bit, if all were independent."""
    if share in (0.0, 1.0):
        return 0.0
    return float(-share * np.log2(share) - (1 - share) * np.log2(1 - share))
