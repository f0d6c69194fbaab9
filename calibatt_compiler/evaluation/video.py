"""Videos and contact sheets from frames; each file is whole or absent."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from calibatt_compiler.errors import PipelineError
from calibatt_compiler.evaluation.quality import Frames
from calibatt_compiler.files import replacing

LABEL_HEIGHT = 22
GAP = 4
MIN_SIDE = 320
"""Small videos are enlarged by a whole number until a panel is at least this wide."""
BACKGROUND = (24, 24, 27)
INK = (228, 228, 231)
DIFFERENCE_GAIN = 4


def write_video(path: str | os.PathLike[str], frames: Frames, fps: int) -> Path:
    """Write frames as an MP4 file: H.264 where FFmpeg has an encoder for it, else MPEG-4.

    Args:
        path: the file to write or replace.
        frames: uint8 (frames, height, width, 3), RGB; odd sizes are padded by repeating the edge.
        fps: frames a second.

    Raises:
        PipelineError: PyAV is not installed.
        OSError: the folder can't be written.
    """
    av = _av()
    target = Path(path)
    height, width = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    codec, options = "mpeg4", {"qscale": "2"}
    if "libx264" in av.codecs_available:
        codec, options = "libx264", {"crf": "16", "preset": "medium"}
    with replacing(target) as temporary, av.open(os.fspath(temporary), mode="w") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.width, stream.height = frames.shape[2], frames.shape[1]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return target


def side_by_side(panels: Sequence[tuple[str, Frames]]) -> Frames:
    """Put videos of one size next to each other, each under its label.

    Args:
        panels: label and frames, uint8 (frames, height, width, 3).

    Returns:
        uint8 (frames, label height + enlarged height, sum of widths and gaps, 3).
    """
    columns = []
    for index, (label, frames) in enumerate(panels):
        large = _enlarged(frames, MIN_SIDE)
        bar = np.broadcast_to(
            label_bar(label, large.shape[2]), (len(large), LABEL_HEIGHT, large.shape[2], 3)
        )
        if index:
            columns.append(_filled(len(large), LABEL_HEIGHT + large.shape[1], GAP))
        columns.append(np.concatenate([bar, large], axis=1))
    return np.concatenate(columns, axis=2)


def contact_sheet(dense: Frames, sparse: Frames, *, pictures: int = 5) -> Frames:
    """Frames spread over two videos as one picture: dense, sparse, and four times their difference.

    Args:
        dense: uint8 (frames, height, width, 3).
        sparse: the same shape.
        pictures: how many frames to show.

    Returns:
        uint8 (height, width, 3).
    """
    chosen = np.unique(np.linspace(0, len(dense) - 1, pictures).round().astype(int))
    stride = max(1, dense.shape[2] // MIN_SIDE)
    first, second = (video[chosen, ::stride, ::stride] for video in (dense, sparse))
    difference = np.abs(first.astype(np.int16) - second) * DIFFERENCE_GAIN
    rows = []
    for label, frames in (
        ("dense", first),
        ("sparse", second),
        (f"difference x{DIFFERENCE_GAIN}", difference.clip(0, 255).astype(np.uint8)),
    ):
        large = _enlarged(frames, MIN_SIDE // 2)
        strip: list[Frames] = []
        for frame in large:
            strip += [_filled(1, large.shape[1], GAP)[0], frame]
        row = np.concatenate(strip[1:], axis=1)
        rows += [label_bar(label, row.shape[1]), row]
    return np.concatenate(rows, axis=0)


def label_bar(text: str, width: int) -> Frames:
    """Return a bar of text, uint8 (22, width, 3)."""
    image_module, draw_module = _pillow()
    image = image_module.new("RGB", (width, LABEL_HEIGHT), BACKGROUND)
    draw_module.Draw(image).text((6, 4), text, fill=INK)
    return np.asarray(image, dtype=np.uint8)


def _enlarged(frames: Frames, width: int) -> Frames:
    scale = max(1, -(-width // frames.shape[2]))
    return frames.repeat(scale, axis=1).repeat(scale, axis=2)


def _filled(count: int, height: int, width: int) -> Frames:
    return np.broadcast_to(np.array(BACKGROUND, dtype=np.uint8), (count, height, width, 3))


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise _missing("av") from error
    return av


def _pillow() -> Any:
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise _missing("pillow") from error
    return Image, ImageDraw


def _missing(package: str) -> PipelineError:
    return PipelineError(
        "videos and pictures need packages that are not installed",
        expected=package,
        got="no such module",
        remedy='pip install "calibatt[report]"',
    )
