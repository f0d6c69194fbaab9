"""How large the plan of a large model is, and what making, writing and opening it takes.

    python benchmarks/plan_size.py                     Wan 14B at 720p, 50 steps: some minutes
    python benchmarks/plan_size.py --sites 2           two of its sites, the file's size scaled up
    python benchmarks/plan_size.py --form zones --keep FILE    a plan of zones, to be kept
    python benchmarks/plan_size.py --form zones --build sm_90  compile its kernels, too
    python benchmarks/plan_size.py --small             seconds: checks that it works

Masks are made and encoded site by site, so that memory holds one site's bits and all sites' codes.
Zones are fitted to synthetic energies, with the settings that calibration has by default: at its
density, and at that of the masks. A plan is opened in a process of its own, whose memory is that of
serving it. What was read is compared with what was made, by the digests that are part of the plan.
Writes OUT/plan_size.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from record import write_record
from synthetic_energies import site_squares
from synthetic_masks import RAGGED, Video, site_masks

from calibatt_compiler.calibration.select.zones.site import ZoneMap, fit_zones, group_of
from calibatt_compiler.calibration.zone_target import DENSITY, STEP_GROUPS, ZoneTarget
from calibatt_compiler.kernels.common.zone_table import zone_table
from calibatt_compiler.kernels.hopper.schedule import key_runs, make_schedule
from calibatt_compiler.kernels.hopper.zones import zone_tiles
from calibatt_compiler.kernels.portable.index_tables import IndexTables
from calibatt_compiler.plan import BlockPattern, Plan, Sampler, SitePatterns
from calibatt_compiler.plan.zones import ZonePattern
from calibatt_compiler.plan.zones.drawing import seed_of

HEAD_DIM = 128
SMALL = Video(grid=(4, 9, 16), block=16, heads=4)


def site(video: Video, seed: int, steps: int, ragged: float, jitter: float) -> SitePatterns:
    """Make the encoded patterns of one site."""
    patterns = [
        BlockPattern(video.heads, video.tokens, video.tokens, video.block, video.block, bits)
        for bits in site_masks(video, seed, steps=steps, ragged=ragged, jitter=jitter)
    ]
    return SitePatterns.share(patterns, head_dim=HEAD_DIM).packed()


def zone_sites(options: argparse.Namespace, video: Video, density: float) -> list[SitePatterns]:
    """Fit the zones of all sites, by one price for the whole plan."""
    groups = min(STEP_GROUPS, options.steps)
    of_step = [group_of(step, options.steps, groups) for step in range(options.steps)]
    maps = [
        ZoneMap(
            video.heads,
            (video.tokens, video.tokens),
            (video.block, video.block),
            partial(site_squares, video, options.seed + index, group, groups),
            of_step.count(group),
            seed=seed_of(index),
        )
        for index in range(options.sites)
        for group in range(groups)
    ]
    patterns = fit_zones(maps, ZoneTarget(density=density)).patterns
    return [
        SitePatterns.of_zones(patterns[first : first + groups], of_step, HEAD_DIM).packed()
        for first in range(0, len(patterns), groups)
    ]


def make(
    options: argparse.Namespace, video: Video, path: Path, density: float | None
) -> dict[str, object]:
    """Make a plan and write it, of zones if a density is given; return what was measured."""
    _forget_peak()
    start = time.perf_counter()
    if density is not None:
        made_sites = zone_sites(options, video, density)
    else:
        made_sites = []
        for index in range(options.sites):
            seed = options.seed + index
            made_sites.append(site(video, seed, options.steps, options.ragged, options.jitter))
            took = time.perf_counter() - start
            print(f"\r{index + 1} of {options.sites} sites, {took:.0f} s", end="", file=sys.stderr)
    sites = {f"blocks.{index}.attn1": entry for index, entry in enumerate(made_sites)}
    made = time.perf_counter() - start
    timesteps = tuple(1000.0 - 1000.0 * step / options.steps for step in range(options.steps))
    plan = Plan.create(sites, grid=video.grid, sampler=Sampler(timesteps=timesteps))
    start = time.perf_counter()
    plan.save(path)
    saved = time.perf_counter() - start
    first = next(iter(sites.values()))
    bitmap = first.size.heads * first.size.query_blocks * ((first.size.key_blocks + 7) // 8)
    numbers = {} if density is None else {"numbers of a kernel, most": _numbers(plan)}
    return {
        "form": "masks" if density is None else "zones",
        "sites": options.sites,
        "steps": options.steps,
        "tokens": video.tokens,
        "blocks a side": first.size.query_blocks,
        "density": round(plan.density(), 4),
        "patterns": sum(len(entry.digests) for entry in sites.values()),
        **numbers,
        "bitmap MB": bitmap * options.steps * options.sites / 1e6,
        "file MB": path.stat().st_size / 1e6,
        "bits a block": 8
        * path.stat().st_size
        / (first.size.blocks * options.steps * options.sites),
        "make or fit, and encode s": made,
        "save s": saved,
        "peak memory of making MB": _peak_mb(),
        "digest": plan.digest,
    }


def open_plan(path: Path) -> dict[str, object]:
    """Open a plan and use it as a run of the sampler does; return what was measured."""
    before = _anonymous_mb()
    _forget_peak()
    at_start = memory_mb("VmRSS")
    start = time.perf_counter()
    plan = Plan.load(path)
    loaded = time.perf_counter() - start
    peak = _peak_mb() - at_start
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
    middle = one.at(plan.steps // 2)
    tables = _tables_ms(middle) if one.zones is None else _zone_tables_ms(one.zones.zones)
    return {
        "load s": loaded,
        "load GB/s": path.stat().st_size / 1e9 / loaded,
        "peak memory while loading MB": peak,
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


def _zone_tables_ms(zones: Sequence[ZonePattern]) -> dict[str, float]:
    """What serving makes of the zones of a step group on the host, median of the groups.

    The tables of the portable kernel are the first part of those of Hopper's.
    """
    portable, hopper = [], []
    for pattern in zones:
        start = time.perf_counter()
        table = zone_table(pattern)
        portable.append(time.perf_counter() - start)
        zone_tiles(table, 132, "starts", pattern)
        hopper.append(time.perf_counter() - start)
    return {
        "Hopper tables of a pattern ms, median": 1e3 * statistics.median(hopper),
        "portable tables of a pattern ms, median": 1e3 * statistics.median(portable),
    }


def _numbers(plan: Plan) -> int:
    """Most numbers that one of a plan's zone patterns has over all heads."""
    patterns = [
        zones for entry in plan.sites.values() if entry.zones for zones in entry.zones.zones
    ]
    return max(int(zones.numbers.sum()) for zones in patterns)


def _forget_peak() -> None:
    """Let the peak of this process's memory begin anew, where Linux can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


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


def measure(options: argparse.Namespace, video: Video, density: float | None) -> dict[str, object]:
    """Make a plan and open it in another process; return what was measured."""
    with tempfile.TemporaryDirectory() as folder:
        path = options.keep or Path(folder) / "plan.calibatt"
        found = make(options, video, path, density)
        command = [sys.executable, __file__, "--open", str(path)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
        opened = json.loads(done.stdout)
        assert opened["digest"] == found["digest"]
        found.update(opened)
        if options.build is not None and density is not None:
            found.update(build(path, options.build, Path(folder) / "cache"))
    if not options.small:
        found["file MB at 40 sites"] = 40 / options.sites * float(str(found["file MB"]))
    return found


def build(path: Path, arch: str, caches: Path) -> dict[str, float]:
    """Compile all kernels of a plan with empty caches; return how long it took and what serves."""
    folders = {name: str(caches / name) for name in ("TRITON_CACHE_DIR", "CALIBATT_CACHE_DIR")}
    command = [sys.executable, "-P", "-m", "calibatt_compiler", "build", str(path), "--arch", arch]
    start = time.perf_counter()
    done = subprocess.run(
        [*command, "--json"], check=True, stdout=subprocess.PIPE, env={**os.environ, **folders}
    )
    took = time.perf_counter() - start
    told = json.loads(done.stdout)
    steps = {f"steps of sites, {kind}": told[kind] for kind in ("generated", "table", "dense")}
    return {"cores": os.cpu_count() or 0, f"build for {arch} s": took, **steps}


def main() -> None:
    """Parse the arguments, make, open, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=40)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--ragged", type=float, default=RAGGED)
    parser.add_argument("--jitter", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--form", choices=("masks", "zones"), help="default: both")
    parser.add_argument("--density", type=float, help="of zones only")
    parser.add_argument("--build", metavar="SM", help="compile plans of zones, such as for sm_90")
    parser.add_argument("--small", action="store_true", help="a small video, 3 sites, 6 steps")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="keep the last plan here")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.open is not None:
        print(json.dumps(open_plan(options.open)))
        return
    video = Video()
    if options.small:
        video, options.sites, options.steps = SMALL, 3, 6
    rows: list[dict[str, object]] = []
    if options.form != "zones":
        rows.append(measure(options, video, None))
    if options.form != "masks":
        of_masks = [float(str(row["density"])) for row in rows]
        densities = [options.density] if options.density else [*of_masks, DENSITY]
        rows += [measure(options, video, density) for density in densities]
    if options.out is not None:
        settings = {name: getattr(options, name) for name in ("ragged", "jitter", "seed")}
        write_record(
            options.out / "plan_size.json",
            torch.device("cpu"),
            rows,
            check=options.small,
            **settings,
        )
    for found in rows:
        print()
        for name, value in found.items():
            print(f"{name:40} {value:.4g}" if isinstance(value, float) else f"{name:40} {value}")


if __name__ == "__main__":
    main()
