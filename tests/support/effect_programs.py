"""Random modules with effects around attention, compiled with plans, against an eager run.

A *program* is a list of statements: in-place operators on values, their views and the input,
`out=`, item assignment, buffers, random numbers, autocast, assertions, vmap, checkpointing, and
attention in between. It is run eagerly with the plan's masks expanded to tokens, and compiled;
outputs, the input, buffers and the state of the random generator must be equal afterwards, on a
second call too.

`tests/campaigns/effects.py` draws programs for as long as is chosen,
`tests/backend/test_effects.py` a few.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from effect_statements import CHANNELS, HEADS, STATEMENTS, VIDEO, Attention, Values
from torch import Tensor, nn

import calibatt_compiler
from calibatt_compiler.kernels.reference.attention import masked_dense_attention
from calibatt_compiler.plan import Plan
from calibatt_compiler.plan.order import TokenOrder
from calibatt_compiler.plan.schema import FixedBy

GRID, BLOCK = (2, 5, 7), (16, 16)
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
    # What a calibration records of a model whose family is not known.
    fixed_by = FixedBy(grid="settings", shapes={"hidden_states": (None, CHANNELS, *GRID)})
    known = {"token_order": program.order, "fixed_by": fixed_by}
    return Plan(plan.metadata.model_copy(update=known), plan.sites)


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
