"""What the mask of an attention call is recognised as, in graphs of Dynamo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calibatt_compiler.kernels.common.padding import KeyPadding
from calibatt_compiler.model.dynamo import frame_inputs
from calibatt_compiler.passes.pipeline import run_passes
from calibatt_compiler.passes.rewrite import SdpaCall, Skip
from calibatt_compiler.runtime.graph import CompiledGraph
from calibatt_compiler.runtime.masks import KEYS, NOTHING, OTHER, ROWS, look

TOKENS = 10
VALID = torch.arange(TOKENS)[None] < torch.tensor([[4], [TOKENS]])
sdpa = F.scaled_dot_product_attention


class Site:
    """Dense attention that keeps the masks that it is given."""

    def __init__(self) -> None:
        self.masks: list[KeyPadding | Tensor | None] = []

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, timestep: float, scale: float, **given: Any
    ) -> Tensor:
        mask = given.pop("mask", None)
        assert given == {"ordered": False}
        self.masks.append(mask)
        known = mask.dense_mask() if isinstance(mask, KeyPadding) else mask
        out = sdpa(q, k, v, known, scale=scale).transpose(1, 2).contiguous().transpose(1, 2)
        return mask.clear_rows(out) if isinstance(mask, KeyPadding) else out


class Binder:
    layout = None

    def __init__(self) -> None:
        self.site = Site()

    def bind(self, call: SdpaCall) -> Any:
        return Skip(call.info.skip) if call.info.skip else self.site


class Attention(nn.Module):
    """Attention with what `mask` makes of a key mask (B, S)."""

    def __init__(self, mask: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        return sdpa(x, x, x, self.mask(valid))


class Model(nn.Module):
    """Two layers of it."""

    def __init__(self, mask: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention(mask), Attention(mask)])

    def forward(self, hidden_states: Tensor, timestep: Tensor, valid: Tensor) -> Tensor:
        x = (hidden_states + timestep[:, None, None])[:, None].expand(-1, 2, -1, -1)
        for layer in self.layers:
            x = layer(x, valid)
        return x


def run(mask: Callable[[Tensor], Tensor], valid: Tensor = VALID) -> tuple[Any, torch.fx.Graph]:
    """Compile, compare with stock attention, and return the masks that sites were given."""
    torch._dynamo.reset()
    binder, graphs = Binder(), []

    def backend(gm: torch.fx.GraphModule, _: list[Any]) -> Any:
        rewrite = run_passes(gm, frame_inputs(gm), binder)
        graphs.append(gm.graph)
        return CompiledGraph(gm.forward, rewrite.entries())

    model = Model(mask)
    given = (torch.randn(2, TOKENS, 8), torch.tensor([3.0, 3.0]), valid)
    got = torch.compile(model, backend=backend, fullgraph=True)(*given)
    assert torch.allclose(got, model(*given), atol=1e-5)
    return binder.site.masks, graphs[0]


def pairs(m: Tensor) -> Tensor:
    """As in HunyuanVideo 1.5."""
    m = F.pad(m, (2, 0), value=True)[:, 2:].bool()
    one = m.view(2, 1, 1, TOKENS).repeat(1, 1, TOKENS, 1)
    return (one & one.transpose(2, 3)).bool()


def written(m: Tensor) -> Tensor:
    """As in the token refiner of HunyuanVideo: padded queries have one key."""
    mask = pairs(m)
    mask[:, :, :, 0] = True
    return mask


def changed(m: Tensor) -> Tensor:
    """The key mask is written into between its two uses."""
    m = m.clone()
    one = m[:, None, None, :].clone()
    m[:, 0] = False
    return one & m[:, None, :, None]


@pytest.mark.parametrize(
    ("mask", "rows", "looks"),
    [
        (lambda m: m[:, None, None, :], False, 0),
        (lambda m: m[:, None, None].expand(-1, 2, TOKENS, -1), False, 0),
        (lambda m: torch.where(m, 0.0, -torch.inf)[:, None, None], False, 0),
        (lambda m: (1 - m.float())[:, None, None] * -10000.0, False, 0),
        (pairs, True, 0),
        (lambda m: m[:, None, None, :] * m[:, None, :, None], True, 0),
        (lambda m: m.unsqueeze(1).unsqueeze(2).logical_and(m.unsqueeze(1).unsqueeze(-1)), True, 0),
        (lambda m: (m[:, None] & m[:, :, None])[:, None], True, 2),
        (lambda m: (m[:, None] | ~m[:, :, None].any())[:, None].repeat(1, 2, TOKENS, 1), False, 2),
    ],
)
def test_key_padding_is_recognised(mask, rows, looks):
    masks, graph = run(mask)
    names = [str(node.target) for node in graph.nodes]
    assert names.count("calibatt.look_at_mask.default") == looks
    assert names.count("calibatt.key_padding.default") == (
        0 if looks else names.count("calibatt.key_padding.default")
    )
    assert len(masks) == 2
    for found in masks:
        assert isinstance(found, KeyPadding)
        assert found.rows is rows
        assert torch.equal(found.bias > -1e3, VALID)


@pytest.mark.parametrize("mask", [pairs, lambda m: m[:, None, None, :] * m[:, None, :, None]])
def test_masks_of_pairs_are_not_made(mask):
    _, graph = run(mask)
    shapes = [
        x.shape for node in graph.nodes if isinstance(x := node.meta.get("example_value"), Tensor)
    ]
    assert (2, 1, TOKENS, TOKENS) not in map(tuple, shapes)
    assert not any(str(node.target) in ("repeat", "mul") for node in graph.nodes)


def test_a_mask_that_several_calls_share_is_read_once():
    shared = VALID[:, None, None]
    _, graph = run(lambda m: m, shared)
    names = [str(node.target) for node in graph.nodes]
    assert names.count("calibatt.key_padding.default") == 1


@pytest.mark.parametrize("mask", [written, changed])
def test_what_is_no_padding_reaches_the_site_as_it_is(mask):
    masks, _ = run(mask)
    assert all(isinstance(found, Tensor) for found in masks)


def test_a_mask_of_pairs_that_cuts_nothing_is_none():
    masks, _ = run(lambda m: (m[:, None] | ~m[:, :, None])[:, None] | True)
    assert masks == [None, None]


def test_verdicts():
    tril = torch.ones(1, 1, TOKENS, TOKENS).bool().tril()
    outer = VALID[:, None, None] & VALID[:, None, :, None]
    heads = VALID[:, None, None].repeat(1, 2, TOKENS, 1)
    other = heads.clone()
    other[0, 1, 3, 5] = True
    for mask, verdict in (
        (tril, OTHER),
        (outer, ROWS),
        (outer.repeat(1, 2, 1, 1), ROWS),
        (heads, KEYS),
        (heads[0], KEYS),
        (heads[0, 0], KEYS),
        (other, OTHER),
        (torch.ones(3, TOKENS).bool(), NOTHING),
        (VALID[:, None, None].repeat(1, 1, 7, 1), KEYS),
    ):
        found, seen = look(mask)
        assert seen == verdict
        if verdict in (ROWS, KEYS):
            assert torch.equal(found.valid, VALID[: len(found.valid)])
