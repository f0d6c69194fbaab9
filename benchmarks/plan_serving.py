"""Serve a large plan step by step: GPU memory of its tables, and what bringing them costs.

    python benchmarks/plan_serving.py --out results       Wan 14B at 720p, 40 sites, 2 of 50 steps
    python benchmarks/plan_serving.py --passes 1          without guidance: half the time a table
    python benchmarks/plan_serving.py --check             no GPU: tiny, times mean nothing

Every site's attention is called as a model calls it, step by step and pass by pass, on one set of
random operands; nothing else of the model is, so tables have less time to come than they will have.
`served` holds what the budget allows (`runtime.kernel_cache.table_budget`): a thread
makes the tables of what comes and copies them beneath the compute. `resident` has the tables of all
steps before the first call that counts. They take turns and one is gone before the other comes:
tables of equal patterns are shared by all that lives in a process. The figure of a step is the time
from its first call to the end of its last, median of the rounds. Masks are synthetic
(`synthetic_masks.py`), of one site; every other site has its heads in another order, so that none
shares its tables with another one.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plan_size import SMALL
from record import write_record
from synthetic_masks import Video, site_masks
from torch import Tensor

from calibatt_compiler.kernels.request import KernelSettings
from calibatt_compiler.plan import BlockPattern, Plan, Sampler, SitePatterns
from calibatt_compiler.runtime.device_queue import queue_of
from calibatt_compiler.runtime.kernel_cache import KernelCache, table_budget
from calibatt_compiler.runtime.site import SparseSite

AIM_MB = 256


@dataclass
class Row:
    """What was found; milliseconds a step, megabytes of 10**6 bytes."""

    tokens: int
    sites: int
    steps: int
    passes: int
    density: float
    served_ms: list[float]
    resident_ms: list[float]
    ratio: float
    tables_mb: float
    held_mb: float
    tables_of_all_steps_mb: float
    made_by_calls: int
    made_ahead: int
    kinds: list[str]


class Server:
    """All sites of a plan, with the cache of their kernels."""

    def __init__(self, plan: Plan, operands: tuple[Tensor, ...], budget: int) -> None:
        self._operands = operands
        device = operands[0].device
        self._before = _allocated(device)
        self.cache = KernelCache(queue_of(device), budget=budget)
        self.sites = [
            SparseSite(
                plan,
                name,
                KernelSettings(
                    lowering="table",
                    device=device,
                    dtype=operands[0].dtype,
                    head_dim=operands[0].shape[-1],
                ),
                kernels=self.cache,
            )
            for name in plan.sites
        ]
        self.held = 0

    def forward(self, timestep: float) -> None:
        """Call all sites, as one forward pass does."""
        q, k, v = self._operands
        for one in self.sites:
            one.attend(q, k, v, timestep, 1 / math.sqrt(q.shape[-1]))
            # Outputs are gone here; what is left are tables and counters.
            self.held = max(self.held, _allocated(q.device) - self._before)


@dataclass
class Served:
    """What servers within the budget have needed: bytes at most, and kernels in all."""

    tables: int = 0
    held: int = 0
    by_calls: int = 0
    ahead: int = 0
    kinds: set[str] = field(default_factory=set)

    def note(self, server: Server) -> None:
        """Take a server into account."""
        counts = server.cache.counts
        self.tables = max(self.tables, counts.peak)
        self.held = max(self.held, server.held)
        self.by_calls += counts.made
        self.ahead += counts.ahead
        self.kinds.update(kind for one in server.sites for kind in one.counts.kinds)


def two_videos(
    name: str, forward: Callable[[float], Any], timesteps: Sequence[float], passes: int
) -> list[float]:
    """Run a video, which leaves the tables that the next one finds, and time that: ms a step."""
    found = [[_step(forward, at, passes) for at in timesteps] for _ in range(2)]
    both = (" ".join(f"{ms:.0f}" for ms in row) for row in found)
    print(f"{name}, ms a step: {', then '.join(both)}", flush=True)
    return found[1]


def _step(forward: Callable[[float], Any], timestep: float, passes: int) -> float:
    _finish()
    start = time.perf_counter()
    for _ in range(passes):
        forward(timestep)
    _finish()
    return 1e3 * (time.perf_counter() - start)


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def medians(times: Mapping[str, Iterable[list[float]]]) -> dict[str, list[float]]:
    """Return of each kind the median of its rounds, step by step."""
    return {
        name: [statistics.median(step) for step in zip(*rounds, strict=True)]
        for name, rounds in times.items()
    }


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def make_plan(options: argparse.Namespace, video: Video, head_dim: int = 128) -> Plan:
    """Return a plan of synthetic masks."""
    patterns_of_one = [
        BlockPattern(video.heads, video.tokens, video.tokens, video.block, video.block, bits)
        for bits in site_masks(video, 0, steps=options.steps)
    ]

    def site(index: int) -> SitePatterns:
        patterns = [replace(one, bits=np.roll(one.bits, index, axis=0)) for one in patterns_of_one]
        return SitePatterns.share(patterns, head_dim).packed()

    with ThreadPoolExecutor() as pool:
        names = [f"blocks.{index}.attn1" for index in range(options.sites)]
        sites = dict(zip(names, pool.map(site, range(options.sites)), strict=True))
    sampler = Sampler(timesteps=timesteps_of(options.steps))
    return Plan.create(sites, grid=video.grid, sampler=sampler)


def timesteps_of(steps: int) -> tuple[float, ...]:
    """Return evenly spread timesteps."""
    return tuple(1000.0 - 1000.0 * step / steps for step in range(steps))


def measure(options: argparse.Namespace, video: Video, device: torch.device) -> Row:
    """Serve the plan in both ways."""
    plan = make_plan(options, video)
    print(f"plan made: density {plan.density():.3f}", flush=True)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = (1, video.tokens, video.heads, 128)
    operands = tuple(
        torch.randn(shape, device=device, dtype=dtype).transpose(1, 2) for _ in range(3)
    )
    timesteps = timesteps_of(options.steps)
    times: dict[str, list[list[float]]] = {"served": [], "resident": []}
    served, all_steps = Served(), 0
    budget_of_plan = table_budget(plan, None)
    for _ in range(options.rounds):
        for name, budget in (("served", budget_of_plan), ("resident", sys.maxsize)):
            server = Server(plan, operands, budget)
            times[name].append(two_videos(name, server.forward, timesteps, options.passes))
            if name == "served":
                served.note(server)
            all_steps = server.cache.bytes
            del server  # its tables go before others are made: equal ones are shared
    middle = medians(times)
    return Row(
        tokens=video.tokens,
        sites=options.sites,
        steps=options.steps,
        passes=options.passes,
        density=plan.density(),
        served_ms=middle["served"],
        resident_ms=middle["resident"],
        ratio=sum(middle["served"]) / sum(middle["resident"]),
        tables_mb=served.tables / 1e6,
        held_mb=served.held / 1e6,
        tables_of_all_steps_mb=all_steps / 1e6,
        made_by_calls=served.by_calls,
        made_ahead=served.ahead,
        kinds=sorted(served.kinds),
    )


def parse(description: str | None, sites: int) -> argparse.Namespace:
    """Read the command line; `sites`: of the plan, if not said."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sites", type=int, default=sites, help="one a layer")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--passes", type=int, default=2, help="calls of a site a step")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--check", action="store_true", help="tiny, on a CPU: shows that it runs")
    options = parser.parse_args()
    if options.check:
        options.sites, options.steps, options.rounds = 2, 2, 1
    return options


def report(row: Any, options: argparse.Namespace, script: str) -> None:
    """Print what was found, and write it where that is asked for."""
    for name, found in vars(row).items():
        print(f"{name:24} {found:.4g}" if isinstance(found, float) else f"{name:24} {found}")
    if options.out is not None:
        device = torch.device("cpu" if options.check else "cuda")
        path = options.out / Path(script).with_suffix(".json").name
        write_record(path, device, [row], check=options.check)


def main() -> int:
    """Measure, print, write."""
    options = parse(__doc__, sites=40)
    device = torch.device("cpu" if options.check else "cuda")
    row = measure(options, SMALL if options.check else Video(), device)
    report(row, options, __file__)
    print(f"aim: at most {AIM_MB} MB held, ratio 1")
    return 0


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())
