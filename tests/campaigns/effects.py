"""Random modules with effects around attention, compiled with plans, against an eager run.

A *program* is a list of statements: in-place operators on values, their views and the input,
`out=`, item assignment, buffers, random numbers, autocast, assertions, vmap, checkpointing, and
attention in between. It is run eagerly with the plan's masks expanded to tokens, and compiled;
outputs, the input, buffers and the state of the random generator must be equal afterwards, on a
second call too.

`make campaign` runs this for as many minutes as are chosen; `tests/backend/test_effects.py` draws a
few programs of it.
"""

from __future__ import annotations

import argparse
import logging
import math
import random
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import calibatt_compiler
from calibatt_compiler.kernels.reference import masked_dense_attention
from calibatt_compiler.plan import Plan
from calibatt_compiler.plan.order import TokenOrder

GRID, VIDEO, CHANNELS, HEADS, BLOCK = (2, 5, 7), 70, 8, 2, (16, 16)
TIMESTEPS = (900.0, 500.0, 100.0)


@dataclass(frozen=True)
class Program:
    """What is run.

    Attributes:
        statements: names in `STATEMENTS`, in order.
        plan: "none" (of its sites), "some", "all", "full" (all, with every block kept).
        order: name of the plan's token order.
        alias: whether the first value is a view of the input.
        seed: of weights, masks and inputs.
    """

    statements: tuple[str, ...]
    plan: str = "all"
    order: str = "raster"
    alias: bool = False
    seed: int = 0

    @property
    def low(self) -> bool:
        """Whether something is computed in bfloat16."""
        return any("autocast" in name for name in self.statements)


@dataclass
class Values:
    """What statements read and write."""

    x: Tensor
    video: Tensor
    kept: list[Tensor] = field(default_factory=list)


class Attention(nn.Module):
    """Self-attention over (B, S, C); by `oracle`, if it is set, else by the stock operator."""

    oracle: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS)

    def operands(self, x: Tensor) -> tuple[Tensor, ...]:
        x = F.layer_norm(x, (CHANNELS,))
        return self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        serve = F.scaled_dot_product_attention if self.oracle is None else self.oracle
        return serve(q, k, v)

    def forward(self, x: Tensor, kind: str = "plain") -> Tensor:
        q, k, v = self.operands(x)
        if kind == "before":
            q.transpose(1, 2)[:, 3].mul_(2)
            k[..., 0] = v[..., 1]
        if kind == "dense":
            q, k, v = (each.contiguous() for each in (q, k, v))
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast_alone"):
            out = self.attend(q, k, v)
        if kind == "after":
            v.zero_()
            q.add_(1)
            return out.transpose(1, 2).flatten(2) + q.transpose(1, 2).flatten(2)
        if kind == "inplace":
            out.transpose(1, 2)[:, 1].mul_(2)
            out += 0.1
        if kind == "dense":  # the stock operator's output can be viewed so, and shares memory
            out.view(x.shape[0], -1).mul_(0.5)
        return out.transpose(1, 2).flatten(2).float()


class Model(nn.Module):
    """Runs a program."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        calls = sum(name.startswith("attend") for name in program.statements)
        self.layers = nn.ModuleList(Attention() for _ in range(calls))
        self.linear = nn.Linear(CHANNELS, CHANNELS)
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("cache", torch.zeros(1, VIDEO, CHANNELS))
        self.register_buffer("table", torch.randn(VIDEO, CHANNELS))
        self.register_buffer("mean", torch.zeros(VIDEO))
        self.register_buffer("variance", torch.ones(VIDEO))

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        x = hidden_states.flatten(2).transpose(1, 2)
        time = 0.001 * timestep.reshape(-1, 1, 1)
        if not self.program.alias:
            x = x + time
        values, layers = Values(x, hidden_states), iter(self.layers)
        for name in self.program.statements:
            if name.startswith("attend"):
                values.x = values.x + STATEMENTS[name](self, values, next(layers))
            else:
                STATEMENTS[name](self, values)
        x = (values.x + time).transpose(1, 2).unflatten(2, GRID)
        return (x, *(kept + 1 for kept in values.kept))


Statement = Callable[..., Any]
STATEMENTS: dict[str, Statement] = {}


def statement(function: Statement) -> Statement:
    """List a statement by its name."""
    STATEMENTS[function.__name__] = function
    return function


for _kind in ("plain", "before", "after", "inplace", "dense", "autocast_alone"):
    STATEMENTS[f"attend_{_kind}"] = lambda m, s, layer, kind=_kind: layer(s.x, kind)


@statement
def attend_checkpointed(m: Model, s: Values, layer: Attention) -> Tensor:
    return checkpoint(layer, s.x, use_reentrant=False)


@statement
def attend_autocast(m: Model, s: Values, layer: Attention) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return layer(s.x).float()


@statement
def attend_no_grad(m: Model, s: Values, layer: Attention) -> Tensor:
    with torch.no_grad():
        return layer(s.x)


@statement
def attend_vmap(m: Model, s: Values, layer: Attention) -> Tensor:
    q, k, v = layer.operands(s.x)
    return torch.func.vmap(F.scaled_dot_product_attention)(q, k, v).transpose(1, 2).flatten(2)


@statement
def attend_masked(m: Model, s: Values, layer: Attention) -> Tensor:
    near = (m.table[:, 0] - m.table[:, None, 0]).abs() < 3
    q, k, v = layer.operands(s.x)
    return F.scaled_dot_product_attention(q, k, v, near).transpose(1, 2).flatten(2)


@statement
def scale(m: Model, s: Values) -> None:
    s.x.mul_(0.5)


@statement
def view_write(m: Model, s: Values) -> None:
    s.x.unflatten(-1, (2, -1))[..., 0].add_(0.5)


@statement
def keep_view(m: Model, s: Values) -> None:
    s.kept.append(s.x.transpose(1, 2))


@statement
def write_kept(m: Model, s: Values) -> None:
    if s.kept:
        s.kept[-1].mul_(2)


@statement
def detached_write(m: Model, s: Values) -> None:
    s.x.detach()[:, :, 1].neg_()


@statement
def set_channels(m: Model, s: Values) -> None:
    s.x[..., 1:3] = s.x[..., 3:5].clone()


@statement
def set_token(m: Model, s: Values) -> None:
    s.x[:, 3] = 1.5


@statement
def set_table(m: Model, s: Values) -> None:
    s.x[..., 0] = m.table[:, 0]


@statement
def set_halves(m: Model, s: Values) -> None:
    out = torch.empty_like(s.x)
    out[..., 0::2] = s.x[..., 1::2]
    out[..., 1::2] = -s.x[..., 0::2]
    s.x = out


@statement
def copy_tokens(m: Model, s: Values) -> None:
    out = torch.zeros_like(s.x)
    out[:, : VIDEO // 2].copy_(s.x[:, VIDEO // 2 :])
    s.x = s.x + out


@statement
def out_mul(m: Model, s: Values) -> None:
    out = torch.empty(s.x.shape)
    torch.mul(s.x, 0.7, out=out)
    s.x = out


@statement
def out_table(m: Model, s: Values) -> None:
    out = torch.empty(s.x.shape)
    torch.add(s.x, m.table, out=out)
    s.x = out * 0.7


@statement
def out_sum(m: Model, s: Values) -> None:
    out = torch.empty(s.x.shape[:2])
    torch.sum(s.x, -1, out=out)
    s.x = s.x + 0.3 * out[..., None]


@statement
def out_max(m: Model, s: Values) -> None:
    out, places = torch.empty(s.x.shape[:2]), torch.empty(s.x.shape[:2], dtype=torch.long)
    torch.max(s.x, -1, out=(out, places))
    s.x = s.x + 0.3 * out[..., None]


@statement
def foreach(m: Model, s: Values) -> None:
    other = s.x.flip(1)
    torch._foreach_mul_([other, s.x], 0.8)
    s.x = s.x + 0.3 * other


@statement
def leaky(m: Model, s: Values) -> None:
    F.leaky_relu(s.x, 0.1, True)


@statement
def turned(m: Model, s: Values) -> None:
    out = s.x.clone()
    out.transpose_(1, 2)
    s.x = s.x + 0.3 * out.transpose(1, 2).cos()


@statement
def count(m: Model, s: Values) -> None:
    m.count.add_(1)
    s.x = s.x * (1 + 0.1 * m.count)


@statement
def fill_cache(m: Model, s: Values) -> None:
    m.cache.copy_(s.x[:1].detach())


@statement
def set_cache(m: Model, s: Values) -> None:
    m.cache[:, :, 1] = s.x[:1, :, 2].detach()


@statement
def read_cache(m: Model, s: Values) -> None:
    s.x = s.x + 0.3 * m.cache


@statement
def batch_norm(m: Model, s: Values) -> None:
    s.x = F.batch_norm(s.x, m.mean, m.variance, training=True) + 0.3 * m.mean[:, None]


# Random numbers of a shape: Inductor, also the stock one, draws those like a tensor in the order of
# the layout that it chose.


@statement
def noise(m: Model, s: Values) -> None:
    s.x = s.x + 0.3 * torch.randn(s.x.shape)


@statement
def noise_inplace(m: Model, s: Values) -> None:
    s.x = s.x + 0.3 * torch.empty(s.x.shape).normal_()


@statement
def unused_noise(m: Model, s: Values) -> None:
    torch.rand(3)


@statement
def dropout(m: Model, s: Values) -> None:
    s.x = s.x * F.dropout(torch.ones(s.x.shape), 0.3, True)


@statement
def autocast(m: Model, s: Values) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            y = m.linear(s.x)
        y = m.linear(y)
    s.x = s.x + y.float()


@statement
def no_grad_write(m: Model, s: Values) -> None:
    with torch.no_grad():
        s.x.add_(0.2)


@statement
def checks(m: Model, s: Values) -> None:
    torch._assert_async((s.x.abs() < 1e9).all())
    torch._check(s.x.shape[1] == VIDEO)


@statement
def vmapped(m: Model, s: Values) -> None:
    s.x = torch.func.vmap(lambda a: a * a.sum(-1, keepdim=True).sigmoid())(s.x)


@statement
def vmapped_write(m: Model, s: Values) -> None:
    torch.func.vmap(lambda a: a.mul_(0.6))(s.x)


@statement
def vmapped_tokens(m: Model, s: Values) -> None:
    s.x = torch.func.vmap(lambda a: a + a.mean(-1, keepdim=True), in_dims=1, out_dims=1)(s.x)


@statement
def graded(m: Model, s: Values) -> None:
    s.x = s.x + torch.func.grad(lambda a: a.sin().sum())(s.x.detach())


@statement
def write_input(m: Model, s: Values) -> None:
    s.video.add_(0.4)


@statement
def neighbours(m: Model, s: Values) -> None:
    s.x = s.x + F.avg_pool1d(s.x.transpose(1, 2), 3, 1, 1).transpose(1, 2)


FLOWING = [
    "attend_autocast", "attend_autocast_alone", "attend_no_grad", "attend_plain", "autocast",
    "count", "dropout", "keep_view", "no_grad_write", "noise", "noise_inplace", "read_cache",
    "scale", "set_channels", "set_halves", "set_table", "unused_noise", "view_write", "write_kept",
]  # fmt: skip
"""Statements that tokens may pass in the plan's order."""


def plan_of(program: Program, names: list[str]) -> Plan:
    """Make a plan that serves the chosen sites."""
    if program.plan == "none" or not names:
        return Plan.from_masks(
            {"elsewhere": torch.ones(1, 1, 1, 1, dtype=torch.bool)}, (1, 1, 4), [1.0], BLOCK
        )
    generator = torch.Generator().manual_seed(program.seed)
    blocks = math.ceil(VIDEO / BLOCK[0])
    masks = {}
    for name in names if program.plan != "some" else names[::2]:
        mask = torch.rand(len(TIMESTEPS), HEADS, blocks, blocks, generator=generator) < 0.4
        masks[name] = mask | torch.eye(blocks, dtype=torch.bool) | (program.plan == "full")
    plan = Plan.from_masks(masks, GRID, TIMESTEPS, BLOCK)
    metadata = plan.metadata.model_copy(update={"token_order": program.order})
    return Plan(metadata, plan.sites)


def set_oracle(model: Model, plan: Plan, timestep: float) -> None:
    """Let the layers attend under the plan's masks, in its token order, expanded to tokens."""
    step = plan.step_of(timestep)
    found = TokenOrder.parse(plan.metadata.token_order).tokens(GRID)
    tokens = torch.arange(VIDEO) if found is None else torch.from_numpy(np.asarray(found))
    for index, layer in enumerate(model.layers):
        site = plan.sites.get(f"layers.{index}")
        if site is None or step is None:
            layer.oracle = None
            continue

        served = site.at(step)

        def oracle(q: Tensor, k: Tensor, v: Tensor, pattern: Any = served) -> Tensor:
            ordered = (each[:, :, tokens] for each in (q, k, v))
            out = masked_dense_attention(*ordered, pattern)[:, :, tokens.argsort()]
            return torch.empty_strided(q.shape, q.stride(), dtype=out.dtype).copy_(out)

        layer.oracle = oracle


def names_of(program: Program) -> list[str]:
    """Sites that can be served: not those within vmap or with a mask."""
    calls = [name for name in program.statements if name.startswith("attend")]
    never = ("attend_vmap", "attend_masked")
    return [f"layers.{index}" for index, name in enumerate(calls) if name not in never]


def difference(program: Program, *, grad: bool = False, **options: Any) -> str | None:
    """Run a program both ways, twice; return what differs, or None.

    Args:
        program: what to run.
        grad: with gradients recorded.
        options: of the backend.
    """
    torch._dynamo.reset()
    torch.manual_seed(program.seed)
    eager = Model(program)
    served = Model(program)
    served.load_state_dict(eager.state_dict())
    plan = plan_of(program, names_of(program))
    compiled = torch.compile(
        served,
        backend="calibatt",
        fullgraph=True,
        options={"plan": plan, "lowering": "reference", **options},
    )
    tolerance = 3e-2 if program.low else 1e-4
    for run, timestep in enumerate((500.0, 900.0)):
        set_oracle(eager, plan, timestep)
        results = []
        for model in (eager, compiled):
            torch.manual_seed(program.seed + run)
            video = torch.randn(2, CHANNELS, *GRID)
            with torch.enable_grad() if grad else torch.no_grad():
                found = [*model(video, torch.full((2,), timestep)), video]
            results.append([*found, torch.get_rng_state()])
        buffers = [list(model.buffers()) for model in (eager, served)]
        for place, (want, got) in enumerate(
            zip(results[0] + buffers[0], results[1] + buffers[1], strict=True)
        ):
            exact = want.detach().double()
            error = (got.detach().double() - exact).norm() / exact.norm().clamp(min=1e-6)
            if not error <= tolerance:
                return f"run {run}, value {place} of {len(results[0])}: error {float(error):.1e}"
    if not any(name in plan.sites for name in names_of(program)):
        return None
    sites = calibatt_compiler.summary(compiled).rows
    dense = [row.name for row in sites if row.name in plan.sites and row.status != "sparse"]
    return f"not served: {dense}" if dense else None


def draw(generator: random.Random) -> Program:
    """Draw a program."""
    names = generator.choice((sorted(STATEMENTS), FLOWING))
    attending = [name for name in names if name.startswith("attend")]
    found = [generator.choice(names) for _ in range(generator.randint(1, 7))]
    found.insert(generator.randint(0, len(found)), generator.choice(attending))
    return Program(
        tuple(found),
        plan=generator.choice(("none", "some", "all", "all", "full")),
        order=generator.choice(("raster", "2x2x3")),
        alias=generator.random() < 0.3,
        seed=generator.randrange(1000),
    )


def shortest(program: Program, wrong: str, **options: Any) -> Program:
    """Drop statements as long as the program still fails alike."""
    for index in range(len(program.statements)):
        fewer = program.statements[:index] + program.statements[index + 1 :]
        smaller = replace(program, statements=fewer)
        if (outcome(smaller, **options) or "").split()[:1] == wrong.split()[:1]:
            return shortest(smaller, wrong, **options)
    return program


def outcome(program: Program, **options: Any) -> str | None:
    """Return what is wrong with a program: a difference, or what it raises."""
    try:
        return difference(program, **options)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"


def without_inductor() -> Any:
    """Run graphs as they are rewritten."""
    return mock.patch(
        "calibatt_compiler.backend._inductor", lambda gm, inputs, settings: gm.forward
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args()
    logging.getLogger("calibatt").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    seed = random.randrange(10**6) if arguments.seed is None else arguments.seed
    generator, counts = random.Random(seed), Counter[str]()
    end = time.monotonic() + 60 * arguments.minutes
    while time.monotonic() < end:
        program = draw(generator)
        inductor = generator.random() < 0.05
        if inductor:  # it drops random numbers that nobody reads, as stock Inductor does
            kept = tuple(name for name in program.statements if name != "unused_noise")
            program = replace(program, statements=kept)
        with nullcontext() if inductor else without_inductor():
            wrong = outcome(program)
            counts["through Inductor" if inductor else "as rewritten"] += 1
            if wrong is not None:
                counts["wrong"] += 1
                print(f"WRONG {shortest(program, wrong)}\n  {wrong}", flush=True)
    print(f"effects, seed {seed}: {dict(counts)}")
    raise SystemExit(counts["wrong"] > 0)


if __name__ == "__main__":
    main()
