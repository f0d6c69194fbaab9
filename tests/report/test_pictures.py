"""PNG files of our own, read back by a picture library."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from calibatt_compiler.report.pictures import data_uri, mask_png, reduced, rgb_png

INDIGO = (79, 70, 229)


def opened(png: bytes) -> Image.Image:
    """Decode a PNG file, checksums included."""
    image = Image.open(io.BytesIO(png))
    image.load()
    return image


def test_rgb_is_exact():
    picture = np.random.default_rng(0).integers(0, 256, (13, 7, 3), np.uint8)
    assert (np.asarray(opened(rgb_png(picture))) == picture).all()


@pytest.mark.parametrize("shape", [(5, 6), (6, 5), (1, 1), (33, 17)])
def test_mask_is_drawn_where_it_is_true(shape: tuple[int, int]):
    mask = np.random.default_rng(0).random(shape) < 0.4
    pixels = np.asarray(opened(mask_png(mask, limit=64, colour=INDIGO)).convert("RGBA"))
    assert pixels.shape == (*shape, 4)
    assert ((pixels[..., 3] == 255) == mask).all()
    assert ((pixels[..., 3] == 0) == ~mask).all()
    assert (pixels[mask][:, :3] == INDIGO).all()


def test_reduction_keeps_the_mean():
    mask = np.random.default_rng(1).random((40, 60)) < 0.3
    small = reduced(mask, 20)
    assert small.shape == (14, 20)
    assert small[:13].mean() == pytest.approx(mask[:39].mean())
    # The last row of squares holds one row of blocks and averages over that alone.
    assert small[13, 0] == mask[39, :3].mean()


def test_reduced_mask_picture_is_within_its_limit():
    mask = np.zeros((591, 591), bool)
    mask[:300] = True
    image = opened(mask_png(mask, limit=96, colour=INDIGO))
    assert max(image.size) <= 96
    opacity = np.asarray(image.convert("RGBA"))[..., 3]
    assert (opacity[0] == 255).all()
    assert (opacity[-1] == 0).all()


def test_data_uri():
    assert data_uri(b"abc") == "data:image/png;base64,YWJj"
