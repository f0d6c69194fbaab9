"""What passes hand to one another: a graph and what is known of it so far."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch.fx import GraphModule, Node

from calibatt_compiler.capture import Site, SiteInfo
from calibatt_compiler.model.dynamo import FrameInputs
from calibatt_compiler.passes.graph import example, sdpa_operands
from calibatt_compiler.plan.order import TokenOrder


@dataclass(frozen=True)
class SdpaCall:
    """One `scaled_dot_product_attention` node.

    Attributes:
        node: the node.
        gm: the graph module that holds it.
        path: calls of higher-order operators that lead from the outer graph to `gm`.
        info: name, sizes, and why it can't be sparse, if so.
        key: what the site is called in the graph: its name; in a part of a model without the path
            of the part, so that it is the same in all parts alike.
        repeats: how many calls of the graph lie in the same module.
    """

    node: Node
    gm: GraphModule
    path: tuple[Node, ...]
    info: SiteInfo
    key: str = ""
    repeats: int = 1

    @property
    def operands(self) -> Mapping[str, object]:
        """Arguments of the node as they are now: an operand may itself have been replaced."""
        return sdpa_operands(self.node)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that the call computes in: under autocast another one than its operands have."""
        value = example(self.node)
        assert value is not None, "it is known of what is served"
        return value.dtype

    @property
    def scale(self) -> float:
        """Factor of the scores; the default is 1 / sqrt(head_dim)."""
        scale = self.operands.get("scale")
        return float(scale) if isinstance(scale, (int, float)) else self.info.head_dim**-0.5


def site_key(name: str, place: str) -> str:
    """Return what a site is called in the graph of a part of its model.

    It begins with a dot: so the name is that of the part with it behind, but for the part itself.
    """
    if not place:
        return name
    inner = name.removeprefix(place)
    return inner if inner.startswith(".") else f".{inner}"


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


@dataclass(frozen=True)
class Layout:
    """The order of tokens that a plan's blocks are cut from, where it is not the model's.

    Attributes:
        order: of the grid's tokens.
        grid: tokens (frames, height, width).
        text_first: whether text of joint attention stands before the video.
    """

    order: TokenOrder
    grid: tuple[int, int, int]
    text_first: bool

    @property
    def video(self) -> int:
        """Tokens of the video."""
        return math.prod(self.grid)


@dataclass(frozen=True)
class Permuted:
    """Tokens that are brought into the plan's order once a forward pass.

    Attributes:
        entries: values permuted on the way in: the video, rotary tables.
        exits: values permuted back.
    """

    entries: int
    exits: int


class Binder(Protocol):
    """Decides what serves the sites of a graph.

    Attributes:
        layout: of tokens in the patterns that serve; None: the model's own.
    """

    @property
    def layout(self) -> Layout | None:
        """Layout of tokens in the patterns that serve."""

    def bind(self, call: SdpaCall) -> Site | Skip:
        """Return what serves a call, or why it stays dense."""

    def settled(self, info: SiteInfo) -> SiteInfo:
        """Return a call that is served with concrete sizes."""


@dataclass(frozen=True)
class Rewrite:
    """TokenState between passes.

    Attributes:
        gm: the outer graph, rewritten in place.
        inputs: arguments of the captured call.
        binder: decides what serves a site.
        calls: all attention calls, in order of execution.
        timestep: the host timestep, once resolved.
        decisions: for each call, what became of it.
        order: what became of the plan's token order: permuted once, or why around each site; None
            where there is nothing to permute.
    """

    gm: GraphModule
    inputs: FrameInputs
    binder: Binder
    calls: tuple[SdpaCall, ...] = ()
    timestep: Node | None = None
    decisions: tuple[Lowered | Skip, ...] = field(default=())
    order: Permuted | Skip | None = None

    def order_in_words(self) -> str | None:
        """Return what became of the plan's token order; None where there is nothing to permute."""
        if self.order is None or self.binder.layout is None:
            return None
        name = f"token order {self.binder.layout.order}"
        if isinstance(self.order, Permuted):
            return f"{name}: permuted once a forward pass"
        return f"{name}: permuted around each site, as {self.order.reason}"

    def in_words(self) -> str:
        """Return what is known so far, with counts, for the log."""
        bound = sum(isinstance(decision, Lowered) for decision in self.decisions)
        reasons = Counter(d.reason for d in self.decisions if isinstance(d, Skip))
        words = [f"{len(self.calls)} attention calls"]
        words += [f"{bound} bound"] if self.decisions else []
        words += [f"{count} skipped: {reason}" for reason, count in reasons.items()]
        words += ["no timestep" if self.timestep is None else f"timestep {self.timestep.name}"]
        return ", ".join(words + ([order] if (order := self.order_in_words()) else []))

    def entries(self) -> dict[str, Site | str]:
        """Return, by key of the call, what serves it, or why nothing of ours does."""
        return {
            call.key: decision.reason if isinstance(decision, Skip) else decision.site
            for call, decision in zip(self.calls, self.decisions, strict=True)
        }
