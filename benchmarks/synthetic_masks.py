"""Synthetic block masks that look like calibrated ones, one attention site at a time.

What they are modelled on was measured on masks of `examples/tiny_wan` that calibration made
(50 steps, guidance 1, blocks of 32 tokens: 1.6 rows of a frame a block, as 128 tokens are at 720p;
A = 0.84, C = 0.99, k = 16, rho = 0.5, three inputs; 24 heads of 68 x 68 blocks). Their density and
the share of blocks that change from one step to the next are `DENSITY` and `CHANGE`. Given its left
and three upper neighbours, a block of theirs still holds 0.39 bit at step 0, 0.46 bit in the middle
and 0.33 bit at the end: that is how ragged they are, and `RAGGED` is set so that these are too.
Masks of larger models on more inputs have more blocks between two edges and should be smoother.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

DENSITY = (
    0.81, 0.62, 0.55, 0.50, 0.48, 0.46, 0.446, 0.437, 0.43, 0.425, 0.422, 0.419, 0.417, 0.415,
    0.414, 0.413, 0.412, 0.411, 0.41, 0.409, 0.409, 0.408, 0.408, 0.407, 0.406, 0.406, 0.405,
    0.404, 0.404, 0.403, 0.402, 0.402, 0.401, 0.40, 0.399, 0.398, 0.397, 0.396, 0.395, 0.395,
    0.393, 0.392, 0.391, 0.39, 0.389, 0.388, 0.386, 0.385, 0.381, 0.365,
)  # fmt: skip
"""Mean density of the measured masks at each of 50 steps."""

CHANGE = (
    0.188, 0.073, 0.043, 0.028, 0.019, 0.015, 0.011, 0.009, 0.0072, 0.006, 0.0056, 0.0046, 0.0041,
    0.0044, 0.004, 0.0035, 0.0036, 0.0036, 0.0034, 0.0034, 0.0034, 0.0031, 0.0039, 0.0035, 0.0034,
    0.0034, 0.0039, 0.0036, 0.0038, 0.0037, 0.0036, 0.0044, 0.0045, 0.0043, 0.0047, 0.0046, 0.0047,
    0.0049, 0.0054, 0.0057, 0.0057, 0.0066, 0.0073, 0.0078, 0.0089, 0.011, 0.0142, 0.0214, 0.0762,
)  # fmt: skip
"""Share of blocks in which the measured masks of step t + 1 differ from those of step t."""

RAGGED = 0.25
"""Height of the noise relative to the structure at which the masks are as ragged as measured."""

SCALE = 8192
"""Height of the structure, in units of the integer scores."""

Bits = npt.NDArray[np.uint8]
Scores = npt.NDArray[np.uint16]
Field = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Video:
    """Sizes of a model and its video.

    Attributes:
        grid: latent tokens (frames, height, width), raster order.
        block: tokens a block, on either side.
        heads: heads a site.
    """

    grid: tuple[int, int, int] = (21, 45, 80)
    block: int = 128
    heads: int = 40

    @property
    def tokens(self) -> int:
        """Tokens of the video."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def blocks(self) -> int:
        """Blocks of a row, the ragged last one included."""
        return -(-self.tokens // self.block)


def site_masks(
    video: Video, seed: int, *, steps: int = 50, ragged: float = RAGGED, jitter: float = 1.0
) -> Iterator[Bits]:
    """Yield the packed masks of one site, step by step: uint8 (heads, blocks, ceil(blocks / 8)).

    A block has a score, structure plus noise, and is kept where the score exceeds its head's
    threshold at this step. From step to step the threshold follows the measured density, and the
    noise of some blocks is drawn anew, so many that about as many blocks change as measured.

    Args:
        video: the sizes.
        seed: of this site.
        steps: diffusion steps; other numbers than 50 take the measured curves at fewer points.
        ragged: height of the noise.
        jitter: how many times as many blocks change from step to step, beside those that the
            threshold changes.
    """
    rng = np.random.default_rng(seed)
    base, floor = structure(video, rng)
    noise = max(1, int(ragged * SCALE))
    score = base + rng.integers(0, noise, base.shape, np.uint16)
    sample = slice(None, None, max(1, video.blocks**2 // 20_000))
    sampled = base.reshape(video.heads, -1)[:, sample].astype(np.float32)
    ranked = np.sort(score.reshape(video.heads, -1)[:, sample], axis=1)
    diagonal = np.arange(video.blocks)
    previous = None
    for at in np.linspace(0, len(DENSITY) - 1, steps).round().astype(int):
        target = np.clip(1 - (1 - floor) * (1 - DENSITY[at]) / (1 - DENSITY[-1]), 0.02, 1.0)
        place = ((1 - target) * (ranked.shape[1] - 1)).astype(int)
        threshold = ranked[np.arange(video.heads), place][:, None]
        if previous is not None:
            # What the threshold changes is part of what was measured; new noise does the rest.
            keep = np.clip((sampled + noise - threshold) / noise, 0, 1)
            flips = float((2 * keep * (1 - keep)).mean())
            rest = sum(CHANGE[previous:at]) - abs(DENSITY[at] - DENSITY[previous])
            _redraw(score, base, noise, rng, min(1.0, jitter * max(0.0, rest) / flips))
        previous = at
        mask = score >= threshold[:, :, None]
        mask[:, diagonal, diagonal] = True
        yield np.packbits(mask, axis=-1, bitorder="little")


def _redraw(
    score: Scores, base: Scores, noise: int, rng: np.random.Generator, share: float
) -> None:
    """Draw the noise of a share of the blocks anew."""
    where = rng.integers(0, score.size, int(share * score.size))
    new = rng.integers(0, noise, len(where), np.uint16)
    score.reshape(-1)[where] = base.reshape(-1)[where] + new


def structure(video: Video, rng: np.random.Generator) -> tuple[Scores, npt.NDArray[np.float64]]:
    """Return the noiseless scores of all heads, and the density of each head at the last step."""
    blocks = video.blocks
    token = np.arange(blocks, dtype=np.float32) * video.block + video.block / 2
    frame_tokens = video.grid[1] * video.grid[2]
    frame = token // frame_tokens
    between_frames = np.abs(frame[:, None] - frame[None, :])
    place = token % frame_tokens / frame_tokens
    apart = np.abs(place[:, None] - place[None, :])
    apart = np.minimum(apart, 1 - apart)
    base = np.empty((video.heads, blocks, blocks), np.uint16)
    floor = np.empty(video.heads)
    for head in range(video.heads):
        field = _head(between_frames, apart, token / token[-1], rng)
        field -= field.min()
        field *= SCALE / max(float(field.max()), 1e-6)
        base[head] = field
        dense = rng.random() < 0.1
        floor[head] = rng.uniform(0.9, 1.0) if dense else rng.beta(2, 5)
    return base, floor


def _head(between_frames: Field, apart: Field, along: Field, rng: np.random.Generator) -> Field:
    """One head's scores: frame-local bands, diagonals a frame apart, columns, smooth patches."""
    weight = rng.dirichlet([0.5, 0.5, 0.4, 0.4])
    local = np.exp(-between_frames / rng.uniform(0.5, 6.0))
    diagonals = np.exp(-apart / rng.uniform(0.02, 0.15)) * (
        1 - rng.uniform(0, 0.04) * between_frames
    )
    columns = rng.random(len(along), np.float32)[None, :] ** 6
    phases = rng.uniform(0, 2 * np.pi, (2, 3, 1))
    speeds = rng.uniform(2, 40, (2, 3, 1))
    rows, keys = np.sin(speeds * along + phases).astype(np.float32)
    patches = 0.5 + (rows.T @ keys) / 6
    field: Field = (
        weight[0] * local + weight[1] * diagonals + weight[2] * columns + weight[3] * patches
    ).astype(np.float32)
    return field
