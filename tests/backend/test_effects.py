"""Effects in a model are kept: what the passes make computes what the captured graph does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import effect_programs as effects
import pytest
import torch
from effect_statements import FLOWING, STATEMENTS, Attention
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import calibatt_compiler
from calibatt_compiler.plan import Plan

NAMES = sorted(STATEMENTS)
PLANS = ["none", "some", "all", "full"]

programs = st.builds(
    effects.Program,
    st.one_of(
        st.lists(st.sampled_from(NAMES), min_size=1, max_size=7),
        st.lists(st.sampled_from(FLOWING), min_size=3, max_size=7),
    ).map(tuple),
    plan=st.sampled_from(PLANS),
    order=st.sampled_from(["raster", "2x2x3"]),
    alias=st.booleans(),
    seed=st.integers(0, 999),
)


@pytest.mark.slow
@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(programs)
def test_random_programs(program: Any) -> None:
    assert effects.difference(program) is None


@pytest.mark.parametrize("name", NAMES)
def test_each_statement_between_sites(name: str) -> None:
    names = ("attend_plain", "keep_view", name, "read_cache", "attend_plain")
    assert effects.difference(effects.Program(names, order="2x2x3")) is None


THROUGH_INDUCTOR = [
    (("attend_before", "fill_cache", "view_write", "attend_after", "read_cache"), "all"),
    (("out_table", "attend_checkpointed", "noise", "count", "attend_inplace"), "some"),
    (("vmapped", "attend_autocast", "write_input", "attend_dense", "foreach", "checks"), "none"),
]


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("index", range(len(THROUGH_INDUCTOR)))
def test_programs_through_inductor(index: int) -> None:
    names, plan = THROUGH_INDUCTOR[index]
    assert effects.difference(effects.Program(names, plan=plan, order="2x2x3")) is None


class Around(nn.Module):
    """Something before and behind an attention of 64 tokens."""

    def __init__(self, before: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.before = before
        self.attention = Attention()

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        x = hidden_states + 0.001 * timestep.reshape(-1, 1, 1)
        return self.attention(x + self.before(x))


def windowed(x: Tensor) -> Tensor:
    mask = create_block_mask(
        lambda b, h, q, k: (q - k).abs() < 9, None, None, 64, 64, device="cpu", BLOCK_SIZE=32
    )
    q = x.unflatten(-1, (1, -1)).transpose(1, 2)
    q = nn.functional.pad(q, (0, 8))
    out = flex_attention(q, q, q, block_mask=mask)
    return out[..., :8].transpose(1, 2).flatten(2)


def branched(x: Tensor) -> Tensor:
    def attend(y: Tensor) -> Tensor:
        q = y[:, None]
        return nn.functional.scaled_dot_product_attention(q, q, q)[:, 0]

    return torch.cond(x.sum() > 0, attend, lambda y: y * 2, (x,))


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("served", [True, False])
@pytest.mark.parametrize("before", [windowed, branched])
def test_subgraphs_of_other_operators_stay(
    before: Callable[[Tensor], Tensor], served: bool
) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Around(before)
    mask = torch.rand(1, 2, 4, 4) < 0.5
    name = "attention" if served else "elsewhere"
    lengths = None if served else {name: (128, 128)}
    mask = (mask | torch.eye(4, dtype=torch.bool)) if served else mask.new_ones(1, 2, 8, 8)
    plan = Plan.from_masks({name: mask}, (1, 1, 64), [500.0], (16, 16), lengths=lengths)
    compiled = torch.compile(
        model, backend="calibatt", fullgraph=True, options={"plan": plan, "lowering": "reference"}
    )
    x, t = torch.randn(2, 64, 8), torch.full((2,), 500.0)
    with torch.no_grad():
        got = compiled(x, t)
        if served:
            tokens = plan.sites[name].at(0).token_mask()[None]
            model.attention.oracle = lambda q, k, v: nn.functional.scaled_dot_product_attention(
                q, k, v, tokens
            )
        assert torch.allclose(got, model(x, t), atol=1e-5)
    assert calibatt_compiler.summary(compiled).sparse_calls == served
