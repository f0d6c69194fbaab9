"""A plan's sites from octave maps of the user's own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from calibatt_compiler.errors import PlanError
from calibatt_compiler.plan.schema import TEXT_POSITIONS, TextPolicy
from calibatt_compiler.plan.site import SitePatterns
from calibatt_compiler.plan.zones import ZonePattern
from calibatt_compiler.plan.zones.drawing import seed_of


def sites_of_octaves(
    octaves: Mapping[str, Tensor],
    grid: tuple[int, int, int],
    steps: int,
    block: tuple[int, int],
    groups: Sequence[int] | None,
    lengths: Mapping[str, tuple[int, int]],
    text: TextPolicy,
) -> dict[str, SitePatterns]:
    """Make the sites of `Plan.from_zones`, whose arguments these are.

    Raises:
        PlanError: shapes, octaves, groups or lengths that don't fit.
    """
    if unknown := set(lengths) - set(octaves):
        raise PlanError(
            "lengths name sites that have no octave map",
            expected=sorted(octaves),
            got=sorted(unknown),
            remedy="give both or neither",
        )
    tokens, sites = math.prod(grid), {}
    for index, (name, maps) in enumerate(octaves.items()):
        if maps.dim() != 4 or not 0 < len(maps) <= steps:
            raise PlanError(
                f"the octave maps of site {name!r} have the wrong form",
                expected=f"integers (step groups, 1 to {steps}, heads, query_blocks, key_blocks)",
                got=f"{maps.dtype} {tuple(maps.shape)}",
                remedy="give one map a group of steps",
            )
        queries, keys = lengths.get(name, (tokens, tokens))
        position = TEXT_POSITIONS.get(text) if max(queries, keys) > tokens else None
        of_step = [step * len(maps) // steps for step in range(steps)] if groups is None else groups
        try:
            zones = [
                ZonePattern.from_octaves(
                    some,
                    query_length=queries,
                    key_length=keys,
                    block=block,
                    video=0 if position is None else tokens,
                    text=position,
                    seed=seed_of(index),
                )
                for some in maps
            ]
            sites[name] = SitePatterns.of_zones(zones, of_step)
        except PlanError as error:
            raise PlanError(
                f"site {name!r}: {error.problem}",
                expected=error.expected,
                got=error.got,
                remedy=error.remedy,
            ) from error
    return sites
