"""Rules for permuted tokens: what each says, and that a run with permuted tokens bears it out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn.functional import scaled_dot_product_attention as sdpa

from calibatt_compiler.passes.token_order.axis import NeedsPermutation, Obstacle, Tokens, TokenState
from calibatt_compiler.passes.token_order.flow import Flow, follow, origin, propagate

VIDEO, TEXT = 5, 3
ORDER = torch.tensor([3, 0, 4, 1, 2])
JOINT = (2, TEXT + VIDEO, 4)  # text first
ALONE = (2, VIDEO, 4)
C = torch.randn(6, 4)
ONE = torch.randn(4)
ROPE = torch.randn(1, VIDEO, 4)
LONG = torch.randn(1, TEXT + VIDEO, 4)
SHORT = torch.randn(2, TEXT, 4)


def capture(call: Callable[..., Any], *inputs: Tensor) -> GraphModule:
    """Return the Dynamo graph of a function; its inputs become placeholders in order of use."""
    graphs: list[GraphModule] = []

    def backend(gm: GraphModule, _: list[Any]) -> Any:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(call, backend=backend, fullgraph=True, dynamic=False)(*inputs)
    (gm,) = graphs
    return gm


def tokens_input(gm: GraphModule) -> Node:
    return next(n for n in gm.graph.find_nodes(op="placeholder") if str(n.target) == "L_x_")


def permuted(x: Tensor, tokens: Tokens) -> Tensor:
    """The video's tokens in another order, the text where it was."""
    index = torch.arange(x.shape[tokens.dim])
    index[tokens.first : tokens.first + VIDEO] = tokens.first + ORDER
    return x.index_select(tokens.dim, index)


def result(gm: GraphModule) -> Node:
    (value,) = gm.graph.output_node().args[0]
    return value


def flow_of(call: Callable[..., Any], x: Tensor, tokens: Tokens) -> tuple[Any, GraphModule]:
    gm = capture(call, x)
    return follow(gm.graph, {tokens_input(gm): tokens}, VIDEO), gm


def spelled(state: TokenState) -> tuple[int, int] | None:
    assert not isinstance(state, tuple)
    return None if state is None else (state.dim, int(state.first))


Row = tuple[Callable[[Tensor], Tensor], tuple[int, ...], int, int, tuple[int, int] | None]

STAYS: list[Row] = [
    # what is computed, shape of x, its token axis, where the video begins, the same of the result
    (lambda x: x * ONE + 1, ALONE, 1, 0, (1, 0)),
    (lambda x: x - x.exp(), ALONE, 1, 0, (1, 0)),
    (lambda x: torch.where(x > 0, x, 0.5 * x), ALONE, 1, 0, (1, 0)),
    (lambda x: C[:2, :1] * x, (5, 2, 4), 0, 0, (0, 0)),
    (lambda x: ONE[:2, None, None] * x, (5, 4), 0, 0, (1, 0)),
    (lambda x: x.double().contiguous().type_as(x).clone(), ALONE, 1, 0, (1, 0)),
    (lambda x: x[:1].expand(3, -1, -1), ALONE, 1, 0, (1, 0)),
    (lambda x: x.expand(7, 2, VIDEO, 4), ALONE, 1, 0, (2, 0)),
    (lambda x: torch.zeros_like(x) - x, ALONE, 1, 0, (1, 0)),
    (lambda x: x + x.new_ones(1), ALONE, 1, 0, (1, 0)),
    (lambda x: F.dropout(x, 0.5, False), ALONE, 1, 0, (1, 0)),
    (lambda x: F.linear(x, C, torch.ones(6)), JOINT, 1, TEXT, (1, TEXT)),
    (lambda x: x @ C.T, ALONE, 1, 0, (1, 0)),
    (lambda x: C @ x.transpose(1, 2), ALONE, 1, 0, (2, 0)),
    (lambda x: F.layer_norm(x, (4,), ONE), JOINT, 1, TEXT, (1, TEXT)),
    (lambda x: F.rms_norm(x, (4,), ONE), JOINT, 1, 0, (1, 0)),
    (lambda x: x.mean(-1), ALONE, 1, 0, (1, 0)),
    (lambda x: x.sum((0, 2), keepdim=True), ALONE, 1, 0, (1, 0)),
    (lambda x: x.amax(0), ALONE, 1, 0, (0, 0)),
    (lambda x: x.mean(1), JOINT, 1, TEXT, None),
    (lambda x: x.sum(), JOINT, 1, TEXT, None),
    (lambda x: x.softmax(-1), ALONE, 1, 0, (1, 0)),
    (lambda x: x.softmax(1), ALONE, 1, 0, (1, 0)),
    (lambda x: x.unflatten(2, (2, -1)), JOINT, 1, TEXT, (1, TEXT)),
    (lambda x: x.flatten(1), (2, VIDEO, 1, 1), 1, 0, (1, 0)),
    (lambda x: x.reshape(2, VIDEO, 2, 2).flatten(2), ALONE, 1, 0, (1, 0)),
    (lambda x: x.unsqueeze(1).unsqueeze(0), ALONE, 1, 0, (3, 0)),
    (lambda x: x.view(VIDEO, 4), (1, VIDEO, 4), 1, 0, (0, 0)),
    (lambda x: x.permute(2, 0, 1), ALONE, 1, 0, (2, 0)),
    (lambda x: torch.permute(x, (1, 0, 2)), ALONE, 1, 0, (0, 0)),
    (lambda x: x.transpose(-1, -2), ALONE, 1, 0, (2, 0)),
    (lambda x: x[..., None, ::2], ALONE, 1, 0, (1, 0)),
    (lambda x: x[0], ALONE, 1, 0, (0, 0)),
    (lambda x: x[:, :, 1], JOINT, 1, TEXT, (1, TEXT)),
    (lambda x: x[:, TEXT:], JOINT, 1, TEXT, (1, 0)),
    (lambda x: x[:, TEXT - 1 :], JOINT, 1, TEXT, (1, 1)),
    (lambda x: x[:, :TEXT], JOINT, 1, TEXT, None),
    (lambda x: x[:, :-TEXT], JOINT, 1, 0, (1, 0)),
    (lambda x: x[:, -TEXT:], JOINT, 1, 0, None),
    (lambda x: x.chunk(2, -1)[1], ALONE, 1, 0, (1, 0)),
    (lambda x: x.split([TEXT, VIDEO], 1)[1], JOINT, 1, TEXT, (1, 0)),
    (lambda x: x.split([TEXT, VIDEO], dim=1)[0], JOINT, 1, TEXT, None),
    (lambda x: x.unbind(0)[1], ALONE, 1, 0, (0, 0)),
    (lambda x: x.unbind(-1)[1], ALONE, 1, 0, (1, 0)),
    (lambda x: torch.cat([SHORT, x], 1), ALONE, 1, 0, (1, TEXT)),
    (lambda x: torch.cat([x, SHORT], dim=1), ALONE, 1, 0, (1, 0)),
    (lambda x: torch.cat([SHORT, x], 1), JOINT, 1, TEXT, (1, 2 * TEXT)),
    (lambda x: torch.cat([x, 2 * x], -1), ALONE, 1, 0, (1, 0)),
    (lambda x: torch.stack([x, -x], -1), ALONE, 1, 0, (1, 0)),
    (lambda x: torch.stack([x, -x]), ALONE, 1, 0, (2, 0)),
    (lambda x: x.repeat(3, 1, 2), ALONE, 1, 0, (1, 0)),
    (lambda x: x.repeat(2, 1, 1, 1), ALONE, 1, 0, (2, 0)),
    (lambda x: x.repeat_interleave(2, -1), ALONE, 1, 0, (1, 0)),
    (lambda x: F.pad(x, (0, 0, 2, 1)), ALONE, 1, 0, (1, 2)),
    (lambda x: F.pad(x, (1, 0)), ALONE, 1, 0, (1, 0)),
    (lambda x: sdpa(x[:, None], 2 * x[:, None], x[:, None] + 1), JOINT, 1, TEXT, (2, TEXT)),
    (lambda x: sdpa(x[:, None], SHORT[:, None], SHORT[:, None]), ALONE, 1, 0, (2, 0)),
    (lambda x: sdpa(SHORT[:, None], x[:, None], x[:, None]), ALONE, 1, 0, None),
    (lambda x: sdpa(x, SHORT, SHORT, torch.ones(1, TEXT)), ALONE, 1, 0, (1, 0)),
    (lambda x: sdpa(x, x, x, x[:, :, 0][:, None]), ALONE, 1, 0, (1, 0)),
    (lambda x: sdpa(SHORT, x, x, x[:, None, :, 0]), ALONE, 1, 0, None),
    (lambda x: x * x.shape[1] + x.size(-1), ALONE, 1, 0, (1, 0)),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(STAYS)))
def test_what_a_rule_says_is_what_a_permuted_run_gives(index: int) -> None:
    call, sizes, dim, first, expected = STAYS[index]
    x, tokens = torch.randn(sizes), Tokens(dim, first)
    flow, gm = flow_of(call, x, tokens)
    assert isinstance(flow, Flow)
    assert set(flow.exits) <= {gm.graph.output_node()}
    state = flow.states[result(gm)]
    assert spelled(state) == expected
    once, again = call(x), call(permuted(x, tokens))
    assert torch.allclose(
        permuted(once, state) if isinstance(state, Tokens) else once, again, atol=1e-6
    )


REFUSED: list[tuple[Callable[[Tensor], Tensor], tuple[int, ...], int, str]] = [
    (lambda x: x + x.transpose(1, 2), (2, VIDEO, VIDEO), 1, "aligns tokens with other tokens"),
    (lambda x: F.dropout(x, 0.5, True), ALONE, 1, "at random"),
    (lambda x: F.linear(x, torch.ones(3, VIDEO)), (2, 4, VIDEO), 2, "sums over tokens"),
    (lambda x: F.linear(ROPE, x), (VIDEO, 4), 0, "another operand"),
    (lambda x: torch.ones(1, 1, VIDEO) @ x, ALONE, 1, "sums over tokens"),
    (lambda x: x @ x.transpose(1, 2), ALONE, 1, "pairs tokens"),
    (lambda x: torch.mv(x, ONE), (VIDEO, 4), 0, "without a rule"),
    (lambda x: C @ x.mT, ALONE, 1, "a tensor that no rule"),
    (lambda x: x @ ONE, ALONE, 1, "two matrices"),
    (lambda x: F.layer_norm(x, (VIDEO, 4)), ALONE, 1, "normalises over tokens"),
    (lambda x: F.rms_norm(x, (VIDEO,)), (2, VIDEO), 1, "normalises over tokens"),
    (lambda x: x.flatten(1), ALONE, 1, "splits or merges"),
    (lambda x: x.flatten(0, 1), ALONE, 1, "splits or merges"),
    (lambda x: x[:, 2], ALONE, 1, "single token"),
    (lambda x: x[:, ::2], ALONE, 1, "every n-th"),
    (lambda x: x[:, 1:], ALONE, 1, "cuts the video"),
    (lambda x: x[:, ORDER], ALONE, 1, "indexed by a tensor"),
    (lambda x: C[x], (VIDEO,), 0, "looks up"),
    (lambda x: x.split(2, 1)[0], ALONE, 1, "cuts the video"),
    (lambda x: x.unbind(1)[0], ALONE, 1, "single tokens"),
    (lambda x: torch.cat([x, x], 1), ALONE, 1, "joins tokens"),
    (lambda x: torch.cat([x, x], axis=-1), ALONE, 1, "NumPy"),
    (lambda x: x.repeat(1, 2, 1), ALONE, 1, "repeats tokens"),
    (lambda x: x.repeat_interleave(2, 1), ALONE, 1, "repeats tokens"),
    (lambda x: F.pad(x, (0, 0, -1, 0)), ALONE, 1, "cuts the video"),
    (lambda x: F.pad(x, (0, 0, 1, 0), mode="replicate"), ALONE, 1, "pads with tokens"),
    (lambda x: sdpa(x, x, x, is_causal=True), ALONE, 1, "causal"),
    (lambda x: sdpa(x, x, x, None, 0.1), ALONE, 1, "at random"),
    (lambda x: sdpa(x, x, x), (VIDEO, 2, 4), 0, "another dimension"),
    (lambda x: sdpa(x, x, x, torch.ones(VIDEO, VIDEO)), ALONE, 1, "tokens by tokens"),
    (lambda x: sdpa(*[torch.ones(VIDEO, 2, 4)] * 3, x), (VIDEO, 1, 1), 0, "mask of other tokens"),
    (lambda x: x.cumsum(1), ALONE, 1, "without a rule"),
    (lambda x: F.conv1d(x.transpose(1, 2), torch.ones(2, 4, 3)), ALONE, 1, "without a rule"),
    (lambda x: x.roll(1, 1), ALONE, 1, "without a rule"),
    (lambda x: x.argsort(1), ALONE, 1, "without a rule"),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(REFUSED)))
def test_what_no_rule_shows_is_an_exit_with_its_reason(index: int) -> None:
    call, sizes, dim, reason = REFUSED[index]
    x = torch.randn(sizes) if len(sizes) > 1 else torch.arange(sizes[0])
    flow, gm = flow_of(call, x, Tokens(dim))
    assert isinstance(flow, Flow)
    assert reason in str(next(iter(flow.exits.values())))
    assert tokens_input(gm) in flow.entries


MEETINGS: list[tuple[Callable[[Tensor], Tensor], tuple[int, int]]] = [
    (lambda x: x * ROPE, (1, 0)),
    (lambda x: ROPE[0] - x, (0, 0)),
    (lambda x: torch.cat([SHORT, x], 1) * LONG, (1, TEXT)),
    (lambda x: torch.cat([x, ROPE.expand(2, -1, -1)], -1), (1, 0)),
    (lambda x: torch.stack([ROPE[0], x[0]]), (0, 0)),
    (lambda x: sdpa(x, x, ROPE), (1, 0)),
    (lambda x: sdpa(x, x, x, ROPE[0, :, 0].bool()), (0, 0)),
    (lambda x: sdpa(x, SHORT, SHORT, ROPE[:, :, :1]), (1, 0)),
]


@pytest.mark.parametrize("index", range(len(MEETINGS)))
def test_a_value_that_meets_tokens_must_be_permuted_too(index: int) -> None:
    call, expected = MEETINGS[index]
    met, gm = flow_of(call, torch.randn(ALONE), Tokens(1))
    assert isinstance(met, NeedsPermutation)
    assert spelled(met.tokens) == expected
    flow = propagate(gm.graph, tokens_input(gm), Tokens(1), VIDEO)
    assert isinstance(flow, Flow)
    assert len(flow.entries) == 2


def test_a_table_is_permuted_where_all_layers_read_it() -> None:
    """Slices, casts and gates of one table, in several layers, come from one permutation."""
    table = torch.randn(1, VIDEO, 6, 4)

    def call(x: Tensor) -> Tensor:
        gates = (table.float() + torch.ones(6, 4)).unbind(2)
        for layer in range(3):
            x = x * gates[2 * layer] + gates[2 * layer + 1][..., ::1]
        return x

    flow, gm = flow_of(call, torch.randn(ALONE), Tokens(1))
    assert isinstance(flow, NeedsPermutation)
    value, tokens = origin(flow, VIDEO)
    assert value.op == "placeholder"
    assert spelled(tokens) == (1, 0)
    flow = propagate(gm.graph, tokens_input(gm), Tokens(1), VIDEO)
    assert isinstance(flow, Flow)
    assert len(flow.entries) == 2


def test_writing_into_fresh_memory_keeps_tokens() -> None:
    """As rotary embeddings do; the rest of the slices is checked against a permuted run."""

    def rotary(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        out[..., 0::2] = x[..., 1::2]
        out[..., 1::2] = -x[..., 0::2]
        out[:, :TEXT] = 0
        out[:, TEXT:] = x[:, TEXT:] * 2
        out += x
        return out

    x, tokens = torch.randn(JOINT), Tokens(1, TEXT)
    gm = capture(rotary, x)
    flow = propagate(gm.graph, tokens_input(gm), tokens, VIDEO)
    assert isinstance(flow, Flow)
    state = flow.states[result(gm)]
    assert spelled(state) == (1, TEXT)
    assert torch.equal(permuted(rotary(x), state), rotary(permuted(x, tokens)))


def assigned(x: Tensor, place: Any, value: Any) -> Tensor:
    out = torch.zeros_like(x) * x
    out[place] = value
    return out


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda x: assigned(ROPE.expand(2, -1, -1).clone(), ..., x), "tensor without"),
        (lambda x: assigned(x, (slice(None), slice(0, TEXT)), x[:, 1 : 1 + TEXT]), "cuts"),
        (lambda x: assigned(x, (slice(None), slice(2, None)), 0), "cuts the video"),
        (lambda x: assigned(x, (slice(None), 0), x[:, :, 0].sum(1)[:, None]), "single token"),
        (lambda x: torch.cumsum(x, 1, out=torch.empty_like(x)), "without a rule"),
    ],
)
def test_a_refused_write_ends_the_flow(call: Callable[[Tensor], Tensor], reason: str) -> None:
    gm = capture(call, torch.randn(ALONE))
    found = propagate(gm.graph, tokens_input(gm), Tokens(1), VIDEO)
    reasons = [found] if isinstance(found, Obstacle) else list(found.exits.values())
    assert any(reason in str(each) for each in reasons)


def test_nothing_is_written_into_what_is_copied() -> None:
    """A permuted input is a copy: who writes into the input, or a view of it, would miss it."""

    def call(x: Tensor) -> Tensor:
        y = x.transpose(1, 2)
        y += 1
        return x * 2

    gm = capture(call, torch.randn(ALONE))
    found = propagate(gm.graph, tokens_input(gm), Tokens(1), VIDEO)
    assert isinstance(found, Obstacle)
    assert "may write into a value that was permuted" in str(found)


def test_nothing_is_written_where_a_copy_is_laid_out_anew() -> None:
    """`contiguous` copies the transposed input; of its permuted copy it would return a view."""

    def call(x: Tensor) -> Tensor:
        y = x.contiguous()
        y += 1
        return x * 2

    gm = capture(call, torch.randn(ALONE).transpose(0, 2))
    found = propagate(gm.graph, tokens_input(gm), Tokens(1), VIDEO)
    assert isinstance(found, Obstacle)
    assert "may write" in str(found)
    gm = capture(lambda x: x.contiguous() * 2, torch.randn(ALONE).transpose(0, 2))
    assert isinstance(propagate(gm.graph, tokens_input(gm), Tokens(1), VIDEO), Flow)


def test_nothing_is_written_into_what_is_brought_back() -> None:
    def call(x: Tensor) -> Tensor:
        y = F.dropout(x * 2, 0.0, False)
        z = y.flatten(1).cos()
        y.mul_(3)
        return z + y.flatten(1)

    gm = capture(call, torch.randn(ALONE))
    found = propagate(gm.graph, tokens_input(gm), Tokens(1), VIDEO)
    assert isinstance(found, Obstacle)
    assert "may write" in str(found)


def test_two_orders_of_one_value_are_an_obstacle() -> None:
    """A table that meets the video, and the same one shifted by text."""

    def call(x: Tensor) -> Tensor:
        return torch.cat([SHORT, x], 1) * LONG + torch.cat([x, SHORT], 1) * LONG

    gm = capture(call, torch.randn(ALONE))
    found = propagate(gm.graph, tokens_input(gm), Tokens(1), VIDEO)
    assert isinstance(found, Obstacle)
    assert "aligns tokens with other tokens" in str(found)
