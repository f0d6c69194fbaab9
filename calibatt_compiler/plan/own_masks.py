"""A plan's sites from boolean masks of the user's own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from calibatt_compiler.arguments import is_integers, require
from calibatt_compiler.errors import PlanError
from calibatt_compiler.plan.pattern import BlockPattern
from calibatt_compiler.plan.site import SitePatterns


def sites_of_masks(
    masks: Mapping[str, Tensor],
    grid: tuple[int, int, int],
    steps: int,
    block: tuple[int, int],
    lengths: Mapping[str, tuple[int, int]],
) -> dict[str, SitePatterns]:
    """Make the sites of `Plan.from_masks`, whose arguments these are, checked by `check_masks`.

    Raises:
        PlanError: shapes, dtypes or lengths that don't fit, or a query block that keeps none.
    """
    if unknown := set(lengths) - set(masks):
        raise PlanError(
            "lengths name sites that have no mask",
            expected=sorted(masks),
            got=sorted(unknown),
            remedy="give both or neither",
        )
    tokens, sites = math.prod(grid), {}
    for name, mask in masks.items():
        if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[0] != steps:
            raise PlanError(
                f"the mask of site {name!r} has the wrong form",
                expected=f"bool (steps = {steps}, heads, query_blocks, key_blocks)",
                got=f"{mask.dtype} {tuple(mask.shape)}",
                remedy="give one mask a timestep, in the order of `timesteps`",
            )
        queries, keys = lengths.get(name, (tokens, tokens))
        try:
            by_step = [
                BlockPattern.from_mask(step, query_length=queries, key_length=keys, block=block)
                for step in mask
            ]
        except PlanError as error:
            raise PlanError(
                f"site {name!r}: {error.problem}",
                expected=error.expected,
                got=error.got,
                remedy=f"{error.remedy}; a sequence that is not just the grid's {tokens} tokens "
                f"needs lengths={{{name!r}: (queries, keys)}}",
            ) from error
        sites[name] = SitePatterns.share(by_step)
    return sites


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
