"""Tiny random transformers of three families, and what they must compute under a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import tiny_models
import torch
from copied_rows import copy_rows

from calibatt_compiler.plan import BlockPattern, Plan

BLOCK = (32, 32)
TIMESTEPS = (900.0, 500.0, 100.0)
STOCK = torch.nn.functional.scaled_dot_product_attention


@dataclass(frozen=True)
class Case:
    """A model, how to call it, and the masks that make its plan."""

    model: torch.nn.Module
    plan: Plan
    inputs: Mapping[str, Any]
    sites: tuple[str, ...]

    def arguments(self, timestep: float) -> dict[str, Any]:
        batch = self.inputs["hidden_states"].shape[0]
        return {**self.inputs, "timestep": torch.full((batch,), timestep), "return_dict": False}

    def dense(self, timestep: float) -> torch.Tensor:
        return self.model(**self.arguments(timestep))[0]

    def expanded(self, timestep: float) -> torch.Tensor:
        """Run the model eagerly with the plan's masks expanded to tokens in stock SDPA."""
        step = self.plan.step_of(timestep)
        assert step is not None
        names = iter(self.sites)
        lengths = {
            (site.query_length, site.key_length, site.heads) for site in self.plan.sites.values()
        }

        def masked(query: Any, key: Any, value: Any, **options: Any) -> torch.Tensor:
            if (query.shape[2], key.shape[2], query.shape[1]) not in lengths:
                return STOCK(query, key, value, **options)
            pattern = self.plan.sites[next(names)].at(step)
            return attend_by(pattern, self.plan, query, key, value, **options)

        with mock.patch("torch.nn.functional.scaled_dot_product_attention", masked):
            out = self.model(**self.arguments(timestep))[0]
        assert next(names, None) is None, "the oracle missed a site"
        return out


def attend_by(
    pattern: BlockPattern,
    plan: Plan,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    """Stock SDPA in the plan's token order under the mask expanded to tokens, then rows copied."""
    length, video = pattern.query_length, math.prod(plan.grid)
    first = length - video if plan.text_position == "first" else 0
    found = plan.token_order.tokens(plan.grid, length=length, first=first)
    tokens = torch.arange(length) if found is None else torch.from_numpy(found)
    ordered = (x[:, :, tokens] for x in (query, key, value))
    mask = pattern.token_mask()
    if pattern.weighted:
        bias = torch.from_numpy(pattern.log_weights()).repeat_interleave(pattern.block_m, 1)
        bias = bias.repeat_interleave(pattern.block_n, 2)[:, : mask.shape[1], : mask.shape[2]]
        mask = bias.masked_fill(~mask, -math.inf)
    options["attn_mask"] = mask[None]
    out = torch.empty_like(query)
    out[:, :, tokens] = STOCK(*ordered, **options)
    return copy_rows(out, plan, pattern)


@pytest.fixture
def attend() -> Callable[..., torch.Tensor]:
    """`attend_by`, for oracles of other test files."""
    return attend_by


def random_masks(names: tuple[str, ...], heads: int, tokens: int) -> dict[str, torch.Tensor]:
    blocks = -(-tokens // BLOCK[0])
    generator = torch.Generator().manual_seed(7)
    masks = {}
    for name in names:
        mask = torch.rand(len(TIMESTEPS), heads, blocks, blocks, generator=generator) < 0.4
        masks[name] = mask | torch.eye(blocks, dtype=torch.bool)
    return masks


def _wan() -> Case:
    grid = (3, 7, 9)
    model = tiny_models.wan()
    sites = ("blocks.0.attn1", "blocks.1.attn1")
    inputs = {
        "hidden_states": torch.randn(2, 4, 3, 14, 18),
        "encoder_hidden_states": torch.randn(2, 6, 16),
    }
    masks = random_masks(sites, 2, 189)
    return Case(model, Plan.from_masks(masks, grid, TIMESTEPS, BLOCK), inputs, sites)


def _ltx() -> Case:
    grid = (3, 5, 7)
    model = tiny_models.ltx()
    sites = ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1")
    inputs = {
        "hidden_states": torch.randn(2, 105, 8),
        "encoder_hidden_states": torch.randn(2, 6, 16),
        "encoder_attention_mask": torch.ones(2, 6),
        "num_frames": 3,
        "height": 5,
        "width": 7,
    }
    masks = random_masks(sites, 2, 105)
    return Case(model, Plan.from_masks(masks, grid, TIMESTEPS, BLOCK), inputs, sites)


def _cogvideox() -> Case:
    grid, text = (3, 5, 7), 6
    model = tiny_models.cogvideox(max_text_seq_length=text)
    sites = ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1")
    tokens = 105 + text
    masks = random_masks(sites, 2, tokens)
    plan = Plan.from_masks(
        masks, grid, TIMESTEPS, BLOCK, lengths=dict.fromkeys(sites, (tokens, tokens))
    )
    inputs = {
        "hidden_states": torch.randn(2, 3, 4, 10, 14),
        "encoder_hidden_states": torch.randn(2, text, 16),
    }
    return Case(model, plan, inputs, sites)


BUILDERS: Mapping[str, Callable[[], Case]] = {"wan": _wan, "ltx": _ltx, "cogvideox": _cogvideox}


@pytest.fixture(params=sorted(BUILDERS))
def case(request: pytest.FixtureRequest) -> Case:
    """Each family in turn."""
    return build(request.param)


@pytest.fixture
def wan() -> Case:
    """The Wan family alone."""
    return build("wan")


def build(family: str) -> Case:
    torch.manual_seed(0)
    torch._dynamo.reset()
    made = BUILDERS[family]()
    made.model.eval().requires_grad_(False)
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            # Default initialisation leaves outputs near zero: a wrong mask would hardly show.
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=1.5 / parameter[0].numel() ** 0.5)
            elif "norm" not in name:
                parameter.normal_(std=0.1)
    return made


@pytest.fixture(autouse=True)
def _graph_runs_as_rewritten(request: pytest.FixtureRequest, monkeypatch: Any) -> None:
    """Leave Inductor out, which takes seconds a graph, except in tests marked `inductor`."""
    if "inductor" not in request.keywords:
        monkeypatch.setattr(
            "calibatt_compiler.backend._inductor", lambda gm, inputs, settings: gm.forward
        )
