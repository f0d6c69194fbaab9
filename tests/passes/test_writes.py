"""What a node writes into, what shares memory, and what a flow of permuted tokens makes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import checkpoint

from calibatt_compiler.passes.graph import drop_unread, finish
from calibatt_compiler.passes.token_order.axis import Obstacle, Tokens
from calibatt_compiler.passes.token_order.flow import propagate
from calibatt_compiler.passes.token_order.rules import RULES
from calibatt_compiler.passes.writes import memory, written

VIDEO = 5
X = torch.randn(2, VIDEO, 4)


@torch.library.custom_op("calibatt_test::fills", mutates_args=("x",))
def fills(x: Tensor) -> Tensor:
    return x.fill_(1) + 1


@fills.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def capture(call: Callable[..., Any], *inputs: Tensor) -> GraphModule:
    graphs: list[GraphModule] = []

    def backend(gm: GraphModule, _: list[Any]) -> Any:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(call, backend=backend, fullgraph=True, dynamic=False)(*inputs)
    (gm,) = graphs
    return gm


def doubled(x: Tensor) -> Tensor:
    return x.mul_(2) + 1


WRITES: list[tuple[Callable[..., Any], str]] = [
    (lambda x, y: x.mul_(2), "x"),
    (lambda x, y: x.__iadd__(y), "x"),
    (lambda x, y: x.__setitem__(0, y[0]), "x"),
    (lambda x, y: x.view(-1).add_(1), "x"),
    (lambda x, y: F.leaky_relu(x, 0.1, True), "x"),
    (lambda x, y: F.silu(x, inplace=True), "x"),
    (lambda x, y: F.dropout(x, 0.3, True, True), "x"),
    (lambda x, y: F.dropout(x, 0.3, False).relu_(), "x"),
    (lambda x, y: F.dropout1d(x, 0.3, False).relu_(), "x"),
    (lambda x, y: torch.mul(x, 2, out=y), "y"),
    (lambda x, y: torch._foreach_mul_([x, y], 2), "xy"),
    (lambda x, y: torch.ops.aten.add_.Tensor(x, y) * 2, "xy"),
    (lambda x, y: torch.ops.calibatt_test.fills(x) + y, "x"),
    (lambda x, y: F.batch_norm(x, y[0, :, 0], y[1, :, 1], training=True), "xy"),
    (lambda x, y: torch.func.vmap(lambda a: a.mul_(2))(x), "x"),
    (lambda x, y: F.silu(x) * x.relu() + F.dropout(y, 0.3, True) @ (x.mT @ y), ""),
    (lambda x, y: x.cumsum(1) + F.leaky_relu(y, 0.1, False), ""),
    (lambda x, y: ((x > 0) & (y > 0)) | ((x < 0) & (y < 0)), ""),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(WRITES)))
def test_writes(index: int) -> None:
    call, names = WRITES[index]
    gm = capture(call, torch.randn(2, 5, 4), torch.randn(2, 5, 4))
    inputs = {memory(n): str(n.target)[2] for n in gm.graph.find_nodes(op="placeholder")}
    found = {memory(target) for node in gm.graph.nodes for target in written(node, RULES)}
    assert "".join(sorted(inputs[each] for each in found)) == names


def test_writes_in_a_subgraph() -> None:
    def of(call: Callable[[Tensor], Tensor]) -> list[Node]:
        gm = capture(lambda x: checkpoint(call, x * 2, use_reentrant=False), X)
        (node,) = (n for n in gm.graph.nodes if "checkpoint" in str(n.target))
        return written(node)

    assert of(doubled)
    assert not of(lambda x: x * 2 + 1)


REFUSED: list[Callable[[Tensor], Any]] = [
    lambda x: torch.sum(x * 2, -1, out=torch.empty(2, VIDEO))[:1] + 1,
    lambda x: torch.cat([x * 2, x], -1, out=torch.empty(2, VIDEO, 8)),
    lambda x: torch.max(x * 2, 1, out=(torch.empty(2, 4), torch.empty(2, 4, dtype=torch.long))),
    lambda x: torch.zeros(2, VIDEO, 4).copy_(x),
    lambda x: torch._foreach_mul_([x * 2, x * 3], 2),
    lambda x: checkpoint(doubled, x * 2, use_reentrant=False),
    lambda x: torch.func.vmap(lambda a: a.mul_(2))(x * 2),
    lambda x: (y := x * 2, y.transpose(1, 2)),
    lambda x: x.transpose(1, 2),
]


@pytest.mark.parametrize("index", range(len(REFUSED)))
def test_a_flow_ends_where_permuted_tokens_may_be_lost_in_memory(index: int) -> None:
    gm = capture(REFUSED[index], X.clone())
    entry = gm.graph.find_nodes(op="placeholder")[0]
    assert isinstance(propagate(gm.graph, entry, Tokens(1), VIDEO), Obstacle)


def test_finishing_erases_nothing_but_what_the_pass_made() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    graph.call_method("mul_", (x, 2))
    graph.call_function(torch.rand, (3,))
    first = graph.call_function(torch.neg, (x,))
    made = [first, graph.call_function(torch.exp, (first,)), graph.call_function(torch.sin, (x,))]
    graph.output(made[-1])
    finish(GraphModule(torch.nn.Module(), graph), made)
    assert [node.name for node in graph.nodes] == ["x", "mul_", "rand", "sin", "output"]
    assert drop_unread(made[-1:]) == made[-1:]
