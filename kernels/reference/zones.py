"""Attention by octave zones by definition: what a step draws, attended by the reference."""

from __future__ import annotations

from torch import Tensor

from calibatt_compiler.kernels.common.padding import KeyPadding
from calibatt_compiler.kernels.common.zone_step import ZoneStep
from calibatt_compiler.kernels.reference.attention import ReferenceAttention
from calibatt_compiler.plan.zones import ZonePattern


class ReferenceZones:
    """Block-sparse attention by zones; see `ZoneKernel` and `ReferenceAttention`.

    Attributes:
        kind: "reference".
        pattern: the zones.
        density: expected density over steps.
    """

    kind = "reference"
    reason: str | None = None
    table_bytes = 0
    repairs = 0

    def __init__(self, zones: ZonePattern) -> None:
        self.pattern = zones
        self.density = zones.density

    def at(self, step: int) -> ZoneStep:
        """The kernel at a step, as call sites hold kernels."""
        return ZoneStep(self, step)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        step: int,
        scale: float | None = None,
        padding: KeyPadding | None = None,
    ) -> Tensor:
        """Return the attention output at a step, which is drawn now."""
        drawn = ReferenceAttention(self.pattern.draw(step))
        return drawn(q, k, v, scale=scale, padding=padding)
