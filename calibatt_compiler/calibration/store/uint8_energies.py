"""Energies in a byte: enough to select masks again, in a quarter of the space."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

PER_OCTAVE = 8
"""Codes a factor of two: an energy is off by 2^(1/16) - 1 = 4.4 % at most."""

NOTHING = 255
"""Code of energies below 2^(-254 / 8) = 2.8e-10."""


def encode(energy: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Return round(-8 log2(energy)) as uint8, of energies in [0, 1]; 255 for next to none."""
    with np.errstate(divide="ignore"):
        codes = np.rint(-PER_OCTAVE * np.log2(energy))
    found: npt.NDArray[np.uint8] = np.clip(codes, 0, NOTHING).astype(np.uint8)
    return found


def decode(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Return the energies that codes stand for, float32."""
    table = np.exp2(-np.arange(NOTHING + 1) / PER_OCTAVE).astype(np.float32)
    table[NOTHING] = 0.0
    return table[codes]
