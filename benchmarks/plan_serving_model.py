"""Serve a large plan in a compiled model: what bringing tables costs a step of it.

    python benchmarks/plan_serving_model.py --out results    4 layers of Wan 14B at 720p, 2 steps
    python benchmarks/plan_serving_model.py --passes 1       without guidance: half the time a table
    python benchmarks/plan_serving_model.py --samples        weighted samples
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
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from attention_record import write_record
from dit_layer import SCALES, make_model
from plan_serving import make_plan, timesteps_of
from synthetic_masks import Video

from calibatt_compiler.plan import Plan
from calibatt_compiler.runtime.kernels import Counts, KernelStore, table_budget

LAYERS_OF_14B = 40
TIMES = ("served", "resident", "stock")


@dataclass
class Row:
    """What was found; milliseconds a step, megabytes of 10**6 bytes."""

    layers: int
    passes: int
    density: float
    samples: bool
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


def video(run: Callable[[float], Any], timesteps: tuple[float, ...], passes: int) -> list[float]:
    """Sample one video; return milliseconds a step."""
    found = []
    for at in timesteps:
        finish()
        start = time.perf_counter()
        for _ in range(passes):
            run(at)
        finish()
        found.append(1e3 * (time.perf_counter() - start))
    return found


def finish() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def counts() -> Counts:
    """Counters of the one store that lives."""
    gc.collect()
    stores = [each for each in gc.get_objects() if type(each) is KernelStore]
    return max((store.counts for store in stores), key=lambda count: count.made + count.ahead)


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
    model = make_model(scale, options.sites, device, dtype)
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
            run = compiled(model, plan, memory)

            def one(at: float, run: Any = run) -> None:
                run(timestep=torch.tensor([at], device=device), **given)

            both = [video(one, timesteps, options.passes) for _ in range(2)]
            times[name].append(both[1])
            text = ", then ".join(" ".join(f"{ms:.0f}" for ms in row) for row in both)
            print(f"{name}, ms a step: {text}", flush=True)
            if name == "served":
                seen = counts()
            del run, one
            torch._dynamo.reset()
            gc.collect()
    ms = {
        name: [statistics.median(step) for step in zip(*runs, strict=True)]
        for name, runs in times.items()
    }
    return Row(
        layers=options.sites,
        passes=options.passes,
        density=plan.density(),
        samples=options.samples,
        budget_mb=budget,
        ms=ms,
        ratio=sum(ms["served"]) / sum(ms["resident"]),
        tables_mb=seen.peak / 1e6,
        made_by_calls=seen.made,
        made_ahead=seen.ahead,
    )


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4, dest="sites")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--passes", type=int, default=2, help="calls of the model a step")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--samples", action="store_true", help="a plan of weighted samples")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--check", action="store_true", help="tiny, on a CPU: shows that it runs")
    options = parser.parse_args()
    if options.check:
        options.sites, options.rounds = 2, 1
    row = measure(options)
    for name, found in vars(row).items():
        print(f"{name:16} {found:.4g}" if isinstance(found, float) else f"{name:16} {found}")
    print("aim: ratio 1")
    if options.out is not None:
        kind = "cpu" if options.check else torch.cuda.get_device_name()
        write_record(options.out / "plan_serving_model.json", kind, [row])
    return 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
