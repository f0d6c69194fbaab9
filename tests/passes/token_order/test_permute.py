"""The pass on small models: what it inserts, when it does not, and what it then says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils.checkpoint import checkpoint

from calibatt_compiler.kernels.common.padding import KeyPadding
from calibatt_compiler.model.dynamo import frame_inputs
from calibatt_compiler.passes import pipeline
from calibatt_compiler.passes.rewrite import Layout, Permuted, Rewrite, SdpaCall, Skip
from calibatt_compiler.passes.token_order.permute import permute_tokens
from calibatt_compiler.plan.order import TokenOrder
from calibatt_compiler.runtime.graph import CompiledGraph
from calibatt_compiler.runtime.token_order import Rearrangements

GRID, VIDEO = (2, 3, 5), 30
ORDER = TokenOrder((2, 1, 3))
CHANNELS = 8
X = torch.randn(2, CHANNELS, *GRID)
T = torch.tensor([3.0, 3.0])


class Causal:
    """A site that depends on the order of tokens: each sees those before it, in the plan's."""

    def __init__(self, text_first: bool) -> None:
        self.text_first = text_first

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        timestep: float,
        scale: float,
        *,
        ordered: bool = False,
        mask: KeyPadding | Tensor | None = None,
    ) -> Tensor:
        if isinstance(mask, Tensor):
            return sdpa(q, k, v, mask, scale=scale)
        laid = Rearrangements().of(
            ORDER, GRID, q.shape[2], text_first=self.text_first, device=torch.device("cpu")
        )
        assert laid is not None
        if not ordered:
            q, k, v = (laid.apply(x) for x in (q, k, v))
            mask = None if mask is None else mask.ordered(laid.tokens)
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        seen = seen if mask is None else seen & mask.valid[:, None, None]
        out = sdpa(q, k, v, seen, scale=scale)
        out = out if ordered else laid.undo(out)
        return out.transpose(1, 2).contiguous().transpose(1, 2)


class Binder:
    """Serves every plain self-attention, with tokens in an order."""

    def __init__(self, layout: Layout | None, text_first: bool) -> None:
        self.layout = layout
        self.text_first = text_first

    def bind(self, call: SdpaCall) -> Causal | Skip:
        return Skip(call.info.skip) if call.info.skip else Causal(self.text_first)


class Attention(nn.Module):
    """Self-attention over (B, S, C)."""

    def __init__(self, mask: Tensor | None = None) -> None:
        super().__init__()
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS)
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return sdpa(q, k, v, self.mask).transpose(1, 2).flatten(2)


class Model(nn.Module):
    """A video transformer: flatten, layers with something between them, fold."""

    def __init__(
        self, *layers: Callable[[Tensor], Any], text: int = 0, checkpointed: bool = False
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(x for x in layers if isinstance(x, nn.Module))
        self.between = layers
        self.text = nn.Parameter(torch.randn(1, text, CHANNELS))
        self.checkpointed = checkpointed

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Any:
        x = hidden_states.flatten(2).transpose(1, 2) + timestep[:, None, None]
        if self.text.shape[1]:
            x = torch.cat([self.text.expand(x.shape[0], -1, -1), x], 1)
        for layer in self.between:
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x))
        x = x[:, self.text.shape[1] :]
        return x.transpose(1, 2).unflatten(2, GRID)


def run(
    module: nn.Module, *inputs: Tensor, text_first: bool = False, once: bool = True
) -> tuple[Any, Rewrite]:
    torch._dynamo.reset()
    rewrites: list[Rewrite] = []
    binder = Binder(Layout(ORDER, GRID, text_first) if once else None, text_first)

    def backend(gm: torch.fx.GraphModule, _: list[Any]) -> Any:
        rewrites.append(pipeline.run_passes(gm, frame_inputs(gm), binder))
        gm.graph.lint()
        return CompiledGraph(gm.forward, rewrites[-1].entries())

    with torch.no_grad():
        got = torch.compile(module, backend=backend, fullgraph=True)(*(inputs or (X, T)))
    return got, rewrites[-1]


def check(module: nn.Module, *inputs: Tensor, text_first: bool = False) -> Rewrite:
    """Compare with sites that permute around themselves."""
    got, rewrite = run(module, *inputs, text_first=text_first)
    expected, plain = run(module, *inputs, text_first=text_first, once=False)
    assert plain.order is None
    assert plain.order_in_words() is None
    for one, other in zip(
        *(x if isinstance(x, tuple) else (x,) for x in (got, expected)), strict=True
    ):
        assert torch.allclose(one, other, atol=1e-5)
    found = rewrite.gm.graph.find_nodes(op="call_function", target=torch.index_select)
    sites = rewrite.gm.graph.find_nodes(
        op="call_function", target=torch.ops.calibatt.attention.default
    )
    permuted = isinstance(rewrite.order, Permuted)
    assert all(node.args[-1] is permuted for node in sites)
    count = rewrite.order.entries + rewrite.order.exits if permuted else 0
    assert len(found) == count
    return rewrite


def refused(module: nn.Module, *inputs: Tensor, text_first: bool = False) -> str:
    rewrite = check(module, *inputs, text_first=text_first)
    assert isinstance(rewrite.order, Skip)
    words = rewrite.order_in_words()
    assert words == f"token order 2x1x3: permuted around each site, as {rewrite.order.reason}"
    return rewrite.order.reason


def conv(x: Tensor) -> Tensor:
    """Neighbours of a token, as they stand in the sequence."""
    return nn.functional.avg_pool1d(x.transpose(1, 2), 3, 1, 1).transpose(1, 2)


def table(x: Tensor) -> Tensor:
    return x * torch.arange(VIDEO * CHANNELS, dtype=torch.float32).view(VIDEO, CHANNELS).cos()


def test_video_and_tables_are_permuted_on_the_way_in_and_the_output_back() -> None:
    rewrite = check(Model(Attention(), table, torch.tanh, Attention(), table))
    assert rewrite.order == Permuted(entries=3, exits=1)  # a table is made anew at each use
    assert rewrite.order_in_words() == "token order 2x1x3: permuted once a forward pass"


def test_text_before_the_video_stays_where_it_is() -> None:
    rewrite = check(Model(Attention(), text=5), text_first=True)
    assert rewrite.order == Permuted(1, 1)


def test_masked_attention_amid_permuted_tokens_is_permuted_along() -> None:
    keys = torch.arange(VIDEO)[None, None, None] % 5 != 0
    assert check(Model(Attention(), Attention(keys), Attention())).order == Permuted(2, 1)


def test_several_outputs_are_all_brought_back() -> None:
    class Features(Model):
        def forward(self, hidden_states: Tensor, timestep: Tensor) -> Any:
            x = hidden_states.flatten(2).transpose(1, 2) + timestep[:, None, None]
            first = self.layers[0](x)
            second = self.layers[1](first)
            return second.transpose(1, 2).unflatten(2, GRID), first, first.mean(1), timestep

    assert check(Features(Attention(), Attention())).order == Permuted(1, 2)


def test_what_mixes_tokens_between_sites_is_named() -> None:
    reason = refused(Model(Attention(), conv, Attention()))
    assert "is of an operator without a rule for permuted tokens (avg_pool1d)" in reason


def test_what_mixes_tokens_behind_the_last_site_is_brought_back_before() -> None:
    assert check(Model(Attention(), torch.tanh, Attention(), nn.Linear(8, 8))).order == Permuted(
        1, 1
    )


def test_a_mask_of_tokens_by_tokens_stands_in_the_way() -> None:
    mask = torch.ones(VIDEO, VIDEO, dtype=torch.bool).tril()
    assert "mask of tokens by tokens" in refused(Model(Attention(), Attention(mask), Attention()))


def test_text_in_another_place_than_the_plans_is_no_video() -> None:
    reason = refused(Model(Attention(), text=5), text_first=False)
    assert "is a query without the video's tokens in its place" in reason


def test_sites_in_subgraphs_permute_around_themselves() -> None:
    assert "hides sites in a subgraph" in refused(Model(Attention(), checkpointed=True))


def test_moving_more_than_sites_do_is_no_gain() -> None:
    class Wide(Model):
        def forward(self, hidden_states: Tensor, timestep: Tensor) -> Any:
            x = hidden_states.flatten(2).transpose(1, 2) + timestep[:, None, None]
            return self.layers[0](x).repeat(1, 1, 9).transpose(1, 2).unflatten(2, GRID)

    assert "it would move" in refused(Wide(Attention()))


def test_tokens_that_never_stand_in_one_dimension_are_not_found() -> None:
    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Attention()

        def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
            x = hidden_states.flatten(3).permute(2, 0, 3, 1) + timestep[:, None, None]
            frames = x.flatten(0, 1)
            return self.layer(torch.cat([frames, frames, frames[:, :5]], 1))

    assert refused(Frames()) == "no value has the video's tokens on one dimension"


def test_an_unknown_video_input_is_said_so() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Attention()

        def forward(self, video: Tensor, timestep: Tensor) -> Tensor:
            return self.layer(video.flatten(2).transpose(1, 2) + timestep[:, None, None])

    assert refused(Other()) == "the video is not an input of this graph"


def test_a_table_of_video_and_text_needs_a_fixed_length() -> None:
    class Joint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Attention()

        def forward(
            self, hidden_states: Tensor, timestep: Tensor, text: Tensor, rope: Tensor
        ) -> Tensor:
            x = hidden_states.flatten(2).transpose(1, 2) + timestep[:, None, None]
            return self.layer(torch.cat([text, x], 1) * rope)[:, text.shape[1] :]

    def inputs(text: int, *, dynamic: bool) -> tuple[Tensor, ...]:
        made = (X, T, torch.randn(2, text, 8), torch.randn(1, text + VIDEO, 8))
        if dynamic:
            torch._dynamo.mark_dynamic(made[2], 1)
            torch._dynamo.mark_dynamic(made[3], 1)
        return made

    rewrite = check(Joint(), *inputs(5, dynamic=False), text_first=True)
    assert rewrite.order == Permuted(2, 1)
    reason = refused(Joint(), *inputs(5, dynamic=True), text_first=True)
    assert "joins the video with text of any length" in reason


def test_a_model_whose_order_is_the_plans_is_left_alone() -> None:
    _, rewrite = run(Model(Attention()), once=False)
    assert rewrite.order is None
    assert permute_tokens(rewrite) is rewrite


@pytest.mark.parametrize("grad", [True, False])
def test_the_permutation_lets_gradients_of_what_is_around_sites_pass(grad: bool) -> None:
    module = Model(torch.tanh, Attention())
    torch._dynamo.reset()
    binder = Binder(Layout(ORDER, GRID, False), False)

    def backend(gm: torch.fx.GraphModule, _: list[Any]) -> Any:
        rewrite = pipeline.run_passes(gm, frame_inputs(gm), binder)
        return CompiledGraph(gm.forward, rewrite.entries())

    with torch.set_grad_enabled(grad):
        got = torch.compile(module, backend=backend, fullgraph=True)(X, T)
    expected, _ = run(module, once=False)
    assert torch.allclose(got, expected, atol=1e-5)
