"""Row-shared heads as the oracles of tests have them."""

from __future__ import annotations

import math

import numpy as np
import torch

from calibatt_compiler.plan import BlockPattern, Plan


def copy_rows(out: torch.Tensor, plan: Plan, pattern: BlockPattern) -> torch.Tensor:
    """Give the rows of row-shared heads the output of their nearest anchor row, in place.

    Args:
        out: (batch, heads, length, head_dim), in the model's token order.
        plan: whose grid and text stand in the sequence.
        pattern: whose heads and anchors count.
    """
    if pattern.repetitive is None:
        return out
    frames, height, width = plan.grid
    video = math.prod(plan.grid)
    first = out.shape[2] - video if plan.text_position == "first" else 0
    anchors = pattern.copies.anchors.tolist()
    rows = out[:, :, first : first + video].view(*out.shape[:2], frames, height, width, -1).clone()
    for head in np.flatnonzero(pattern.repetitive).tolist():
        for y in range(height):
            nearest = min(anchors, key=lambda anchor: (abs(anchor - y), anchor))
            rows[:, head, :, y] = rows[:, head, :, nearest]
    out[:, :, first : first + video] = rows.flatten(2, 4)
    return out
