"""The list of passes, in the order in which they run, and what runs them."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch.fx import GraphModule

import calibatt_compiler.runtime.ops  # noqa: F401  (registers the operators that passes insert)
from calibatt_compiler.debug import dump_graph
from calibatt_compiler.logs import logger
from calibatt_compiler.model.dynamo import FrameInputs
from calibatt_compiler.passes.bind_sites import bind_sites
from calibatt_compiler.passes.find_sites import find_sites
from calibatt_compiler.passes.find_timestep import find_timestep
from calibatt_compiler.passes.lower_attention import lower_attention
from calibatt_compiler.passes.rewrite import Binder, Rewrite
from calibatt_compiler.passes.token_order.permute import permute_tokens

log = logger("passes")
Pass = Callable[[Rewrite], Rewrite]

PASSES: tuple[Pass, ...] = (
    find_sites,  # names first: all that follows speaks of sites
    find_timestep,  # before binding: a site that can't know its step stays dense
    bind_sites,  # all decisions at once, so that a mismatch leaves the graph untouched
    permute_tokens,  # needs to know the sites; reads attention nodes as the model has them
    lower_attention,  # last: the only pass that replaces nodes, and it ends with clean-up
)


def run_passes(gm: GraphModule, inputs: FrameInputs, binder: Binder) -> Rewrite:
    """Run all passes over a Dynamo graph, in place."""
    dump_graph(gm, "captured")
    rewrite = Rewrite(gm, inputs, binder)
    for each in PASSES:
        began = time.perf_counter()
        rewrite = each(rewrite)
        spent = 1e3 * (time.perf_counter() - began)
        log.debug("%s: %.1f ms; %s", each.__name__, spent, rewrite.in_words())
        dump_graph(gm, each.__name__)
    return rewrite
