"""What passes hand to one another: a graph and what is known of it so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch.fx import GraphModule, Node

from calibatt_compiler.capture import SiteInfo
from calibatt_compiler.dynamo import FrameInputs
from calibatt_compiler.passes.graph import sdpa_operands
from calibatt_compiler.runtime.serving import Site


@dataclass(frozen=True)
class SdpaCall:
    """One `scaled_dot_product_attention` node.

    Attributes:
        node: the node.
        gm: the graph module that holds it.
        path: calls of higher-order operators that lead from the outer graph to `gm`.
        info: name, sizes, and why it can't be sparse, if so.
    """

    node: Node
    gm: GraphModule
    path: tuple[Node, ...]
    info: SiteInfo

    @property
    def operands(self) -> Mapping[str, object]:
        """Arguments of the node as they are now: an operand may itself have been replaced."""
        return sdpa_operands(self.node)

    @property
    def scale(self) -> float:
        """Factor of the scores; the default is 1 / sqrt(head_dim)."""
        scale = self.operands.get("scale")
        return float(scale) if isinstance(scale, (int, float)) else self.info.head_dim**-0.5


@dataclass(frozen=True)
class Skip:
    """A site that stays stock attention, and why.

    Attributes:
        reason: in the words of the summary.
        mismatch: the plan was meant for this site but does not fit the call.
    """

    reason: str
    mismatch: bool = False


@dataclass(frozen=True)
class Lowered:
    """A site that is served by our operator.

    Attributes:
        site: what serves it.
    """

    site: Site


class Binder(Protocol):
    """Decides what serves the sites of a graph."""

    def bind(self, call: SdpaCall) -> Site | Skip:
        """Return what serves a call, or why it stays dense."""


@dataclass(frozen=True)
class Rewrite:
    """State between passes.

    Attributes:
        gm: the outer graph, rewritten in place.
        inputs: arguments of the captured call.
        binder: decides what serves a site.
        calls: all attention calls, in order of execution.
        timestep: the host timestep, once resolved.
        decisions: for each call, what became of it.
    """

    gm: GraphModule
    inputs: FrameInputs
    binder: Binder
    calls: tuple[SdpaCall, ...] = ()
    timestep: Node | None = None
    decisions: tuple[Lowered | Skip, ...] = field(default=())

    def entries(self) -> dict[str, Site | str]:
        """Return, by name of the call, what serves it, or why nothing of ours does."""
        return {
            call.info.name: decision.reason if isinstance(decision, Skip) else decision.site
            for call, decision in zip(self.calls, self.decisions, strict=True)
        }
