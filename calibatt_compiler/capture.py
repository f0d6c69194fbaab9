"""What the backend learns of a model from its graph, and what then serves or watches its calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from calibatt_compiler.kernels.common.padding import KeyPadding
from calibatt_compiler.plan.schema import FixedBy, ModelIdentity


@dataclass(frozen=True)
class SiteInfo:
    """One attention call of a captured model.

    Attributes:
        name: module of the call, such as `blocks.3.attn1`; a second call of the same module
            ends in `:1`, a third in `:2`.
        heads: number of query heads.
        query_length: tokens on the query side.
        key_length: tokens on the key side.
        head_dim: channels a head.
        skip: why the site can't be sparse (`cross-attention`, `causal`, ...), or None.
        padded: it has a mask, which says something of the keys.
    """

    name: str
    heads: int
    query_length: int
    key_length: int
    head_dim: int
    skip: str | None = None
    padded: bool = False


@dataclass(frozen=True)
class CaptureInfo:
    """One captured graph.

    Attributes:
        model: identity of the module, if it could be seen.
        grid: latent tokens (frames, height, width), if they can be read.
        known: whether the model's family is known, and so the grid sure.
        fixed_by: what fixes the tokens of the call, but for coordinates.
        sites: all attention calls in the order of execution.
    """

    model: ModelIdentity | None
    grid: tuple[int, int, int] | None
    sites: tuple[SiteInfo, ...]
    known: bool = True
    fixed_by: FixedBy | None = None


class Recorder(Protocol):
    """What a model compiled in recording mode reports to."""

    def on_capture(self, capture: CaptureInfo) -> None:
        """Record a newly captured graph; called before its first run."""

    def on_call(self, capture: CaptureInfo) -> None:
        """Record the graph that is about to run."""
        return

    def on_coordinates(self, name: str, coordinates: Tensor) -> None:
        """Record where tokens stand, as an argument of the model says; once a run."""
        return

    def attend(
        self,
        site: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        timestep: float,
        scale: float,
        mask: KeyPadding | Tensor | None = None,
    ) -> Tensor:
        """Compute dense attention for a site and observe it.

        Args:
            site: name of the site; see `SiteInfo`.
            q: (batch, heads, query_length, head_dim), any strides.
            k: (batch, heads, key_length, head_dim), any strides.
            v: like `k`.
            timestep: what the model was given; NaN where samples of the batch differ.
            scale: factor of the scores.
            mask: what a mask says of the keys, or one that is no padding; not passed if there is
                none.

        Returns:
            (batch, heads, query_length, head_dim), laid out as (batch, query_length, heads,
            head_dim) contiguous.
        """


class Site(Protocol):
    """What serves one attention call of a compiled graph."""

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        timestep: float,
        scale: float,
        *,
        ordered: bool = False,
        mask: KeyPadding | Tensor | None = None,
    ) -> Tensor:
        """Attention over (batch, heads, length, head_dim) operands at a timestep.

        With `ordered`, operands and output are in the plan's token order instead of the model's,
        and so is the mask: what one says of the keys, or one that is no padding; not passed if
        there is none.
        """

    def gradients(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        timestep: float,
        scale: float,
        *,
        ordered: bool = False,
        mask: KeyPadding | Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v from that of what `attend` returns for the same.

        Each is laid out as (batch, length, heads, head_dim) contiguous.
        """
