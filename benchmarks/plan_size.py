"""How large the plan of a large model is, and what making, writing and opening it takes.

    python benchmarks/plan_size.py                     Wan 14B at 720p, 50 steps: some minutes
    python benchmarks/plan_size.py --sites 2           two of its sites, the file's size scaled up
    python benchmarks/plan_size.py --small             seconds: checks that it works

Masks are made and encoded site by site, so that memory holds one site's bits and all sites' codes.
The plan is opened in a process of its own, whose memory is that of serving it. Masks of every step
are compared with what was made, by the digests that are part of the plan. Writes
OUT/plan_size.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from record import write_record
from synthetic_masks import RAGGED, Video, site_masks

from calibatt_compiler.kernels.hopper.schedule import key_runs, make_schedule
from calibatt_compiler.kernels.portable.index_tables import IndexTables
from calibatt_compiler.plan import BlockPattern, Plan, Sampler, SitePatterns

SMALL = Video(grid=(4, 9, 16), block=16, heads=4)


def site(video: Video, seed: int, steps: int, ragged: float, jitter: float) -> SitePatterns:
    """Make the encoded patterns of one site."""
    patterns = [
        BlockPattern(video.heads, video.tokens, video.tokens, video.block, video.block, bits)
        for bits in site_masks(video, seed, steps=steps, ragged=ragged, jitter=jitter)
    ]
    return SitePatterns.share(patterns, head_dim=128).packed()


def make(options: argparse.Namespace, video: Video, path: Path) -> dict[str, object]:
    """Make a plan and write it; return what was measured."""
    sites = {}
    start = time.perf_counter()
    for index in range(options.sites):
        name = f"blocks.{index}.attn1"
        sites[name] = site(
            video, options.seed + index, options.steps, options.ragged, options.jitter
        )
        took = time.perf_counter() - start
        print(f"\r{index + 1} of {options.sites} sites, {took:.0f} s", end="", file=sys.stderr)
    made = time.perf_counter() - start
    timesteps = tuple(1000.0 - 1000.0 * step / options.steps for step in range(options.steps))
    plan = Plan.create(sites, grid=video.grid, sampler=Sampler(timesteps=timesteps))
    start = time.perf_counter()
    plan.save(path)
    saved = time.perf_counter() - start
    first = next(iter(sites.values()))
    bitmap = first.size.heads * first.size.query_blocks * ((first.size.key_blocks + 7) // 8)
    return {
        "sites": options.sites,
        "steps": options.steps,
        "tokens": video.tokens,
        "blocks a side": first.size.query_blocks,
        "density": round(plan.density(), 4),
        "patterns": sum(len(entry.patterns) for entry in sites.values()),
        "bitmap MB": bitmap * options.steps * options.sites / 1e6,
        "file MB": path.stat().st_size / 1e6,
        "bits a block": 8
        * path.stat().st_size
        / (first.size.blocks * options.steps * options.sites),
        "make and encode s": made,
        "save s": saved,
        "peak memory of making MB": _peak_mb(),
        "digest": plan.digest,
    }


def open_plan(path: Path) -> dict[str, object]:
    """Open a plan and use it as a run of the sampler does; return what was measured."""
    before = _anonymous_mb()
    start = time.perf_counter()
    plan = Plan.load(path)
    loaded = time.perf_counter() - start
    after = _anonymous_mb()
    start = time.perf_counter()
    plan.density()
    digest = plan.digest
    known = time.perf_counter() - start
    firsts = [_timed(entry, 0) for entry in plan.sites.values()]
    held = _anonymous_mb()
    one = next(iter(plan.sites.values()))
    following = [_timed(one, step) for step in range(1, plan.steps)]
    other = list(plan.sites.values())[-1]
    tables = _tables_ms(one.at(plan.steps // 2))
    return {
        "load s": loaded,
        "load GB/s": path.stat().st_size / 1e9 / loaded,
        "memory of the opened plan MB": after - before,
        "density and digest ms": 1e3 * known,
        "first pattern of a site ms, median": 1e3 * statistics.median(firsts),
        "first pattern of a site ms, most": 1e3 * max(firsts),
        "memory with one pattern a site MB": held - before,
        "next pattern ms, median": 1e3 * statistics.median(following or [0.0]),
        "last pattern without the others ms": 1e3 * _timed(other, -1),
        **tables,
        "peak memory of using MB": _peak_mb(),
        "digest": digest,
    }


def _timed(entry: SitePatterns, step: int) -> float:
    start = time.perf_counter()
    pattern = entry.at(step)
    took = time.perf_counter() - start
    assert pattern.kept == int(np.unpackbits(pattern.bits).sum())
    return took


def _tables_ms(pattern: BlockPattern) -> dict[str, float]:
    """What serving makes of each pattern on the host, median of five."""

    def hopper() -> object:
        return make_schedule(pattern, key_runs(pattern), 132)

    def portable() -> object:
        return IndexTables.upload(pattern, torch.device("cpu"))

    found = {}
    for name, make_tables in (("Hopper", hopper), ("portable", portable)):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            make_tables()
            times.append(time.perf_counter() - start)
        found[f"{name} tables of a pattern ms, median"] = 1e3 * statistics.median(times)
    return found


def _peak_mb() -> float:
    return memory_mb("VmHWM")


def _anonymous_mb() -> float:
    return memory_mb("RssAnon")


def memory_mb(name: str) -> float:
    """Memory of this process, as Linux names it: `VmHWM` at its peak, `RssAnon` in no file."""
    status = Path("/proc/self/status")
    if not status.exists():
        return math.nan
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines[name].split()[0]) * 1024 / 1e6


def main() -> None:
    """Parse the arguments, make, open, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=40)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--ragged", type=float, default=RAGGED)
    parser.add_argument("--jitter", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a small video, 3 sites, 6 steps")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="keep the plan here")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.open is not None:
        print(json.dumps(open_plan(options.open)))
        return
    video = Video()
    if options.small:
        video, options.sites, options.steps = SMALL, 3, 6
    with tempfile.TemporaryDirectory() as folder:
        path = options.keep or Path(folder) / "plan.calibatt"
        found = make(options, video, path)
        command = [sys.executable, __file__, "--open", str(path)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
    opened = json.loads(done.stdout)
    assert opened["digest"] == found["digest"]
    found.update(opened)
    if not options.small:
        found["file MB at 40 sites"] = 40 / options.sites * float(str(found["file MB"]))
    if options.out is not None:
        settings = {name: getattr(options, name) for name in ("ragged", "jitter", "seed")}
        write_record(
            options.out / "plan_size.json",
            torch.device("cpu"),
            [found],
            check=options.small,
            **settings,
        )
    print(file=sys.stderr)
    for name, value in found.items():
        print(f"{name:40} {value:.4g}" if isinstance(value, float) else f"{name:40} {value}")


if __name__ == "__main__":
    main()
