"""`compile` checks at once; whatever the public entries are given, their errors are ours."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import calibatt_compiler
from calibatt_compiler import calibration
from calibatt_compiler.api import compile as compile_with
from calibatt_compiler.errors import (
    CalibattError,
    CaptureError,
    OptionError,
    PlanError,
    PlanMismatchError,
)
from calibatt_compiler.model.families import identify
from calibatt_compiler.options import CompileOptions
from calibatt_compiler.plan import BlockPattern, Plan, Sampler, SitePatterns


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Attention()

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x + self.layer(x) * (1 + timestep.view(-1, 1, 1) / 1000)


class Pipe:
    def __init__(self, **modules: torch.nn.Module) -> None:
        self.components = {**modules, "scheduler": object()}
        for name, module in modules.items():
            setattr(self, name, module)

    def __call__(self, prompt: str = "", height: int = 8, generator: object = None) -> None: ...


MASK = torch.eye(3, dtype=torch.bool).expand(2, 2, 3, 3).clone()


def plan(model: torch.nn.Module | None = None) -> Plan:
    patterns = [BlockPattern.from_mask(step, block=(16, 16)) for step in MASK]
    return Plan.create(
        {"layer": SitePatterns.share(patterns)},
        grid=(1, 1, 48),  # that of a model whose grid can't be read
        sampler=Sampler(timesteps=(900.0, 100.0)),
        model=None if model is None else identify(model),
    )


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def masked(model: Model, x: Tensor, timestep: Tensor) -> Tensor:
    """What the plan says, by a dense mask."""
    q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in model.layer.qkv(x).chunk(3, -1))
    mask = MASK[0].repeat_interleave(16, 1).repeat_interleave(16, 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    return x + out * (1 + timestep.view(-1, 1, 1) / 1000)


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("given", ["model", "compiled", "pipe"])
def test_a_compiled_model_is_sparse(given: str, tmp_path: Path) -> None:
    model = Model().eval()
    plan(model).save(tmp_path / "p")
    if given == "pipe":
        pipe = Pipe(transformer=model)
        assert compile_with(pipe, tmp_path / "p") is pipe
        compiled: Any = pipe.transformer  # type: ignore[attr-defined]
    else:
        first = torch.compile(model) if given == "compiled" else model
        compiled = compile_with(first, str(tmp_path / "p"), lowering="table")
    x, timestep = torch.randn(1, 48, 32), torch.tensor([900.0])
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, timestep=timestep), masked(model, x, timestep))
    assert calibatt_compiler.summary(compiled).sparse_calls == 1


def test_a_pipeline_s_transformers_take_their_plans() -> None:
    high, low = Model(), Model()
    pipe = Pipe(transformer=high, transformer_2=low, vae=torch.nn.Linear(1, 1))
    compile_with(pipe, {"transformer_2": plan()})
    assert pipe.transformer is high  # type: ignore[attr-defined]
    assert pipe.transformer_2._orig_mod is low  # type: ignore[attr-defined]
    compile_with(pipe, plan(), on_mismatch="error")
    assert pipe.transformer._orig_mod is high  # type: ignore[attr-defined]
    assert pipe.transformer_2._orig_mod is low  # type: ignore[attr-defined]
    assert isinstance(pipe.vae, torch.nn.Linear)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"lowring": "table"}, OptionError, "did you mean 'lowering'"),
        ({"lowering": "tabel"}, OptionError, "unknown value"),
        ({"mode": "max-autotune"}, OptionError, "unknown option 'mode'"),
        ({"inductor": {"max_autotun": True}}, OptionError, "did you mean 'max_autotune'"),
        ({"inductor": {"max_autotune": "yes"}}, OptionError, "max_autotune"),
        ({"inductor": {"triton.cudagraph": True}}, OptionError, "triton.cudagraphs"),
        ({"inductor": 7}, OptionError, "mapping of Inductor settings"),
        ({"fullgraph": 1}, OptionError, "fullgraph"),
        ({"dynamic": "yes"}, OptionError, "dynamic"),
        ({"monitor": -1}, OptionError, "monitor"),
        ({"plan": "nowhere.calibatt"}, PlanError, "no plan file"),
        ({"plan": None}, OptionError, "needs a plan"),
        ({"plan": 7}, OptionError, "needs a plan"),
        ({"plan": {"a": plan()}}, OptionError, "one plan for one model"),
        ({"model": None}, CaptureError, "nothing to compile"),
        ({"model": Pipe()}, CaptureError, "nothing to compile"),
        ({"model": Pipe(transformer=Model()), "plan": {}}, OptionError, "no plan"),
        ({"model": Pipe(transformer=Model()), "plan": {"vae": plan()}}, OptionError, "vae"),
        ({"plan": plan(torch.nn.Linear(1, 1))}, PlanMismatchError, "another class"),
    ],
)
def test_what_is_wrong_is_said_at_once(
    arguments: dict[str, Any], error: type[CalibattError], said: str
) -> None:
    with pytest.raises(error, match=f"(?s){re.escape(said)}"):
        compile_with(**{"model": Model(), "plan": plan(), **arguments})


def test_nothing_is_replaced_if_one_plan_is_wrong() -> None:
    pipe = Pipe(transformer=Model(), transformer_2=Model())
    before = dict(pipe.__dict__)
    with pytest.raises(PlanMismatchError):
        compile_with(pipe, {"transformer": plan(), "transformer_2": plan(torch.nn.Linear(1, 1))})
    assert pipe.__dict__ == before


def test_inductor_settings_of_every_form_pass() -> None:
    for settings in ({"max_autotune": True}, {"triton.cudagraphs": False}, {"cpp.threads": 2}):
        assert CompileOptions.parse({"plan": plan(), "inductor": settings}).inductor == settings


def test_a_numpy_mask_is_called_one() -> None:
    with pytest.raises(PlanError, match=r"(?s)torch.Tensor.*numpy.ndarray of bool.*from_numpy"):
        Plan.from_masks({"a": MASK.numpy()}, (1, 6, 8), [2.0, 1.0], (16, 16))


@pytest.mark.parametrize("entry", ["calibrate", "validate", "estimate", "tune"])
def test_arguments_that_a_pipeline_does_not_take(entry: str, tmp_path: Path) -> None:
    pipe = Pipe(transformer=Model())
    more = {"validate": {"plan": plan()}, "tune": {"out": tmp_path}}.get(entry, {})
    for prompts, given in ((["a"], {"hieght": 8}), ([{"prompt": "a", "hieght": 8}], {})):
        with pytest.raises(OptionError, match=r"(?s)does not take 'hieght'.*did you mean 'height'"):
            getattr(calibration, entry)(pipe, prompts=prompts, **more, **given)


BAD: list[Any] = [
    None, 7, -1, 2.5, float("nan"), True, "x", b"x", [], {}, (), object(), [None], (1, 2),
    np.eye(3), np.ones((2, 2, 3, 3), bool), torch.eye(3), {"a": None}, {1: MASK}, {"a": [1]},
    {"a": MASK.numpy()}, 10**30, Ellipsis, lambda: 0, ("a", "b", "c"),
]  # fmt: skip


def enter(module: Any, config: Any) -> None:
    with calibatt_compiler.calibration(module, config):
        pass


def field_cases(kind: type) -> Iterator[tuple[str, Callable[..., Any], dict[str, Any]]]:
    for each in dataclasses.fields(kind):
        if each.default is not dataclasses.MISSING:
            yield f"{kind.__name__}.{each.name}", kind, {each.name: each.default}


def cases() -> list[tuple[str, Callable[..., Any], dict[str, Any]]]:
    made, pipe = plan(), Pipe(transformer=Model())
    masks = {"masks": {"a": MASK}, "grid": (1, 6, 8), "timesteps": [2.0, 1.0]}
    names = [field.name for field in dataclasses.fields(CompileOptions)]
    return [
        ("from_masks", Plan.from_masks, {**masks, "block": (16, 16), "lengths": None}),
        ("load", Plan.load, {"path": "nowhere"}),
        (
            "from_mask",
            BlockPattern.from_mask,
            {
                "mask": MASK[0], "query_length": 48, "key_length": 48, "block": (16, 16),
                "weight": None, "pooled": 0, "repetitive": None, "copies": None,
            },
        ),
        ("dense", BlockPattern.dense,
         {"heads": 1, "query_length": 48, "key_length": 48, "block": (16, 16)}),
        ("density", made.density, {"site": "layer", "step": 0}),
        ("block_mask", made.block_mask, {"site": "layer", "step": 0}),
        ("step_of", made.step_of, {"timestep": 1.0}),
        ("parse", CompileOptions.parse, {"options": {"plan": made}, "mode": None}),
        *(
            (f"option {name}",
             lambda _name=name, **value: CompileOptions.parse({"plan": made, **value}), {name: 0})
            for name in names
        ),
        ("compile", compile_with,
         {"model": Model(), "plan": made, "fullgraph": False, "dynamic": None}),
        ("calibration", enter, {"module": Model(), "config": None}),
        ("calibrate", calibration.calibrate,
         {"pipe": object(), "prompts": ["a"], "seeds": 0, "out": None, "config": None}),
        ("validate", calibration.validate,
         {"pipe": object(), "plan": made, "prompts": ["a"], "seeds": 0, "margin": 0.1,
          "config": None}),
        ("estimate", calibration.estimate,
         {"pipe": object(), "prompts": ["a"], "seeds": 0, "out": None, "config": None}),
        ("plan_from_run", calibration.plan_from_run, {"folder": "nowhere"}),
        ("validate_run", calibration.validate_run, {"folder": "nowhere", "plan": made}),
        ("summary", calibatt_compiler.summary, {"compiled": pipe}),
        *field_cases(calibration.CalibrationConfig),
        *field_cases(calibration.TuningConfig),
    ]  # fmt: skip


@pytest.mark.parametrize("case", cases(), ids=lambda case: case[0])
def test_arguments_of_any_type_are_taken_or_refused_by_us(
    case: tuple[str, Callable[..., Any], dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    _, entry, good = case
    for name in good:
        for value in BAD:
            try:
                entry(**{**good, name: value})
            except CalibattError:
                pass
            except Exception as error:
                raise AssertionError(f"{name}={value!r}: {type(error).__name__}") from error
