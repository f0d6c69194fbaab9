"""Text tokens in the same sequence as the video's: their blocks stay dense."""

from __future__ import annotations

import torch
from torch import Tensor

from calibatt_compiler.plan.text import TextPosition

__all__ = ["TextPosition", "text_blocks"]


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
