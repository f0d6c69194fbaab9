"""How long tables live: as long as whoever calls the graph, not as long as the model."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

import calibatt_compiler
from calibatt_compiler.plan import Plan
from calibatt_compiler.plan.order import TokenOrder
from calibatt_compiler.report import summary as reports
from calibatt_compiler.runtime.graph import CompiledGraph
from calibatt_compiler.runtime.site import SparseSite


def other_plan(plan: Plan) -> Plan:
    """The same sites with the patterns of the steps turned around."""
    return plan.with_sites(
        {name: replace(site, steps=site.steps[::-1]) for name, site in plan.sites.items()},
        thresholds={},
        quality={},
    )


def compiled(case: Any, plan: Plan) -> Any:
    options = {"plan": plan, "lowering": "table"}
    return torch.compile(case.model, backend="calibatt", options=options, isolate_recompiles=True)


def graphs(model: torch.nn.Module) -> list[CompiledGraph]:
    return [report._graph() for report in reports._reports[model]]  # type: ignore[misc]


def sites(graph: CompiledGraph) -> list[SparseSite]:
    return [site for site in graph.entries.values() if isinstance(site, SparseSite)]


def tables(graph: CompiledGraph) -> int:
    """Bytes of tables that the kernels of a graph take."""
    return sum(
        kernel.table_bytes for site in sites(graph) for kernel in site._kernels.held(site._name)
    )


def test_compiling_again_with_another_plan_frees_the_tables_of_the_first(wan):
    first = compiled(wan, wan.plan)
    expected = first(**wan.arguments(900.0))[0]
    (graph,) = graphs(wan.model)
    assert tables(graph) > 0
    (kernel,) = sites(graph)[0]._kernels.held(wan.sites[0])
    gone = weakref.ref(kernel)
    del kernel
    second = compiled(wan, other_plan(wan.plan))
    second(**wan.arguments(900.0))
    assert gone() is None
    assert tables(graph) == 0
    assert tables(graphs(wan.model)[1]) > 0
    # Called after all, it serves as before; its counters go on.
    assert torch.equal(first(**wan.arguments(900.0))[0], expected)
    assert calibatt_compiler.summary(first).sparse_calls == 2 * len(wan.sites)
    assert tables(graph) > 0


@pytest.mark.slow
def test_another_size_of_video_leaves_the_tables_of_the_first(wan):
    """It is compiled by the same call: both are served in turn."""
    run = compiled(wan, wan.plan)
    run(**wan.arguments(900.0))
    (graph,) = graphs(wan.model)
    before = tables(graph)
    larger = {**wan.arguments(900.0), "hidden_states": torch.randn(2, 4, 4, 14, 18)}
    run(**larger)
    assert len(graphs(wan.model)) == 2
    assert tables(graph) == before > 0


@pytest.mark.slow
@pytest.mark.parametrize("order", ["raster", "1x2x2"])
def test_a_graph_that_is_gone_leaves_its_counters_and_nothing_else(wan, order):
    plan = Plan.create(
        wan.plan.sites,
        grid=wan.plan.grid,
        sampler=wan.plan.metadata.sampler,
        token_order=TokenOrder.parse(order),
    )
    run = compiled(wan, plan)
    for timestep in (900.0, 500.0, 2000.0):
        run(**wan.arguments(timestep))
    before = calibatt_compiler.summary(run).to_dict()
    (graph,) = graphs(wan.model)
    left = [weakref.ref(graph)]
    for site in sites(graph):
        left += [weakref.ref(site), weakref.ref(site._kernels), weakref.ref(site._rearrangements)]
        left += [weakref.ref(kernel) for kernel in site._kernels.held(site._name)]
    del graph, site
    torch._dynamo.reset()
    gc.collect()
    assert [each() for each in left if each() is not None] == []
    assert calibatt_compiler.summary(run).to_dict() == before


@pytest.mark.slow
def test_what_kernels_have_counted_is_kept_when_their_graph_goes(wan, monkeypatch):
    run = compiled(wan, wan.plan)
    run(**wan.arguments(900.0))
    (graph,) = graphs(wan.model)
    for site in sites(graph):
        for kernel in site._kernels.held(site._name):
            kernel.repairs = 3  # type: ignore[misc]
    del graph, site, kernel
    assert [row.repairs for row in calibatt_compiler.summary(run).rows if row.kernel != "sdpa"] == [
        3,
        3,
    ]
    torch._dynamo.reset()
    gc.collect()
    assert [report._graph() for report in reports._reports[wan.model]] == [None]
    rows = calibatt_compiler.summary(run).rows
    assert [row.repairs for row in rows if row.kernel != "sdpa"] == [3, 3]
