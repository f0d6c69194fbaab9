"""Passes on small modules: what is found, what it is called, what is left alone and why."""

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
from calibatt_compiler.passes.graph import module_name
from calibatt_compiler.passes.pipeline import PASSES, run_passes
from calibatt_compiler.passes.rewrite import Lowered, Rewrite, SdpaCall, Skip
from calibatt_compiler.runtime.graph import CompiledGraph


class Attention(nn.Module):
    """Self-attention in one of the call styles that models use."""

    def __init__(self, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.call(q, k, v).transpose(1, 2).flatten(2)


class Model(nn.Module):
    """Layers of attention, around which each test puts what it is about."""

    def __init__(self, *calls: Callable[..., Tensor], checkpointed: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(call) for call in calls)
        self.checkpointed = checkpointed

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        x = hidden_states + timestep.reshape(-1, 1, 1)
        for layer in self.layers:
            x = x + checkpoint(layer, x, use_reentrant=False) if self.checkpointed else x + layer(x)
        return x


class Negative:
    """A site that shows that it ran: attention with its sign turned."""

    def __init__(self, seen: list[tuple[str, float]], name: str) -> None:
        self.seen, self.name = seen, name
        self.masks: list[KeyPadding | Tensor | None] = []

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
        self.masks.append(mask)
        self.seen.append((self.name, timestep))
        out = -sdpa(q, k, v, scale=scale)
        return out.transpose(1, 2).contiguous().transpose(1, 2)


class Binder:
    layout = None

    def __init__(self) -> None:
        self.seen: list[tuple[str, float]] = []

    def bind(self, call: SdpaCall) -> Negative | Skip:
        return Skip(call.info.skip) if call.info.skip else Negative(self.seen, call.info.name)


def compiled(module: nn.Module, **options: Any) -> tuple[Any, list[Rewrite], Binder]:
    torch._dynamo.reset()
    rewrites: list[Rewrite] = []
    binder = Binder()

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        rewrites.append(run_passes(gm, frame_inputs(gm), binder))
        gm.graph.lint()
        return CompiledGraph(gm.forward, rewrites[-1].entries())

    return torch.compile(module, backend=backend, **options), rewrites, binder


def keywords(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(query=q, key=k, value=v, attn_mask=None, dropout_p=0.0, is_causal=False)


def negated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return -sdpa(q, k, v)


X = torch.randn(2, 10, 8)
T = torch.tensor([3.0, 3.0])


@pytest.mark.parametrize("call", [sdpa, keywords])
@pytest.mark.parametrize("grad", [True, False])
def test_both_call_styles_are_lowered(call, grad):
    torch.manual_seed(0)
    module = Model(call, call)
    run, rewrites, binder = compiled(module, fullgraph=True)
    with torch.set_grad_enabled(grad):
        got = run(X, T)
    assert [c.info.name for c in rewrites[0].calls] == ["layers.0", "layers.1"]
    assert binder.seen == [("layers.0", 3.0), ("layers.1", 3.0)]
    for layer in module.layers:
        layer.call = negated
    assert torch.allclose(got, module(X, T), atol=1e-6)


def test_subgraphs_of_checkpointing_are_lowered():
    torch.manual_seed(0)
    module = Model(sdpa, keywords, checkpointed=True)
    run, rewrites, binder = compiled(module, fullgraph=True)
    got = run(X, T)
    assert [type(d) for d in rewrites[0].decisions] == [Lowered, Lowered]
    assert all(call.path for call in rewrites[0].calls), "checkpointing made no subgraph"
    assert binder.seen == [("layers.0", 3.0), ("layers.1", 3.0)]
    for layer in module.layers:
        layer.call = negated
    module.checkpointed = False
    assert torch.allclose(got, module(X, T), atol=1e-6)


def refused(call: Callable[..., Tensor]) -> str:
    run, rewrites, binder = compiled(Model(call), fullgraph=True)
    run(X, T)
    assert not binder.seen
    (decision,) = rewrites[0].decisions
    assert isinstance(decision, Skip)
    return decision.reason


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda q, k, v: sdpa(q, k, v, torch.ones(10, 10)), "masked: an additive bias over pairs"),
        (lambda q, k, v: sdpa(q, k, v, torch.ones(2, 10, 10)), "masked: an additive bias by head"),
        (lambda q, k, v: sdpa(q, k, v, torch.ones(10, 1).bool()), "one number for all keys"),
        (lambda q, k, v: sdpa(q, k, v, is_causal=True), "causal"),
        (lambda q, k, v: sdpa(q, k, v, None, 0.1), "dropout"),
        (lambda q, k, v: sdpa(q, k[:, :, :4], v[:, :, :4]), "cross-attention"),
        (lambda q, k, v: sdpa(q, k[:, :1], v[:, :1]), "batch or heads"),
        (lambda q, k, v: sdpa(q, k, v[..., :2]).repeat(1, 1, 1, 2), "differ in shape"),
        (lambda q, k, v: sdpa(q[0], k[0], v[0])[None].expand(2, -1, -1, -1), "not (batch, heads"),
    ],
)
def test_what_is_no_plain_self_attention_is_skipped_with_its_reason(call, reason):
    assert reason in refused(call)


def test_a_scale_is_kept():
    module = Model(lambda q, k, v: sdpa(q, k, v, scale=0.3))
    run, rewrites, _ = compiled(module)
    got = run(X, T)
    assert rewrites[0].calls[0].scale == 0.3
    module.layers[0].call = lambda q, k, v: -sdpa(q, k, v, scale=0.3)
    assert torch.allclose(got, module(X, T), atol=1e-6)


def test_two_calls_of_one_module_get_two_names():
    run, rewrites, _ = compiled(Model(lambda q, k, v: sdpa(sdpa(q, k, v), k, v)))
    run(X, T)
    assert [c.info.name for c in rewrites[0].calls] == ["layers.0", "layers.0:1"]


def test_queries_and_keys_of_equal_length_may_still_be_cross_attention():
    class Cross(nn.Module):
        def forward(self, hidden_states: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
            x = (hidden_states + timestep.reshape(-1, 1, 1))[:, None]
            return sdpa(x, context[:, None], context[:, None])

    module = nn.ModuleDict({"attn2": Cross()})

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = module

        def forward(self, hidden_states: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
            return self.blocks["attn2"](hidden_states, timestep, context)

    run, rewrites, _ = compiled(Outer())
    run(X, T, torch.randn(2, 10, 8))
    (decision,) = rewrites[0].decisions
    assert isinstance(decision, Skip)
    assert decision.reason == "cross-attention"
    assert rewrites[0].calls[0].info.name == "blocks.attn2"


def test_without_a_timestep_nothing_is_lowered_with_the_reason():
    class Timeless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Attention(sdpa)

        def forward(self, hidden_states: Tensor) -> Tensor:
            return self.layer(hidden_states)

    module = Timeless()
    run, rewrites, binder = compiled(module)
    assert torch.allclose(run(X), module(X))
    assert not binder.seen
    (decision,) = rewrites[0].decisions
    assert isinstance(decision, Skip)
    assert not decision.mismatch
    assert "timestep" in decision.reason


def test_where_nothing_is_served_the_graph_is_the_captured_one():
    class Plain(Binder):
        def bind(self, call: SdpaCall) -> Skip:
            return Skip("not in the plan")

    torch._dynamo.reset()
    codes: list[tuple[list[str], str]] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        for _ in range(2):
            codes.append(([f"{node} {node.args}" for node in gm.graph.nodes], gm.code))
            run_passes(gm, frame_inputs(gm), Plain())
        return gm.forward

    torch.compile(Model(sdpa), backend=backend)(X, T)
    assert codes[0] == codes[1]


def test_keys_that_the_video_was_written_into_are_no_other_tensors():
    """So this is self-attention, though keys do not depend on the video by their nodes."""

    class Written(nn.Module):
        def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
            x = (hidden_states + timestep.reshape(-1, 1, 1))[:, None]
            keys = torch.empty(x.shape)
            keys[:, :, :].copy_(x)
            return sdpa(x, keys, keys)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Written()

        def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
            return self.layer(hidden_states, timestep)

    run, rewrites, binder = compiled(Outer())
    run(X, T)
    assert isinstance(rewrites[0].decisions[0], Lowered)
    assert binder.seen == [("layer", 3.0)]


def test_within_vmap_attention_stays():
    module = Model(torch.func.vmap(sdpa))
    run, rewrites, _ = compiled(module)
    assert torch.allclose(run(X, T), module(X, T), atol=1e-6)
    (decision,) = rewrites[0].decisions
    assert isinstance(decision, Skip)
    assert "inside vmap" in decision.reason


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("L['self'].__dict__['_modules']['blocks'].3.attn1", "blocks.3.attn1"),
        ("L['self']._modules['blocks']._modules['3']._modules['attn1']", "blocks.3.attn1"),
        ("L['self'].blocks[3].attn1", "blocks.3.attn1"),
        ("L['self'].blocks.3.attn1", "blocks.3.attn1"),
    ],
)
def test_module_names(path, name):
    graph = torch.fx.Graph()
    node = graph.placeholder("x")
    node.meta["nn_module_stack"] = {"a": ("L['self']", nn.Module), "b": (path, nn.Module)}
    assert module_name(node) == name


def test_graphs_are_dumped_before_and_after_each_pass(tmp_path, monkeypatch):
    monkeypatch.setenv("CALIBATT_DEBUG_DIR", str(tmp_path))
    run, _, _ = compiled(Model(sdpa))
    run(X, T)
    stages = [path.stem.split("-", 1)[1] for path in sorted(tmp_path.iterdir())]
    assert stages == ["captured", *(each.__name__ for each in PASSES)]
    last = sorted(tmp_path.iterdir())[-1].read_text()
    assert "calibatt.attention" in last
    assert "scaled_dot_product" not in last
