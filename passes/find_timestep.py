"""Brings the timestep to the host, once a forward pass, where every site can read it."""

from __future__ import annotations

from dataclasses import replace

import torch

from calibatt_compiler.passes.graph import example
from calibatt_compiler.passes.rewrite import Rewrite

NAMES = ("timestep", "timesteps", "t", "sigma")
"""What transformers call the argument, most usual first."""


def find_timestep(rewrite: Rewrite) -> Rewrite:
    """Insert `calibatt::host_timestep` behind the inputs; leave a graph without timestep alone."""
    source = next(
        (node for name in NAMES if (node := rewrite.inputs.placeholders.get(name)) is not None),
        None,
    )
    if source is None or example(source) is None or not rewrite.calls:
        return rewrite
    graph = rewrite.gm.graph
    names = rewrite.inputs.coordinates()
    placing = [rewrite.inputs.placeholders[name] for name in names]
    last = list(graph.find_nodes(op="placeholder"))[-1]
    with graph.inserting_after(last):
        host = graph.call_function(torch.ops.calibatt.host_timestep.default, (source,))
        if placing:
            host.target = torch.ops.calibatt.host_timestep_of.default
            host.args = (source, placing, ",".join(names))
    host.meta["example_value"] = torch.ops.calibatt.host_timestep.default(example(source))
    return replace(rewrite, timestep=host)
