"""A kernel of zones at one step: what a call site holds."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from torch import Tensor

from calibatt_compiler.kernels.common.padding import KeyPadding

if TYPE_CHECKING:
    from calibatt_compiler.plan.zones import ZonePattern


class ZoneKernel(Protocol):
    """Block-sparse attention by zones, at whatever step is asked for.

    Attributes:
        kind: see `AttentionKernel`.
        reason: see `AttentionKernel`.
        pattern: the zones.
        density: expected density over steps.
        table_bytes: see `AttentionKernel`.
    """

    @property
    def pattern(self) -> ZonePattern:
        """The zones."""

    @property
    def density(self) -> float:
        """Expected density over steps."""

    @property
    def kind(self) -> str:
        """What serves."""

    @property
    def reason(self) -> str | None:
        """Why another kernel than the one asked for serves."""

    @property
    def table_bytes(self) -> int:
        """Bytes of tables on the operands' device."""

    @property
    def repairs(self) -> int:
        """Calls computed again because a fixed softmax shift overflowed."""

    def at(self, step: int) -> ZoneStep:
        """Return the kernel at a step; it holds this one, and nothing else is made for it."""

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
        """Return the attention output at a step; operands as for `AttentionKernel`."""


@dataclass(frozen=True)
class ZoneStep:
    """An `AttentionKernel`: a kernel of zones with its step bound. Nothing is made for it.

    Attributes:
        kernel: of the site and step group.
        step: the diffusion step.
    """

    kernel: ZoneKernel
    step: int

    @property
    def kind(self) -> str:
        """What serves."""
        return self.kernel.kind

    @property
    def reason(self) -> str | None:
        """Why another kernel than the one asked for serves."""
        return self.kernel.reason

    @property
    def table_bytes(self) -> int:
        """Bytes of the tables, which all steps share."""
        return self.kernel.table_bytes

    @property
    def repairs(self) -> int:
        """Calls of all steps that were computed again; waits for the device."""
        return self.kernel.repairs

    @property
    def density(self) -> float:
        """Blocks kept at this step / all blocks."""
        return self.kernel.pattern.density_at(self.step)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        padding: KeyPadding | None = None,
    ) -> Tensor:
        """Return the attention output; see `AttentionKernel`."""
        return self.kernel(q, k, v, step=self.step, scale=scale, padding=padding)


class GpuZones:
    """What the GPU kernels of zones have in common: two sources of runs, recomputed calls, steps.

    Attributes:
        family: begins the names of their kinds.
        literals: generated function that gives a row's runs; None: the tables do.
    """

    family: ClassVar[str]
    literals: Any
    _repairs: Tensor

    @property
    def kind(self) -> str:
        """What serves."""
        return f"{self.family}-zones" + ("" if self.literals is None else "-baked")

    def with_literals(self, literals: Any) -> Self:
        """Return the same with literals; it shares the tables and counts the same calls."""
        found = copy(self)
        found.literals = literals
        return found

    @property
    def repairs(self) -> int:
        """Calls whose fixed softmax shift failed, and that were computed again.

        Reading it waits for the device.
        """
        return int(self._repairs.item())

    def at(self: ZoneKernel, step: int) -> ZoneStep:
        """The kernel at a step, as call sites hold kernels."""
        return ZoneStep(self, step)
