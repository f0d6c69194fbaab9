"""Models with row-shared heads equal dense attention with its rows copied, family by family."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import calibatt_compiler
from calibatt_compiler.plan import AnchorRows, BlockPattern, Plan, SitePatterns
from calibatt_compiler.plan.order import TokenOrder
from calibatt_compiler.plan.text import text_blocks

FLAGS = ((False, True), (True, True), (False, False))
"""By step, which heads are row-shared at the first site; at the second the other way round."""


def repetitive(case: Any, order: TokenOrder, anchor_rows: int = 2, block: int = 16) -> Any:
    """The case with another plan: some heads row-shared, another token order, text dense."""
    old = case.plan
    length = old.sites[case.sites[0]].query_length
    text = length - np.prod(old.grid)
    shape = (2, -(-length // block), -(-length // block))
    generator = torch.Generator().manual_seed(3)
    sites = {}
    for number, name in enumerate(case.sites):
        patterns = []
        for flags in FLAGS:
            mask = torch.rand(shape, generator=generator) < 0.4
            mask |= torch.eye(shape[1], dtype=torch.bool)
            if text:
                with_text = text_blocks(length, length - text, block, "first")
                mask |= with_text | with_text[:, None]
            patterns.append(
                BlockPattern.from_mask(
                    mask,
                    query_length=length,
                    key_length=length,
                    block=(block, block),
                    repetitive=np.array(flags[:: -1 if number else 1]),
                    copies=AnchorRows(old.grid, anchor_rows, int(text), order),
                )
            )
        sites[name] = SitePatterns.share(patterns)
    plan = Plan.create(
        sites,
        grid=old.grid,
        sampler=old.metadata.sampler,
        token_order=order,
        text_policy="dense_first" if text else "none",
    )
    return replace(case, plan=plan)


def check(case: Any, lowering: str) -> None:
    options = {"plan": case.plan, "lowering": lowering}
    compiled = torch.compile(case.model, backend="calibatt", fullgraph=True, options=options)
    for timestep in case.plan.timesteps:
        expected = case.expanded(timestep)
        got = compiled(**case.arguments(timestep))[0]
        scale = expected.abs().max()
        assert (got - expected).abs().max() < 2e-5 * scale
        assert (case.dense(timestep) - expected).abs().max() > 1e-2 * scale
    assert served(compiled) == [(name, len(FLAGS), {}) for name in case.sites]


def test_the_summary_says_which_sites_copy(wan: Any) -> None:
    case = repetitive(wan, TokenOrder())
    compiled = torch.compile(case.model, backend="calibatt", options={"plan": case.plan})
    compiled(**case.arguments(900.0))
    summary = calibatt_compiler.summary(compiled)
    sparse = [row for row in summary.rows if row.status == "sparse"]
    assert [row.repetitive for row in sparse] == [1 / 2, 1 / 2]
    assert summary.to_dict()["sites"][0]["repetitive"] == 1 / 2
    out = io.StringIO()
    Console(file=out, width=80).print(summary)
    assert re.search(r"blocks\.0\.attn1 .* 50% +0\.", out.getvalue())
    assert "copy: heads that copy rows" in out.getvalue()


def served(compiled: Any) -> list[tuple[str, int, Any]]:
    """Sparse sites with their sparse and dense calls."""
    rows = calibatt_compiler.summary(compiled).rows
    return [(row.name, row.sparse_calls, row.dense_calls) for row in rows if row.status == "sparse"]


@pytest.mark.slow
@pytest.mark.parametrize("order", ["raster", "1x2x4"])
@pytest.mark.parametrize("lowering", ["reference", "table", "baked"])
def test_output_is_that_of_dense_attention_with_copied_rows(
    case: Any, lowering: str, order: str
) -> None:
    check(repetitive(case, TokenOrder.parse(order)), lowering)


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("order", ["raster", "1x2x4"])
def test_output_through_inductor(case: Any, order: str) -> None:
    check(repetitive(case, TokenOrder.parse(order)), "table")


def test_rows_are_copied_where_that_saves_no_block(wan: Any) -> None:
    """One block of queries: its copies are still those that the plan asks for."""
    case = repetitive(wan, TokenOrder(), block=192)
    assert case.plan.density() == 1
    options = {"plan": case.plan, "lowering": "table"}
    compiled = torch.compile(case.model, backend="calibatt", fullgraph=True, options=options)
    for timestep in case.plan.timesteps:
        got = compiled(**case.arguments(timestep))[0]
        assert torch.allclose(got, case.expanded(timestep), atol=1e-5)
    full = {"dense: the plan keeps every block": 1}
    assert served(compiled) == [(name, 2, full) for name in case.sites]
