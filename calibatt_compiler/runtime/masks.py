"""What the operators hand on of a mask: what it says of the keys, or the mask itself.

`key_padding` reads masks that are known, when a graph is compiled, to say one thing of each key.
`look_at_mask` looks at masks of pairs of tokens, once a forward pass and mask, and says what it saw
in a number on the host, the verdict: the host waits for that.
"""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor

from calibatt_compiler.kernels.common.padding import KeyPadding

OTHER, KEYS, ROWS, NOTHING = range(4)
"""Verdicts: no padding; it cuts keys; queries at these keys as well; it cuts nothing."""

AT_ONCE = 1 << 28
"""Numbers of a mask that are looked at at a time."""


class GivenMask(TypedDict, total=False):
    """The mask of a call as `Site.attend` takes it, where there is one."""

    mask: KeyPadding | Tensor


def given_mask(
    bias: Tensor | None,
    bounds: Tensor | None,
    rows: bool,
    verdict: Tensor | None,
    mask: Tensor | None,
) -> GivenMask:
    """Return what an operator was given.

    Args:
        bias: of `KeyPadding`; None: there is no mask.
        bounds: of `KeyPadding`.
        rows: of `KeyPadding`, where no verdict says it.
        verdict: int64 (1) on the CPU; None: the mask needed no look.
        mask: the mask that was looked at.
    """
    if bias is None or bounds is None:
        return {}
    if verdict is None or mask is None:
        return {"mask": KeyPadding(bias, bounds, rows)}
    what = int(verdict)
    if what == NOTHING:
        return {}
    return {"mask": mask if what == OTHER else KeyPadding(bias, bounds, what == ROWS)}


def of_keys(mask: Tensor) -> Tensor:
    """Return (B or 1, Sk) of a mask, as SDPA takes it, that is the same for all heads and queries.

    Args:
        mask: (B or 1, H or 1, Sq or 1, Sk), or without the first of these dimensions.
    """
    while mask.dim() < 4:
        mask = mask[None]
    return mask[:, 0, 0]


def look(mask: Tensor) -> tuple[KeyPadding, int]:
    """Return what a mask says of the keys, and its verdict; waits for the device.

    A query attends some of the keys that any query attends: all of them if it has as many. So the
    mask is read once, and only numbers of keys are compared.

    Args:
        mask: bool, as SDPA takes it.
    """
    while mask.dim() < 4:
        mask = mask[None]
    rows = max(1, AT_ONCE // (mask[:, :, :1].numel() or 1))
    parts = torch.split(mask, rows, 2)
    counts = torch.cat([part.sum(-1, dtype=torch.int32) for part in parts], 2)
    keys = torch.stack([part.any(2).any(1) for part in parts]).any(0)
    total = keys.sum(-1, dtype=torch.int32)[:, None, None]
    same = (counts == total).all()
    square = mask.shape[2] == mask.shape[3]
    wanted = total * keys[:, None] if square else total
    pairs = (counts == wanted).all() & square
    seen = torch.stack([same, pairs, keys.all()]).tolist()
    verdict = OTHER
    if seen[0]:
        verdict = NOTHING if seen[2] else KEYS
    elif seen[1]:
        verdict = ROWS
    return KeyPadding.of(keys), verdict
