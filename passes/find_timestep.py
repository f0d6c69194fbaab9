"""Brings the timestep to the host, once a forward pass, where every site can read it."""

from __future__ import annotations

from dataclasses import replace

import torch

from calibatt_compiler.passes.graph import example
from calibatt_compiler.passes.rewrite import Rewrite


def find_timestep(rewrite: Rewrite) -> Rewrite:
    """Insert `calibatt::host_timestep` behind the inputs; leave a graph without timestep alone.

    A part of a model takes it from the model's call: what is named so there may be anything.
    """
    if not rewrite.calls:
        return rewrite
    source = rewrite.inputs.timestep()
    if source is None:
        return _from_call(rewrite)
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


def _from_call(rewrite: Rewrite) -> Rewrite:
    placeholders = list(rewrite.gm.graph.find_nodes(op="placeholder"))
    tensors = [node for node in placeholders if example(node) is not None]
    if not rewrite.inputs.of_call or not tensors:
        return rewrite
    with rewrite.gm.graph.inserting_after(placeholders[-1]):
        host = rewrite.gm.graph.call_function(
            torch.ops.calibatt.passed_timestep.default, (tensors[-1],)
        )
    value = example(tensors[-1])
    host.meta["example_value"] = torch.ops.calibatt.passed_timestep.default(value)
    return replace(rewrite, timestep=host)
