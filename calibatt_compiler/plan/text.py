"""Text tokens in the same sequence as the video's: their blocks are dense, at any text length."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calibatt_compiler.errors import PlanError
from calibatt_compiler.plan.pattern import BlockPattern

TextPosition = Literal["first", "last"]


def text_blocks(
    length: int, video: int, block: int, position: TextPosition | None
) -> Tensor | None:
    """Tell which blocks of a sequence hold a text token.

    Args:
        length: tokens of the sequence.
        video: tokens of it that are video.
        block: tokens a block.
        position: where the text stands.

    Returns:
        bool (blocks,), or None if the sequence holds no text.
    """
    text = length - video
    if text <= 0 or position is None:
        return None
    starts = torch.arange(0, length, block)
    if position == "first":
        return starts < text
    return (starts + block).clamp_max(length) > video


def fit_mask(
    mask: Tensor,
    lengths: tuple[int, int],
    to: tuple[int, int],
    *,
    video: int,
    block: tuple[int, int],
    position: TextPosition,
) -> Tensor:
    """Carry a block mask over to sequences with other text lengths.

    A block of the new sequence that holds a text token is kept, as query and as key. Any other
    takes what the old blocks say that hold its video tokens, OR-ed where these are two: with the
    text first and its length changed by no multiple of the block, blocks cut the video elsewhere.
    So every pair of video tokens that was kept stays kept. With the text last, or a change by a
    multiple of the block, the video's own blocks are copied as they are.

    Args:
        mask: bool (..., query_blocks, key_blocks), of sequences with text.
        lengths: tokens on the query and the key side.
        to: the same of the new sequences; more than `video` each.
        video: video tokens in either.
        block: tokens a query block, tokens a key block.
        position: where the text stands.

    Returns:
        bool (..., query_blocks, key_blocks) of the new sequences, on the same device.
    """
    if lengths == to:
        return mask
    sides = [
        [part.to(mask.device) for part in block_sources(old, new, video, size, position)]
        for old, new, size in zip(lengths, to, block, strict=True)
    ]
    (row, next_row, text_rows), (column, next_column, text_columns) = sides
    fitted = mask[..., row, :] | mask[..., next_row, :]
    fitted = fitted[..., column] | fitted[..., next_column]
    return fitted | text_rows[:, None] | text_columns


def block_sources(
    old: int, new: int, video: int, block: int, position: TextPosition
) -> tuple[Tensor, Tensor, Tensor]:
    """For each new block: first and last old block with its tokens, and whether it holds text.

    Of blocks that hold text the old ones are 0.
    """
    shift = old - new if position == "first" else 0
    starts = torch.arange(0, new, block)
    ends = (starts + block).clamp_max(new)
    text = starts < new - video if position == "first" else ends > video
    first, last = (starts + shift) // block, (ends - 1 + shift) // block
    return first.where(~text, 0), last.where(~text, 0), text


def fit_pattern(
    pattern: BlockPattern, to: tuple[int, int], *, video: int, position: TextPosition
) -> BlockPattern:
    """Carry a pattern over to sequences with other text lengths; see `fit_mask`.

    Row-shared heads attend all keys from the rows that they compute, as calibration makes them.

    Raises:
        PlanError: its blocks have weights, which were made for the blocks of its own length.
    """
    lengths = (pattern.query_length, pattern.key_length)
    if lengths == to:
        return pattern
    if pattern.weights is not None:
        raise PlanError(
            "a pattern with weights can't be carried over to another text length",
            expected=f"{lengths} query and key tokens",
            got=to,
            remedy="use prompts of the calibrated length, or patterns without weights",
        )
    copies = pattern.copies
    if copies is not None:
        copies = replace(copies, first=to[0] - video if position == "first" else 0)
    block = (pattern.block_m, pattern.block_n)
    if position == "last":
        bits = _copied(pattern, to, video)
    else:
        mask = fit_mask(pattern.mask(), lengths, to, video=video, block=block, position=position)
        bits = np.packbits(mask.numpy(), axis=-1, bitorder="little")
    if pattern.repetitive is not None and copies is not None:
        every = np.packbits(np.ones(-(-to[1] // block[1]), np.bool_), bitorder="little")
        rows = -(-len(copies.computed(to[0])) // block[0])
        bits[pattern.repetitive, :rows] = every
        bits[pattern.repetitive, rows:] = 0
    return replace(pattern, query_length=to[0], key_length=to[1], bits=bits, copies=copies)


def _copied(pattern: BlockPattern, to: tuple[int, int], video: int) -> npt.NDArray[np.uint8]:
    """`fit_mask` with the text last, on packed bits: a new prompt may call for it at each step."""
    rows, columns = video // pattern.block_m, video // pattern.block_n
    all_columns = -(-to[1] // pattern.block_n)
    kept = np.packbits(np.ones(all_columns, np.bool_), bitorder="little")
    bits = np.tile(kept, (pattern.heads, -(-to[0] // pattern.block_m), 1))
    whole, rest = divmod(columns, 8)
    bits[:, :rows, :whole] = pattern.bits[:, :rows, :whole]
    if rest:
        old = pattern.bits[:, :rows, whole] | np.uint8(256 - (1 << rest))
        bits[:, :rows, whole] &= old
    return bits


def other_text(lengths: tuple[int, int], to: tuple[int, int], video: int) -> bool:
    """Whether two pairs of lengths are of the same video with text, and differ in text alone."""
    text = [length - video for length in (*lengths, *to)]
    return min(text) > 0 and text[0] == text[1] and text[2] == text[3]
