"""A HunyuanVideo with padded text on a GPU, through Inductor: plan and padding are honoured."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any
from unittest import mock

import masked_models
import pytest
import torch

import calibatt_compiler
from calibatt_compiler import Plan
from calibatt_compiler.plan import BlockPattern, Sampler, SitePatterns
from calibatt_compiler.plan.text import text_blocks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STOCK = torch.nn.functional.scaled_dot_product_attention
GRID = (6, 16, 20)
LENGTH = math.prod(GRID) + masked_models.TEXT
DEVICE = "cuda"


def plan_of() -> Plan:
    text = text_blocks(LENGTH, math.prod(GRID), 128, "last")
    assert text is not None
    generator = torch.Generator().manual_seed(7)
    sites = {}
    for site in masked_models.JOINT:
        mask = torch.rand(2, len(text), len(text), generator=generator) < 0.3
        mask |= torch.eye(len(text), dtype=torch.bool) | text | text[:, None]
        pattern = BlockPattern.from_mask(mask, query_length=LENGTH, key_length=LENGTH)
        sites[site] = SitePatterns.share([pattern])
    sampler = Sampler(timesteps=(900.0,))
    return Plan.create(sites, grid=GRID, sampler=sampler, text_policy="dense_last")


def arguments(lengths: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    given = masked_models.hunyuan_inputs(lengths)
    given |= {"hidden_states": masked_models.draw(len(lengths), 4, *GRID)}
    given |= {"timestep": torch.full((len(lengths),), 900.0)}
    moved = {
        name: x.bfloat16().to(DEVICE, dtype) if x.is_floating_point() else x.to(DEVICE)
        for name, x in given.items()
    }
    return {**moved, "return_dict": False}


def expanded(model: torch.nn.Module, plan: Plan, given: dict[str, Any]) -> torch.Tensor:
    names = iter(masked_models.JOINT)

    def masked(query: Any, key: Any, value: Any, attn_mask: Any = None, **options: Any) -> Any:
        if query.shape[2] == LENGTH:
            pairs = plan.sites[next(names)].at(0).token_mask().to(DEVICE)[None]
            attn_mask = pairs & attn_mask
        return STOCK(query, key, value, attn_mask=attn_mask, **options)

    with mock.patch("torch.nn.functional.scaled_dot_product_attention", masked):
        return model(**given)[0].float()


@pytest.mark.inductor
@torch.no_grad()
def test_padded_text_is_cut_on_a_gpu() -> None:
    torch.manual_seed(0)
    exact = masked_models.hunyuan(attention_head_dim=128, rope_axes_dim=(16, 56, 56))
    for parameter in exact.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    model = exact.eval().to(DEVICE, torch.bfloat16)
    exact = deepcopy(model).float()
    plan = plan_of()
    compiled = torch.compile(model, backend="calibatt", fullgraph=True, options={"plan": plan})
    for lengths in ((5, masked_models.TEXT), (1, 13)):
        given = arguments(lengths, torch.bfloat16)
        want = expanded(exact, plan, arguments(lengths, torch.float32))
        eager = expanded(model, plan, given)
        got = compiled(**given)[0].float()
        assert (got - want).norm() < 1.5 * (eager - want).norm()
        assert (model(**given)[0] - want).norm() > 3 * (eager - want).norm(), "the plan must matter"
    summary = calibatt_compiler.summary(compiled)
    sparse = {row.name: row for row in summary.rows if row.status == "sparse"}
    assert tuple(sparse) == masked_models.JOINT
    assert all(row.sparse_calls == 2 for row in sparse.values())
    if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
        assert {row.kernel for row in sparse.values()} == {"hopper-table"}
