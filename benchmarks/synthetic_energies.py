"""Synthetic squared energies that look like those of a large model, one site and step group a time.

They lie where those of `synthetic_masks` do: bands along frames, diagonals a frame apart, columns,
patches. A head is as peaked as its masks say: the share of its blocks that they keep at the steps
of a group holds `MASS` of its energy. Inputs differ by `SPREAD`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from synthetic_masks import DENSITY, SCALE, Field, Video, structure

MASS = 0.84
"""A of the masks that `synthetic_masks` is modelled on: attention mass that calibration keeps."""

SPREAD = 0.5
"""Standard deviation of the logarithm of a block's energy around its place in the structure."""

SAMPLE = 24
"""One row in so many tells how peaked a head is."""


def site_squares(video: Video, seed: int, group: int, groups: int) -> npt.NDArray[np.float32]:
    """Return mean squared energies of a site at a step group, (heads, blocks, blocks).

    Args:
        video: the sizes.
        seed: of the site.
        group: the step group, whose noise is its own.
        groups: how many there are; see `synthetic_masks.DENSITY`.
    """
    scores, floors = structure(video, np.random.default_rng(seed))
    noise = np.random.default_rng((seed, group))
    steps = np.array_split(np.array(DENSITY), groups)[group]
    kept = 1 - (1 - floors) * (1 - steps.mean()) / (1 - DENSITY[-1])
    found = np.empty(scores.shape, np.float32)
    for head, field in enumerate(scores):
        logits = field / np.float32(SCALE)
        drawn = noise.standard_normal(logits.shape, np.float32) * np.float32(SPREAD)
        sharp = _sharpness(logits[::SAMPLE], drawn[::SAMPLE], float(np.clip(kept[head], 0.02, 1)))
        np.square(_energies(logits, drawn, sharp), out=found[head])
    return found


def _sharpness(logits: Field, drawn: Field, kept: float) -> float:
    """Height of the structure at which a share `kept` of the blocks holds `MASS` of the energy."""
    low, high = 0.0, 40.0
    for _ in range(12):
        middle = (low + high) / 2
        energy = np.sort(_energies(logits, drawn, middle), axis=None)[::-1]
        held = energy[: max(1, round(kept * energy.size))].sum() / energy.sum()
        low, high = (middle, high) if held < MASS else (low, middle)
    return low


def _energies(logits: Field, drawn: Field, sharp: float) -> Field:
    exponents = np.float32(sharp) * logits + drawn
    energy: Field = np.exp(exponents - exponents.max(-1, keepdims=True))
    energy /= energy.sum(-1, keepdims=True)
    return energy
