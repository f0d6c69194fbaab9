"""What is not served is said: once, with its likely cause, and never as a mismatch that is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from way_models import GRID, OTHER, error, inputs, masked, model, plan_of

import calibatt_compiler
from calibatt_compiler.errors import KernelError, PlanMismatchError
from calibatt_compiler.runtime.ops import TAGS


@pytest.fixture(autouse=True)
def _without_inductor(monkeypatch: Any) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(
        "calibatt_compiler.backend._inductor", lambda gm, example, settings: gm.forward
    )


def whole(m: Any, **options: Any) -> Any:
    return torch.compile(m, backend="calibatt", options={"plan": plan_of(), **options})


def with_masks(m: Any) -> Any:
    """Give each self-attention a mask that hides nothing."""
    for block in m.blocks:
        processor = block.attn1.processor

        def attend(attn: Any, x: Any, context: Any, mask: Any, rotary: Any, own: Any = processor):
            return own(attn, x, context, x.new_zeros(1, 1, x.shape[1], x.shape[1]), rotary)

        block.attn1.processor = attend
    return m


@torch.no_grad()
def test_what_ran_eagerly_is_summed_up_with_its_cause():
    compiled = whole(model())
    with torch.compiler.set_stance("force_eager"):
        compiled(**inputs(GRID, 900.0))
        found = calibatt_compiler.summary(compiled)
        assert "force_eager" in str(found)
    found = calibatt_compiler.summary(compiled)
    assert "ran without calibatt" in found.eager
    assert found.to_dict()["eager"] == found.eager
    compiled(**inputs(GRID, 900.0))
    assert calibatt_compiler.summary(compiled).eager is None


@torch.no_grad()
@pytest.mark.parametrize("grids", [(GRID, OTHER), (OTHER, GRID)])
def test_a_recompile_limit_that_is_reached_is_named(grids):
    eager, compiled = model(), whole(model())
    with torch._dynamo.config.patch(recompile_limit=1):
        for grid in grids:
            compiled(**inputs(grid, 900.0))
        given = inputs(grids[1], 500.0)
        assert error(compiled(**given)[0], eager(**given)[0]) < 1e-5
        found = calibatt_compiler.summary(compiled)
        assert "recompile_limit (1)" in found.eager
        assert "WanTransformer3DModel" in str(found)


@torch.no_grad()
@pytest.mark.parametrize("way", ["whole", "blocks"])
def test_a_mask_is_no_mismatch_and_is_said_once(way, caplog):
    eager, m = model(), with_masks(model())
    options = {"plan": plan_of(), "on_mismatch": "error"}
    if way == "whole":
        compiled = torch.compile(m, backend="calibatt", options=options)
    else:
        compiled = m
        m.compile_repeated_blocks(backend="calibatt", options=options)
    given = inputs(GRID, 900.0)
    assert error(compiled(**given)[0], eager(**given)[0]) < 1e-5
    skipped = calibatt_compiler.summary(compiled).skipped
    assert skipped["masked: an additive bias over pairs of tokens"] == 2
    assert sum("masked" in message for message in caplog.messages) == 1
    if way == "whole":
        with pytest.raises(PlanMismatchError):
            compiled(**inputs(OTHER, 900.0))


@torch.no_grad()
def test_a_device_without_a_kernel_is_no_mismatch(monkeypatch):
    def none(*args: Any, **settings: Any) -> Any:
        raise KernelError("none for this GPU", expected="another", got="this", remedy="take it")

    monkeypatch.setattr("calibatt_compiler.binding.plan_sites.SparseSite", none)
    eager, compiled = model(), whole(model(), on_mismatch="error")
    given = inputs(GRID, 900.0)
    assert error(compiled(**given)[0], eager(**given)[0]) < 1e-5
    assert calibatt_compiler.summary(compiled).skipped["no kernel: none for this GPU"] == 2


@torch.no_grad()
def test_another_size_is_said_once_for_all_sites_and_graphs(caplog):
    m = model(3)
    compiled = torch.compile(m, backend="calibatt", options={"plan": plan_of(3)}, dynamic=False)
    for prompts in (6, 7):  # a graph each
        given = inputs(OTHER, 900.0)
        given["encoder_hidden_states"] = torch.randn(1, prompts, 16)
        compiled(**given)
    assert calibatt_compiler.summary(compiled).graphs == 2
    assert sum("another size" in message for message in caplog.messages) == 1


@torch.no_grad()
def test_steps_that_are_not_the_plans_are_said_once_for_all_graphs(caplog):
    compiled = torch.compile(
        model(1), backend="calibatt", options={"plan": plan_of(1)}, dynamic=False
    )
    for prompts in (6, 7):
        given = inputs(GRID, 700.0)
        given["encoder_hidden_states"] = torch.randn(1, prompts, 16)
        compiled(**given)
    assert sum("the sampler's timesteps" in message for message in caplog.messages) == 1


@torch.no_grad()
def test_parts_without_a_planned_call_are_warned_of_once(caplog):
    """Attention that no compiler sees: the model's own frame is over, and none was captured."""
    m = model()
    for block in m.blocks:
        block.attn1.forward = torch.compiler.disable(block.attn1.forward)
    m.compile_repeated_blocks(backend="calibatt", options={"plan": plan_of()})
    compiled = whole(m)
    eager, given = model(), inputs(GRID, 900.0)
    for _ in range(2):
        assert error(compiled(**given)[0], eager(**given)[0]) < 1e-5
    found = calibatt_compiler.summary(m)
    assert not found.sparse_calls
    assert "none of the plan's sites was captured" in found.eager
    assert sum("none of the plan's" in message for message in caplog.messages) == 1


@torch.no_grad()
def test_an_exported_model_is_the_dense_one():
    eager, compiled = model(), whole(model())
    given = inputs(GRID, 900.0)
    program = torch.export.export(compiled, (), given)
    assert error(program.module()(**given)[0], eager(**given)[0]) < 1e-6
    assert error(compiled(**given)[0], masked(eager, plan_of(), given)) < 1e-5


def test_cuda_graphs_leave_out_what_runs_python():
    """They would replay the kernels of the step in which they were captured."""
    assert torch.Tag.cudagraph_unsafe in TAGS
    ours = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("calibatt::")]
    assert len(ours) >= 6
    for name in ours:
        op = getattr(torch.ops.calibatt, name.removeprefix("calibatt::"))
        assert torch.Tag.cudagraph_unsafe in op.default.tags


class Adapter(torch.nn.Module):
    """What a LoRA layer is to the compiler: a wrapped layer, a scale that is a plain number."""

    def __init__(self, base: torch.nn.Linear, rank: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(rank)
        self.base, self.scale, self.enabled = base, 0.5, True
        self.down = torch.randn(rank, base.in_features, generator=generator) * 0.1
        self.up = torch.randn(base.out_features, rank, generator=generator) * 0.1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.base(x)
        if self.enabled:
            out = out + (x @ self.down.T @ self.up.T) * self.scale
        return out

    def fuse(self, sign: float = 1.0) -> None:
        self.base.weight += sign * self.scale * self.up @ self.down
        self.enabled = sign < 0


@torch.no_grad()
def test_adapters_that_change_between_calls_stay_sparse_and_right():
    eager, m = model(1), model(1)
    m.compile_repeated_blocks(backend="calibatt", options={"plan": plan_of(1)})
    attentions = [each.blocks[0].attn1 for each in (eager, m)]
    queries = [attention.to_q for attention in attentions]
    given, before = inputs(GRID, 500.0), 0

    def each(change: Any) -> None:
        for attention in attentions:
            change(attention)

    def rank(size: int) -> Any:
        return lambda a: setattr(a, "to_q", Adapter(queries[attentions.index(a)], size))

    changes = [
        *(rank(size) for size in range(1, 11)),  # more than the eight that Dynamo allows
        *(lambda a, s=s: setattr(a.to_q, "scale", s) for s in (0.1, 0.7, 1.3)),
        lambda a: setattr(a.to_q, "enabled", False),
        lambda a: setattr(a.to_q, "enabled", True),
        lambda a: a.to_q.fuse(),
        lambda a: a.to_q.fuse(-1.0),
    ]
    for change in changes:
        each(change)
        expected = masked(eager, plan_of(1), given)
        assert error(m(**given)[0], expected) < 1e-5
        found = calibatt_compiler.summary(m)
        assert found.sparse_calls == before + 1
        before = found.sparse_calls


@torch.no_grad()
def test_adapters_of_peft_stay_sparse_and_right():
    peft = pytest.importorskip("peft")
    eager, m = model(1), model(1)
    m.compile_repeated_blocks(backend="calibatt", options={"plan": plan_of(1)})
    given, before = inputs(GRID, 500.0), 0

    def add(each: Any) -> None:
        for rank, name in enumerate(("one", "two"), start=1):
            torch.manual_seed(rank)
            lora = peft.LoraConfig(r=rank, target_modules=["to_q"], init_lora_weights=False)
            each.add_adapter(lora, adapter_name=name)
        each.requires_grad_(False)

    for change in (
        add,
        lambda each: each.set_adapters("two", 0.3),
        lambda each: each.set_adapters(["one", "two"], [0.7, 0.2]),
        lambda each: each.disable_adapters(),
        lambda each: each.enable_adapters(),
        lambda each: each.fuse_lora(),
        lambda each: each.unfuse_lora(),
    ):
        for each in (eager, m):
            change(each)
        assert error(m(**given)[0], masked(eager, plan_of(1), given)) < 1e-5
        sparse = calibatt_compiler.summary(m).sparse_calls
        assert sparse == before + 1
        before = sparse
