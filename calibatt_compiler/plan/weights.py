"""Weights of kept blocks: how many times each counts, in steps that a byte can hold.

A block of weight w has log(w) added to the scores of its keys, so that its probabilities and the
sum that they are divided by grow w-fold. So a kept block can stand for dropped ones.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calibatt_compiler.errors import PlanError

STEPS = 16
"""Codes an octave: code c is the weight 2 ** (c / STEPS). Rounding is within 2.2 %."""

MAX_WEIGHT = 2.0 ** (255 / STEPS)


def encode(mask: Tensor, weight: Tensor) -> npt.NDArray[np.uint8] | None:
    """Round weights to codes; None if all kept blocks count once.

    Args:
        mask: bool, the kept blocks.
        weight: float of the same shape, from 1 to `MAX_WEIGHT` where kept; not looked at elsewhere.

    Raises:
        PlanError: shapes or values that can't be weights.
    """
    if not weight.is_floating_point() or weight.shape != mask.shape:
        raise PlanError(
            "weights must be as many as blocks",
            expected=f"float {tuple(mask.shape)}",
            got=f"{weight.dtype} {tuple(weight.shape)}",
            remedy="pass one weight a block; those of dropped blocks don't matter",
        )
    kept = torch.where(mask, weight, 1.0).double()
    if not ((kept >= 1) & (kept <= MAX_WEIGHT)).all():  # also catches NaN
        raise PlanError(
            "a weight of a pattern is out of range",
            expected=f"1 to {MAX_WEIGHT:.0f}: how many blocks a kept one stands for",
            got=f"{kept.min():g} to {kept.max():g}",
            remedy="clamp the weights",
        )
    codes = (kept.log2() * STEPS).round().to(torch.uint8)
    return codes.cpu().numpy() if bool(codes.any()) else None


def log_weight(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Natural logarithm of the weights that codes stand for."""
    return codes.astype(np.float32) * np.float32(math.log(2) / STEPS)


def check(
    codes: npt.NDArray[np.uint8],
    mask: npt.NDArray[np.bool_],
    repetitive: npt.NDArray[np.bool_] | None = None,
) -> None:
    """Raise `PlanError` unless there is one code a block, 0 where dropped; make them read-only.

    Blocks of heads that are `repetitive`, bool (heads,), can't have weights.
    """
    if codes.dtype != np.uint8 or codes.shape != mask.shape:
        raise PlanError(
            "the weights of a pattern have the wrong shape",
            expected=f"uint8 {mask.shape}",
            got=f"{codes.dtype} {codes.shape}",
            remedy="build patterns with BlockPattern.from_mask",
        )
    # As bytes: an index of booleans would take ten times as long, and samplers wait for this.
    if (codes.astype(np.bool_) > mask).any():
        raise PlanError(
            "a dropped block has a weight",
            expected="weights of kept blocks alone",
            got=f"{int(np.count_nonzero(codes[~mask]))} of dropped ones",
            remedy="calibrate again; the plan was written by something else or is damaged",
        )
    if repetitive is not None and codes[repetitive].any():
        raise PlanError(
            "a row-shared head has weights",
            expected="weights in heads that are sets of blocks alone",
            got=f"weights in head {int(np.flatnonzero(repetitive & codes.any((1, 2)))[0])}",
            remedy="pass weight 1 for the blocks of row-shared heads",
        )
    codes.setflags(write=False)
