"""Models of diffusers whose masks cut padded text: what is compiled equals plan and padding."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any
from unittest import mock

import masked_models
import pytest
import torch
from masked_models import FAMILIES, TEXT

import calibatt_compiler
from calibatt_compiler import Plan
from calibatt_compiler.calibration import CalibrationConfig
from calibatt_compiler.plan import BlockPattern, Sampler, SitePatterns
from calibatt_compiler.plan.order import RASTER, TokenOrder
from calibatt_compiler.plan.text import text_blocks

STOCK = torch.nn.functional.scaled_dot_product_attention
BLOCK = (16, 16)


def lively(model: torch.nn.Module) -> torch.nn.Module:
    """Default initialisation leaves outputs near zero: a wrong mask would hardly show."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.5 / parameter[0].numel() ** 0.5, generator=generator)
    return model.eval().requires_grad_(False)


def plan_of(name: str, order: TokenOrder = RASTER) -> Plan:
    family = FAMILIES[name]
    video = math.prod(family.grid)
    length = video + TEXT
    position: Any = family.text
    text = text_blocks(length, video, BLOCK[0], position)
    assert text is not None
    generator = torch.Generator().manual_seed(7)
    sites = {}
    for site in family.sites:
        mask = torch.rand(2, len(text), len(text), generator=generator) < 0.3
        mask |= torch.eye(len(text), dtype=torch.bool) | text | text[:, None]
        pattern = BlockPattern.from_mask(mask, query_length=length, key_length=length, block=BLOCK)
        sites[site] = SitePatterns.share([pattern])
    policy: Any = f"dense_{position}"
    sampler = Sampler(timesteps=(900.0,))
    return Plan.create(
        sites, grid=family.grid, sampler=sampler, text_policy=policy, token_order=order
    )


def arguments(name: str, lengths: Any) -> dict[str, Any]:
    timestep = torch.full((len(lengths),), 900.0)
    return {**FAMILIES[name].inputs(lengths), "timestep": timestep, "return_dict": False}


def expanded(model: torch.nn.Module, name: str, plan: Plan, given: dict[str, Any]) -> torch.Tensor:
    """The model run eagerly: pairs of tokens that both the plan and the model's mask keep."""
    family = FAMILIES[name]
    names = iter(family.sites)
    length = math.prod(family.grid) + TEXT
    first = TEXT if family.text == "first" else 0
    found = plan.token_order.tokens(family.grid, length=length, first=first)
    places = torch.arange(length) if found is None else torch.from_numpy(found).argsort()

    def masked(query: Any, key: Any, value: Any, attn_mask: Any = None, **options: Any) -> Any:
        if query.shape[2] == length and (site := next(names, None)):
            pairs = plan.sites[site].at(0).token_mask()[None, :, places][..., places]
            attn_mask = pairs if attn_mask is None else pairs & attn_mask
            return STOCK(query, key, value, attn_mask=attn_mask, **options).nan_to_num(0.0)
        return STOCK(query, key, value, attn_mask=attn_mask, **options)

    with mock.patch("torch.nn.functional.scaled_dot_product_attention", masked):
        out = model(**given)[0]
    assert next(names, None) is None, "the oracle missed a site"
    return out


def check(name: str, plan: Plan, lowering: str, *lengths: Any) -> Any:
    model = lively(FAMILIES[name].make())
    options = {"plan": plan, "lowering": lowering}
    whole = FAMILIES[name].whole
    compiled = torch.compile(model, backend="calibatt", fullgraph=whole, options=options)
    for each in lengths:
        given = arguments(name, each)
        want, dense = expanded(model, name, plan, given), model(**given)[0]
        got = compiled(**given)[0]
        assert (got - want).abs().max() < 5e-5 * want.abs().max()
        assert (dense - want).abs().max() > 1e-3 * want.abs().max(), "the plan must matter"
    summary = calibatt_compiler.summary(compiled)
    sparse = {row.name: row for row in summary.rows if row.status == "sparse"}
    assert tuple(sparse) == FAMILIES[name].sites
    assert all(row.sparse_calls == len(lengths) for row in sparse.values())
    assert not any(row.dense_calls for row in sparse.values())
    return summary


@pytest.mark.parametrize("name", FAMILIES)
def test_padded_text_is_cut_as_the_model_does(name):
    check(name, plan_of(name), "table", (5, TEXT), (1, 13))


@pytest.mark.slow
@pytest.mark.inductor
def test_through_inductor():
    check("hunyuan_video", plan_of("hunyuan_video"), "baked", (5, 16), (1, TEXT))


def test_in_the_order_of_the_plan():
    check("chroma", plan_of("chroma", TokenOrder.parse("1x4x4")), "table", (5, TEXT))


def test_gradients_are_those_of_plan_and_padding():
    name = "hunyuan_video"
    model, plan = lively(masked_models.hunyuan()), plan_of(name)
    compiled = torch.compile(
        model, backend="calibatt", fullgraph=True, options={"plan": plan, "lowering": "table"}
    )

    def oracle(**given: Any) -> Any:
        return [expanded(model, name, plan, given)]

    found = []
    for run in (compiled, oracle):
        given = arguments(name, (5, 16))
        given["hidden_states"].requires_grad_()
        (gradient,) = torch.autograd.grad(run(**given)[0].square().sum(), given["hidden_states"])
        found.append(gradient)
    assert (found[0] - found[1]).abs().max() < 1e-4 * found[1].abs().max()


@pytest.mark.parametrize("name", ["hunyuan_video", "chroma"])
def test_calibrated_with_padded_text(name, tmp_path):
    """Padded keys have no say: what stands there changes no mask, and the plan serves the model."""
    family = FAMILIES[name]
    model = lively(family.make())
    text: Any = family.text
    config = CalibrationConfig(block=BLOCK, A=0.5, C=0.5, num_steps=1, text=text, grid=family.grid)
    plans = []
    for noise in (0.0, 5.0):
        torch._dynamo.reset()
        folder = tmp_path / str(noise)
        with calibatt_compiler.calibration(model, replace(config, run_folder=folder)) as run:
            for count in (5, 16):
                given = arguments(name, (count,))
                given["encoder_hidden_states"][:, count:] += noise
                with run.input(), torch.no_grad():
                    model(**given)
            plans.append(run.plan())
    assert tuple(plans[0].sites) == family.sites
    assert 0 < plans[0].density() < 1
    for site in family.sites:
        assert torch.equal(*(plan.block_mask(site, 0) for plan in plans))
    check(name, plans[0], "table", (5, TEXT))
