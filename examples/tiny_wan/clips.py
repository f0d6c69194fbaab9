"""Read the clip file and cut it into training windows."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from settings import VideoSize
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """One training clip: frames [start, start + frames) of a shot."""

    shot: int
    start: int


def load_clips(path: Path) -> list[Tensor]:
    """Return each shot's frames as uint8 (frames, 3, H, W)."""
    with safe_open(path, framework="np") as file:
        counts = [entry["frames"] for entry in json.loads(file.metadata()["shots"])]
        data, ends = file.get_tensor("images"), file.get_tensor("ends")
    starts = [0, *ends[:-1].tolist()]
    frames = [
        np.asarray(Image.open(io.BytesIO(data[a:b].tobytes())).convert("RGB"))
        for a, b in zip(starts, ends.tolist(), strict=True)
    ]
    pixels = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()
    return list(pixels.split(counts))


def windows(clips: list[Tensor], size: VideoSize) -> list[Window]:
    """Return the windows of all shots."""
    return [
        Window(shot, start)
        for shot, clip in enumerate(clips)
        for start in range(0, clip.shape[0] - size.frames + 1, size.stride)
    ]


def pixels_to_video(pixels: Tensor) -> Tensor:
    """Turn uint8 (..., T, 3, H, W) into float (..., 3, T, H, W) in [-1, 1]."""
    return pixels.movedim(-4, -3).float() / 127.5 - 1.0
