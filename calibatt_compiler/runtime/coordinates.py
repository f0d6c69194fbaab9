"""Compares, once a forward pass and on the device, where tokens stand with where the plan's do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from calibatt_compiler.plan import Plan
from calibatt_compiler.plan.coordinates import (
    OF_TEXT,
    OF_VIDEO,
    by_axis,
    digests,
    grid_digest,
)
from calibatt_compiler.plan.text import TextPosition


class CoordinatesReader(Protocol):
    """What a graph shows the coordinates of its tokens to."""

    def read(self, name: str, coordinates: Tensor) -> Tensor | None:
        """Look at an argument.

        Args:
            name: of the argument, one of `plan.coordinates`.
            coordinates: the argument.

        Returns:
            A boolean scalar on its device, whether they are the plan's; None: they don't matter.
        """


class PlanCoordinates:
    """Compares coordinates with those that a plan was made for; does not wait for the device."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def read(self, name: str, coordinates: Tensor) -> Tensor | None:
        """See `CoordinatesReader`."""
        plan = self._plan
        placed = video_part(name, coordinates, math.prod(plan.grid), plan.text_position)
        if placed is None:
            return None
        expected = self._expected(name, placed.shape[1])
        if not expected:
            return None
        found = digests(placed)
        fits = [(found == _signed(digest)).all() for digest in expected]
        return torch.stack(fits).any()

    def _expected(self, name: str, axes: int) -> tuple[str, ...]:
        """Return the digests of tokens that lie as the plan's; none if nothing is known of them."""
        plan, record = self._plan, self._plan.metadata.fixed_by
        recorded = None if record is None else record.coordinates.get(name)
        if recorded is not None:
            return (recorded,)
        unknown = sorted(plan.grid)[:2] == [1, 1] if record is None else record.grid == "length"
        if name in OF_TEXT or unknown:
            return ()
        return grid_digest(plan.grid, axes), grid_digest(plan.grid, axes, last=False)


class RecordingCoordinates:
    """Hands coordinates to a recorder."""

    def __init__(self, record: Callable[[str, Tensor], None]) -> None:
        self._record = record

    def read(self, name: str, coordinates: Tensor) -> Tensor | None:
        """See `CoordinatesReader`; nothing is compared."""
        self._record(name, coordinates)
        return None


def video_part(
    name: str, coordinates: Tensor, video: int, text: TextPosition | None
) -> Tensor | None:
    """Return coordinates (samples, axes, tokens), without text whose blocks are all kept.

    Args:
        name: of the argument.
        coordinates: the argument.
        video: tokens of the video.
        text: where such text stands; None: there is none.

    Returns:
        None if the shape is not one of coordinates, or if they are of such text alone.
    """
    placed = by_axis(name, coordinates)
    if placed is None or (text is not None and name in OF_TEXT):
        return None
    if text is None or name not in OF_VIDEO or placed.shape[-1] <= video:
        return placed
    return placed[..., -video:] if text == "first" else placed[..., :video]


def _signed(digest: str) -> int:
    value = int(digest, 16)
    return value - 2**64 if value >= 2**63 else value
