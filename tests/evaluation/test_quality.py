"""Quality of videos, against values of an independent implementation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from calibatt_compiler.errors import PipelineError
from calibatt_compiler.evaluation.quality import flicker, measure, psnr, ssim


def video(noise: int, frames: int = 3) -> np.ndarray:
    """A moving picture with a fixed disturbance, uint8 (frames, 24, 31, 3)."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(24), np.arange(31), indexing="ij")
    base = 127 + 60 * np.sin(x / 3.0 + t) + 50 * np.cos(y / 4.0 - t)
    colours = np.stack([base, base[:, ::-1], 255 - base], -1)
    pattern = (x * 7 + y * 13 + t * 5) % 11 - 5
    return np.clip(np.rint(colours + noise * pattern[..., None]), 0, 255).astype(np.uint8)


# scikit-image: structural_similarity(gaussian_weights=True, sigma=1.5, data_range=255,
# use_sample_covariance=False, channel_axis=-1), mean over the frames; peak_signal_noise_ratio.
@pytest.mark.parametrize(
    ("noise", "similarity", "decibels"),
    [(1, 0.9894996697323895, 38.129052774219176), (6, 0.7388236723968205, 22.596568427112757)],
)
def test_known_values(noise: int, similarity: float, decibels: float):
    assert ssim(video(0), video(noise)) == pytest.approx(similarity, abs=1e-9)
    assert psnr(video(0), video(noise)) == pytest.approx(decibels, abs=1e-9)


def test_one_level_everywhere():
    dense = np.full((2, 16, 16, 3), 100, np.uint8)
    assert psnr(dense, dense + 1) == pytest.approx(20 * math.log10(255))


def test_equal_videos():
    result = measure(video(2), video(2))
    assert result.psnr == math.inf
    assert result.ssim == pytest.approx(1.0)
    assert result.flicker == 0


def test_wrap_around_is_not_small():
    dense, other = np.zeros((1, 16, 16, 3), np.uint8), np.full((1, 16, 16, 3), 255, np.uint8)
    assert psnr(dense, other) == pytest.approx(0.0)
    assert psnr(other, dense) == pytest.approx(0.0)


def test_flicker_sees_change_and_not_an_offset():
    dense = np.full((4, 16, 16, 3), 100, np.uint8)
    assert flicker(dense, dense + 5) == 0
    trembling = dense.copy()
    trembling[1::2] += 5
    assert flicker(dense, trembling) == pytest.approx(5.0)
    assert psnr(dense, trembling) > psnr(dense, dense + 5)
    assert flicker(dense[:1], trembling[1:2]) == 0


@pytest.mark.parametrize(
    ("dense", "other"),
    [
        (video(0), video(0, frames=2)),
        (video(0), video(0).astype(np.float32)),
        (video(0)[:, :10], video(0)[:, :10]),
        (video(0)[:0], video(0)[:0]),
        (video(0)[0], video(0)[0]),
    ],
    ids=["length", "dtype", "too small", "no frames", "one frame's array"],
)
def test_refused(dense: np.ndarray, other: np.ndarray):
    with pytest.raises(PipelineError, match="expected"):
        measure(dense, other)
