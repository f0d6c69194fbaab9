"""PNG pictures without a picture library, so that `calibatt inspect` needs no extra package."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
import numpy.typing as npt

SHADES = 16
Bytes = npt.NDArray[np.uint8]
Shares = npt.NDArray[np.bool_] | npt.NDArray[np.float64]


def rgb_png(picture: Bytes) -> bytes:
    """Encode uint8 (height, width, 3) as a PNG file."""
    height, width, _ = picture.shape
    rows = picture.reshape(height, width * 3)
    return _png(width, height, depth=8, kind=2, rows=rows, chunks=b"")


def mask_png(mask: Shares, *, limit: int, colour: tuple[int, int, int]) -> bytes:
    """Draw a block mask, one pixel a block, on a transparent ground.

    A mask of more than `limit` blocks a side is reduced: a pixel then stands for a square of
    blocks, and its opacity for the share of them that is kept.

    Args:
        mask: bool (query_blocks, key_blocks), True is drawn; or opacities from 0 to 1.
        limit: most pixels a side.
        colour: red, green, blue of a kept block.
    """
    levels = np.rint(reduced(mask, limit) * (SHADES - 1)).astype(np.uint8)
    height, width = levels.shape
    padded = np.pad(levels, ((0, 0), (0, width % 2)))
    rows = np.bitwise_or(padded[:, ::2] << 4, padded[:, 1::2], dtype=np.uint8)
    palette = bytes(colour) * SHADES
    opacity = bytes(255 * level // (SHADES - 1) for level in range(SHADES))
    chunks = _chunk(b"PLTE", palette) + _chunk(b"tRNS", opacity)
    return _png(width, height, depth=4, kind=3, rows=rows, chunks=chunks)


def reduced(mask: Shares, limit: int) -> npt.NDArray[np.float64]:
    """Mean of a mask over squares, so many that neither side exceeds `limit`.

    Squares at the end of a row or column average over the blocks they have.
    """
    side = max(1, -(-max(mask.shape) // limit))
    values = mask.astype(np.float64)
    for axis in (0, 1):
        edges = np.arange(0, values.shape[axis], side)
        counts = np.diff(edges, append=values.shape[axis])
        sums = np.add.reduceat(values, edges, axis=axis)
        values = sums / (counts[:, None] if axis == 0 else counts)
    return values


def data_uri(content: bytes, media_type: str = "image/png") -> str:
    """Return bytes as a `data:` address, to be put into a page."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def _png(width: int, height: int, *, depth: int, kind: int, rows: Bytes, chunks: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    # Each line starts with its filter: 0, none.
    lines = np.pad(rows, ((0, 0), (1, 0))).tobytes()
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + chunks
        + _chunk(b"IDAT", zlib.compress(lines, 9))
        + _chunk(b"IEND", b"")
    )


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)
