"""How far a video is from its dense twin: PSNR, SSIM and flicker on 8-bit frames.

All three compare a video with the dense one of the same prompt and seed. They say how much
sparsity changed the video, not how good either is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calibatt_compiler.errors import PipelineError

CPU = torch.device("cpu")
PEAK = 255.0
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_K = (0.01, 0.03)
Frames = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Quality:
    """Distance of a video from the dense one of the same prompt and seed.

    Attributes:
        psnr: dB over all frames and channels; infinite for equal videos.
        ssim: mean structural similarity of the frames, 1 for equal videos.
        flicker: root mean square, in 8-bit levels, of what changes from frame to frame in one
            video and not in the other; 0 for equal videos.
    """

    psnr: float
    ssim: float
    flicker: float


def measure(dense: Frames, other: Frames, device: torch.device = CPU) -> Quality:
    """Compare two videos.

    Args:
        dense: uint8 (frames, height, width, channels).
        other: the same shape.
        device: where SSIM is computed, which takes seconds on a CPU; in float64 anywhere.

    Raises:
        PipelineError: shapes or dtypes differ, or frames are smaller than the SSIM window.
    """
    _check(dense, other)
    return Quality(psnr(dense, other), ssim(dense, other, device), flicker(dense, other))


def psnr(dense: Frames, other: Frames) -> float:
    """Peak signal-to-noise ratio in dB: 10 log10(255^2 / MSE), MSE over the whole video."""
    total = 0.0
    for a, b in zip(dense, other, strict=True):
        total += float(np.square(a.astype(np.float64) - b.astype(np.float64)).mean())
    mse = total / len(dense)
    return math.inf if mse == 0 else 10 * math.log10(PEAK**2 / mse)


def ssim(dense: Frames, other: Frames, device: torch.device = CPU) -> float:
    """Structural similarity, mean over frames, channels and pixels.

    Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to structural
    similarity" (2004), eq. 13: Gaussian window of 11x11 with sigma 1.5, K1 = 0.01, K2 = 0.03,
    only where the window lies inside the frame. Each colour channel on its own.
    """
    values = [
        _ssim_map(_planes(a, device), _planes(b, device)).mean()
        for a, b in zip(dense, other, strict=True)
    ]
    return math.fsum(torch.stack(values).tolist()) / len(values)


def flicker(dense: Frames, other: Frames) -> float:
    """Root mean square over time of the change of the error, in 8-bit levels; 0 for one frame."""
    if len(dense) < 2:
        return 0.0
    total = 0.0
    previous = None
    for a, b in zip(dense, other, strict=True):
        error = b.astype(np.float32) - a.astype(np.float32)
        if previous is not None:
            total += float(np.square(error - previous).mean(dtype=np.float64))
        previous = error
    return math.sqrt(total / (len(dense) - 1))


def _check(dense: Frames, other: Frames) -> None:
    if dense.shape != other.shape or dense.dtype != np.uint8 or other.dtype != np.uint8:
        raise PipelineError(
            "two videos of different form can't be compared",
            expected="uint8 (frames, height, width, channels), one shape",
            got=f"{dense.dtype} {dense.shape} and {other.dtype} {other.shape}",
            remedy="generate both with the same size, number of frames and pipeline",
        )
    if dense.ndim != 4 or len(dense) == 0 or min(dense.shape[1:3]) < SSIM_WINDOW:
        raise PipelineError(
            "the frames can't be compared",
            expected=f"(frames, height, width, channels), at least {SSIM_WINDOW} pixels a side",
            got=f"shape {dense.shape}",
            remedy="generate a larger video",
        )


def _planes(frame: Frames, device: torch.device) -> Tensor:
    """uint8 (H, W, C) -> float64 (C, 1, H, W): float64, as variances are small differences."""
    pixels = torch.from_numpy(np.ascontiguousarray(frame)).to(device)
    return pixels.permute(2, 0, 1)[:, None].double()


def _window(device: torch.device) -> Tensor:
    x = torch.arange(SSIM_WINDOW, dtype=torch.float64, device=device) - SSIM_WINDOW // 2
    weights = torch.exp(-(x**2) / (2 * SSIM_SIGMA**2))
    return weights / weights.sum()


def _blur(planes: Tensor) -> Tensor:
    window = _window(planes.device)
    rows = torch.nn.functional.conv2d(planes, window.view(1, 1, 1, -1))
    return torch.nn.functional.conv2d(rows, window.view(1, 1, -1, 1))


def _ssim_map(x: Tensor, y: Tensor) -> Tensor:
    c1, c2 = ((k * PEAK) ** 2 for k in SSIM_K)
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = _blur(x * x) - mean_x**2
    variance_y = _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return luminance * (2 * covariance + c2) / (variance_x + variance_y + c2)
