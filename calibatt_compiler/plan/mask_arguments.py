"""Types of what a user makes a plan from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from calibatt_compiler.arguments import is_integers, require
from calibatt_compiler.errors import PlanError


def check_masks(
    masks: object, grid: object, block: object, lengths: object
) -> dict[str, tuple[int, int]]:
    """Raise `PlanError` unless the arguments of `from_masks` are of their types; return lengths."""
    numbers: dict[str, Any] = {
        "error": PlanError,
        "remedy": "give a tuple, such as grid=(21, 45, 80)",
    }
    require(
        isinstance(masks, Mapping) and all(isinstance(name, str) for name in masks),
        "masks",
        masks,
        "a mapping from names of sites to masks",
        error=PlanError,
    )
    assert isinstance(masks, Mapping)
    for name, mask in masks.items():
        require(
            isinstance(mask, Tensor),
            f"mask of site {name}",
            mask,
            "torch.Tensor of torch.bool (steps, heads, query_blocks, key_blocks)",
            error=PlanError,
            remedy="torch.from_numpy makes a tensor of a numpy array",
        )
    require(is_integers(grid, 3), "grid", grid, "three integers", **numbers)
    require(is_integers(block, 2), "block", block, "two integers", **numbers)
    given = {} if lengths is None else lengths
    fits = isinstance(given, Mapping) and all(is_integers(pair, 2) for pair in given.values())
    require(fits, "lengths", lengths, "for each site two integers", error=PlanError)
    assert isinstance(given, Mapping)
    return dict(given)
