"""Compiled models with gradients: those of the model under the plan's masks, expanded to tokens."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import calibatt_compiler
from calibatt_compiler import CalibrationConfig, calibration
from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.request import KernelSettings
from calibatt_compiler.plan import AnchorRows, BlockPattern, Plan, Sampler, SitePatterns
from calibatt_compiler.plan.order import TokenOrder
from calibatt_compiler.plan.text import fit_pattern
from calibatt_compiler.runtime.site import SparseSite


def compiled_with(case: Any, model: torch.nn.Module | None = None, **options: Any) -> Any:
    options = {"plan": case.plan, "lowering": "reference", **options}
    model = case.model if model is None else model
    return torch.compile(model, backend="calibatt", fullgraph=True, options=options)


def trained(case: Any) -> Any:
    case.model.requires_grad_(True)
    return replace(case, inputs={**case.inputs})


def loss(out: torch.Tensor) -> torch.Tensor:
    return (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum()


def gradients(model: torch.nn.Module, call: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of all parameters, after one call and one backward pass."""
    model.zero_grad()
    loss(call()).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def same(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 1e-5) -> None:
    assert len(found) == len(expected) > 10
    most = max(want.norm() for want in expected)
    for got, want in zip(found, expected, strict=True):
        # Some are zero but for rounding: a bias of keys changes nothing.
        assert (got - want).norm() <= tolerance * want.norm() + 1e-6 * most


def check(case: Any, timestep: float = 500.0, **options: Any) -> Any:
    case = trained(case)
    expected = gradients(case.model, lambda: case.expanded(timestep))
    compiled = compiled_with(case, **options)
    found = gradients(case.model, lambda: compiled(**case.arguments(timestep))[0])
    same(found, expected)
    dense = gradients(case.model, lambda: case.dense(timestep))
    assert any((x - y).norm() > 0.02 * y.norm() for x, y in zip(dense, expected, strict=True))
    return compiled


@pytest.mark.slow
@pytest.mark.inductor
def test_gradients_through_inductor(wan: Any) -> None:
    compiled = check(wan, lowering="baked")
    assert calibatt_compiler.summary(compiled).sparse_calls == 2


@pytest.mark.slow
@pytest.mark.inductor
def test_gradient_checkpointing_through_inductor(wan: Any) -> None:
    case = trained(wan)
    case.model.train()
    expected = gradients(case.model, lambda: case.expanded(500.0))
    case.model.enable_gradient_checkpointing()
    compiled = compiled_with(case)
    found = gradients(case.model, lambda: compiled(**case.arguments(500.0))[0])
    same(found, expected)
    # Blocks run forward again in the backward pass, when the compiled graph has returned.
    assert calibatt_compiler.summary(compiled).sparse_calls == 4


@pytest.mark.slow
def test_one_process_with_and_without_gradients(wan: Any) -> None:
    case = trained(wan)
    compiled, expected = compiled_with(case), case.expanded(500.0).detach()
    modes = (torch.enable_grad, torch.no_grad, torch.inference_mode, torch.enable_grad)
    for mode in modes:
        with mode():
            got = compiled(**case.arguments(500.0))[0]
        assert torch.allclose(got.detach().clone(), expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.inductor
def test_the_input_has_a_gradient_and_a_backward_pass_may_run_twice(wan: Any) -> None:
    """With frozen weights, as guidance by gradients does."""
    compiled = compiled_with(wan)
    video = wan.inputs["hidden_states"].requires_grad_()
    (expected,) = torch.autograd.grad(loss(wan.expanded(500.0)), video)
    total = loss(compiled(**wan.arguments(500.0))[0])
    for keep in (True, False):
        (found,) = torch.autograd.grad(total, video, retain_graph=keep)
        assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.slow
@pytest.mark.inductor
def test_backward_passes_find_their_own_models(wan: Any) -> None:
    """Two models with sites of one name; the passes end in other threads, one without its model."""
    first = trained(wan)
    other = Plan.from_masks(
        {name: masks_of(first.plan, name).flip(2) | eye() for name in first.sites},
        first.plan.grid,
        first.plan.timesteps,
        (32, 32),
    )
    second = replace(first, plan=other, model=copy.deepcopy(first.model))
    cases = (first, second)
    expected = [gradients(case.model, lambda c=case: c.expanded(500.0)) for case in cases]
    compiled = [compiled_with(case) for case in cases]
    totals = [
        loss(run(**case.arguments(500.0))[0]) for run, case in zip(compiled, cases, strict=True)
    ]
    del compiled
    gc.collect()
    for case, total, want in zip(cases, totals, expected, strict=True):
        case.model.zero_grad()
        thread = threading.Thread(target=total.backward)
        thread.start()
        thread.join()
        same([p.grad for p in case.model.parameters() if p.grad is not None], want)


def masks_of(plan: Plan, name: str) -> torch.Tensor:
    return torch.stack([plan.block_mask(name, step) for step in range(plan.steps)])


def eye() -> torch.Tensor:
    return torch.eye(6, dtype=torch.bool)


@pytest.mark.parametrize("order", ["2x4x4", "2x4xall"])
def test_gradients_in_a_token_order(case: Any, order: str) -> None:
    joint = "CogVideoX" in type(case.model).__name__
    plan = Plan.create(
        case.plan.sites,
        grid=case.plan.grid,
        sampler=case.plan.metadata.sampler,
        token_order=TokenOrder.parse(order),
        text_policy="dense_first" if joint else "none",
    )
    check(replace(case, plan=plan), timestep=900.0)


def test_gradients_of_a_timestep_out_of_range_are_dense(wan: Any) -> None:
    case = trained(wan)
    expected = gradients(case.model, lambda: case.dense(5000.0))
    compiled = compiled_with(case)
    same(gradients(case.model, lambda: compiled(**case.arguments(5000.0))[0]), expected)


def test_a_compiled_model_under_a_checkpoint(wan: Any) -> None:
    case = trained(wan)
    expected = gradients(case.model, lambda: case.expanded(500.0))
    compiled = compiled_with(case)

    def call() -> torch.Tensor:
        return checkpoint(lambda: compiled(**case.arguments(500.0))[0], use_reentrant=False)

    same(gradients(case.model, call), expected)


def test_a_second_derivative_is_refused_by_name(wan: Any) -> None:
    compiled = compiled_with(wan)
    video = wan.inputs["hidden_states"].requires_grad_()
    out = compiled(**wan.arguments(500.0))[0]
    (first,) = torch.autograd.grad(out.square().sum(), video, create_graph=True)
    with pytest.raises(KernelError, match="differentiated twice"):
        first.sum().backward()


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("inductor", [True, False])
def test_a_model_is_calibrated_where_gradients_are_recorded(wan: Any, inductor: bool) -> None:
    case = trained(wan)
    config = CalibrationConfig(block=(32, 32), progress=False, inductor=inductor)
    expected = gradients(case.model, lambda: case.dense(500.0))
    with calibration(case.model, config) as run:
        with run.input(), torch.enable_grad():
            for timestep in (900.0, 500.0):
                found = gradients(case.model, lambda t=timestep: case.model(**case.arguments(t))[0])
        assert set(run.plan().sites) == set(case.sites)
    same(found, expected)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("text", [6, 19])
def test_a_site_with_text_token_order_and_copied_rows(
    attend: Any, text: int, ordered: bool
) -> None:
    grid, order, length = (2, 5, 7), TokenOrder.parse("2x2x3"), 70 + 6
    mask = torch.rand(2, 5, 5, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[..., 0] = mask[:, 0] = True  # the text's blocks
    pattern = BlockPattern.from_mask(
        mask | torch.eye(5, dtype=torch.bool),
        query_length=length,
        key_length=length,
        block=(16, 16),
        repetitive=np.array([False, True]),
        copies=AnchorRows(grid, 2, 6, order),
    )
    plan = Plan.create(
        {"a": SitePatterns.share([pattern])},
        grid=grid,
        sampler=Sampler(timesteps=(900.0,)),
        token_order=order,
        text_policy="dense_first",
    )
    where: Any = {"device": torch.device("cpu"), "dtype": torch.float64, "head_dim": 8}
    site = SparseSite(plan, "a", KernelSettings(lowering="reference", **where))
    q, k, v = (torch.randn(1, 70 + text, 2, 8).double().transpose(1, 2) for _ in range(3))
    served = fit_pattern(pattern, (70 + text,) * 2, video=70, position="first")
    found = order.tokens(grid, length=70 + text, first=text)
    assert found is not None
    tokens = torch.from_numpy(found)
    grad = torch.randn_like(q)
    with torch.enable_grad():
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        want = torch.autograd.grad(attend(served, plan, *inputs), inputs, grad)
    operands = [x[:, :, tokens] if ordered else x for x in (grad, q, k, v)]
    for got, expected in zip(
        site.gradients(*operands, 900.0, 8**-0.5, ordered=ordered), want, strict=True
    ):
        assert torch.allclose(got, expected[:, :, tokens] if ordered else expected, atol=1e-12)
