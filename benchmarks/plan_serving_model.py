"""Serve a large plan in a compiled model: what bringing tables costs a step of it.

    python benchmarks/plan_serving_model.py --out results    4 layers of Wan 14B at 720p, 2 steps
    python benchmarks/plan_serving_model.py --passes 1       without guidance: half the time a table
    python benchmarks/plan_serving_model.py --check          no GPU: tiny, times mean nothing

As `plan_serving.py`, which calls attention alone, with everything else that a model does beside it:
its matrix products, and the host that launches them while threads make tables. `served` may hold
the share of the budget that so many of 40 layers have; `resident` whatever it wants. Both are
compiled anew in each round and take turns; the first video of each brings its tables, the second
is timed.
"""

from __future__ import annotations

import argparse
import gc
import sys
from dataclasses import dataclass
from typing import Any

import torch
from dit_layer import SCALES, make_model
from plan_serving import make_plan, medians, parse, report, timesteps_of, two_videos
from synthetic_masks import Video

from calibatt_compiler.plan import Plan
from calibatt_compiler.runtime.kernel_cache import Counts, KernelCache, table_budget

LAYERS_OF_14B = 40
TIMES = ("served", "resident", "stock")


@dataclass
class Row:
    """What was found; milliseconds a step, megabytes of 10**6 bytes."""

    layers: int
    passes: int
    density: float
    budget_mb: int
    ms: dict[str, list[float]]
    ratio: float
    tables_mb: float
    made_by_calls: int
    made_ahead: int


def compiled(model: Any, plan: Plan, megabytes: int | None) -> Any:
    """Compile the model for a plan with as much memory for tables; None: stock."""
    # Timesteps are tensors and shapes equal: one graph serves all calls.
    settings: dict[str, Any] = {"fullgraph": True, "dynamic": False}
    if megabytes is None:
        return torch.compile(model, **settings)
    options = {
        "plan": plan,
        "lowering": "table",
        "on_mismatch": "error",
        "table_memory": megabytes,
    }
    return torch.compile(model, backend="calibatt", options=options, **settings)


def counts() -> Counts:
    """Counters of the one cache that lives: with two, tables would be shared."""
    gc.collect()
    (cache,) = (each for each in gc.get_objects() if type(each) is KernelCache)
    return cache.counts


def measure(options: argparse.Namespace) -> Row:
    """Serve the plan in both ways."""
    on_gpu = torch.cuda.is_available() and not options.check
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    scale = SCALES["720p" if on_gpu else "tiny"]
    shapes = Video(scale.grid, block=128 if on_gpu else 16, heads=scale.heads)
    plan = make_plan(options, shapes, scale.head_dim)
    print(f"plan made: density {plan.density():.3f}", flush=True)
    whole = table_budget(plan, None)
    budget = max(1, whole * options.sites // LAYERS_OF_14B // 10**6)
    given = {
        "hidden_states": torch.randn(1, 16, *scale.latent, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, scale.text, 4096, device=device, dtype=dtype),
        "return_dict": False,
    }
    timesteps = timesteps_of(options.steps)
    times: dict[str, list[list[float]]] = {name: [] for name in TIMES}
    seen = Counts()
    for _ in range(options.rounds):
        for name, memory in zip(TIMES, (budget, 10**6, None), strict=True):
            # Tables of equal patterns are shared: each turn has a model of its own, gone after it.
            run = compiled(make_model(scale, options.sites, device, dtype), plan, memory)

            def one(at: float, run: Any = run) -> None:
                run(timestep=torch.tensor([at], device=device), **given)

            times[name].append(two_videos(name, one, timesteps, options.passes))
            if name == "served":
                seen = counts()
            del run, one
            torch._dynamo.reset()
            gc.collect()
    ms = medians(times)
    return Row(
        layers=options.sites,
        passes=options.passes,
        density=plan.density(),
        budget_mb=budget,
        ms=ms,
        ratio=sum(ms["served"]) / sum(ms["resident"]),
        tables_mb=seen.peak / 1e6,
        made_by_calls=seen.made,
        made_ahead=seen.ahead,
    )


def main() -> int:
    """Measure, print, write."""
    options = parse(__doc__, sites=4)
    report(measure(options), options, __file__)
    print("aim: ratio 1")
    return 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
