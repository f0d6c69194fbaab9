"""What the fit of zones gains by each of its choices, on whole videos of a trained model.

    pip install -e '.[report,pipelines]'
    python benchmarks/zone_choices.py --model examples/tiny_wan/work/mid/model \\
        --settings examples/tiny_wan/mid.json --block 64 --out results
    python benchmarks/zone_choices.py --quick       tiny sizes: shows that all works

One calibration with energies kept; from it a plan for each choice, all of one density, each choice
a departure from the fit as the product makes it (`as it is`). Videos of held-out prompts and seeds,
against the dense video of the same. Sensitivities are measured, not assumed: videos of calibration
prompts in which one layer, or one group of steps, alone is sparse. Everything is kept below --work:
run it again to go on. Writes OUT/zone_choices.json.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fidelity_study.ours import OurPlans
from fidelity_study.serve import Dense, Method, Planned, Switch
from fidelity_study.setting import Setting, name_of
from fidelity_study.videos import OutOfTimeError, Videos
from record import write_record
from torch import Tensor

from calibatt_compiler.calibration.observe.attach import observed
from calibatt_compiler.calibration.select.zones.price import ZonePricing
from calibatt_compiler.calibration.select.zones.site import ZoneMap, fit_zones, group_of
from calibatt_compiler.calibration.store.run_folder import RunStore
from calibatt_compiler.calibration.zone_target import BUDGET, STEP_GROUPS, ZoneTarget
from calibatt_compiler.cli import pipelines
from calibatt_compiler.cli.demo import find, read_settings
from calibatt_compiler.evaluation.cases import Case
from calibatt_compiler.evaluation.quality import measure
from calibatt_compiler.files import write_text
from calibatt_compiler.plan import Plan, SitePatterns
from calibatt_compiler.plan.zones.drawing import UNIT, seed_of

AS_IT_IS = "as it is"
QUICK = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 3}
SPREAD = 4.0
"""Sensitivities are taken as at most so many times the middle one, and at least its part."""


@dataclass(frozen=True)
class Choice:
    """A way to make a plan of zones from recorded energies.

    Attributes:
        groups: of steps.
        squared_means: fit to squares of mean energies instead of means of squares.
        numbers: a head.
        layers: by layer, what its variance is multiplied by; empty: 1.
        steps: by step group, likewise.
        one_sample: the steps of a group draw the same blocks.
        two_samples: the second call of a site at a step, guidance's other pass, draws others.
        order: of tokens.
    """

    groups: int = STEP_GROUPS
    squared_means: bool = False
    numbers: int | None = None
    layers: tuple[float, ...] = ()
    steps: tuple[float, ...] = ()
    one_sample: bool = False
    two_samples: bool = False
    order: str = "raster"


CHOICES: dict[str, Choice] = {
    AS_IT_IS: Choice(),
    "squares of means": Choice(squared_means=True),
    "1 group of steps": Choice(groups=1),
    "2 groups of steps": Choice(groups=2),
    "10 groups of steps": Choice(groups=10),
    "a group for each step": Choice(groups=1000),
    "32 numbers a head": Choice(numbers=32),
    "256 numbers a head": Choice(numbers=256),
    "one sample for all steps of a group": Choice(one_sample=True),
    "another sample in guidance's other pass": Choice(two_samples=True),
}
"""Those that no measurement comes before."""

BY_LAYER, BY_STEPS = "price by layers' sensitivity", "price by step groups' sensitivity"
BOTH = "price by both sensitivities"


def squares_of(
    folder: Path, site: str, steps: Sequence[int], squared_means: bool, weight: float
) -> Callable[[], Any]:
    """Return what reads the squares of a site over some steps."""

    def read() -> Any:
        store = RunStore(folder)
        total: Any = 0.0
        votes = 0
        for name in store.names():
            record = store.record(name)
            for step in steps:
                energy = store.energy(record, site, step).astype(np.float64)
                total = total + (energy if squared_means else np.square(energy)).sum(0)
                votes += len(energy)
        mean = total / votes
        return weight * (np.square(mean) if squared_means else mean)

    return read


def make_plan(folder: Path, like: Path, choice: Choice, density: float, out: Path) -> str:
    """Fit a choice's zones to the energies of a run; write the plan."""
    torch.set_num_threads(1)
    store = RunStore(folder)
    first = store.record(store.names()[0])
    places = [group_of(at, first.schedule_steps, choice.groups) for at in first.positions]
    groups = sorted(set(places))
    maps = [
        ZoneMap(
            size.heads,
            (size.query_length, size.key_length),
            first.block,
            squares_of(
                folder,
                size.name,
                [step for step, place in enumerate(places) if place == group],
                choice.squared_means,
                (choice.layers[index] if choice.layers else 1.0)
                * (choice.steps[group * len(choice.steps) // len(groups)] if choice.steps else 1.0),
            ),
            places.count(group),
            seed=seed_of(index),
        )
        for index, size in enumerate(first.sites)
        for group in groups
    ]
    heads = first.sites[0].heads
    budget = BUDGET if choice.numbers is None else choice.numbers * heads
    fitted = fit_zones(maps, ZoneTarget(density=density), budget=budget)
    sites = {}
    for index, size in enumerate(first.sites):
        zones = fitted.patterns[index * len(groups) : (index + 1) * len(groups)]
        of_step = [groups.index(place) for place in places]
        sites[size.name] = (
            SitePatterns.share([zones[group].draw(group) for group in of_step])
            if choice.one_sample
            else SitePatterns.of_zones(zones, of_step).packed()
        )
    plan = Plan.load(like).with_sites(sites, thresholds={}, quality={})
    plan.save(out)
    return f"{out.stem}: density {plan.density():.4f}"


class TwoSamples(Planned):
    """A plan whose every second call of a site and step draws other blocks."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        other = {
            name: SitePatterns.of_zones(
                [
                    site.patterns.group(index).with_seed(  # type: ignore[attr-defined]
                        (site.patterns.group(index).seed + UNIT // 3) % UNIT  # type: ignore[attr-defined]
                    )
                    for index in range(max(site.patterns.groups) + 1)  # type: ignore[attr-defined]
                ],
                site.patterns.groups,  # type: ignore[attr-defined]
            )
            for name, site in plan.sites.items()
        }
        self._other = Planned(plan.with_sites(other, thresholds={}, quality={}))
        self._calls: Counter[tuple[str, float]] = Counter()

    def attend(
        self, site: str, q: Tensor, k: Tensor, v: Tensor, timestep: float, scale: float
    ) -> Tensor:
        """Attention by the plan, or by the other one."""
        self._calls[site, timestep] += 1
        if self._calls[site, timestep] % 2:
            return super().attend(site, q, k, v, timestep, scale)
        return self._other.attend(site, q, k, v, timestep, scale)


class Only:
    """A plan at one layer or in one step group; all else is dense."""

    def __init__(self, plan: Plan, *, site: str | None = None, group: int | None = None) -> None:
        self._plan, self._site, self._group = plan, site, group
        self._planned, self._dense = Planned(plan), Dense()

    def attend(
        self, site: str, q: Tensor, k: Tensor, v: Tensor, timestep: float, scale: float
    ) -> Tensor:
        """Attention by the plan where it is meant."""
        step = self._plan.step_of(timestep)
        assert step is not None
        meant = self._site in (None, site)
        if self._group is not None:
            meant &= group_of(step, self._plan.steps) == self._group
        chosen: Method = self._planned if meant else self._dense
        return chosen.attend(site, q, k, v, timestep, scale)

    def density(self) -> float:
        """Of the plan."""
        return self._planned.density()


@dataclass
class Distances(Videos):
    """Videos of one pipeline and their distances from the dense ones; kept in a folder."""

    pipe: Any
    setting: Setting
    folder: Path
    deadline: float
    switch: Switch = field(default_factory=Switch)
    results: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        path = self.folder / "results.json"
        if path.exists():
            self.results = json.loads(path.read_text("utf-8"))

    def measure(self, name: str, case: Case, method: Callable[[], Method]) -> dict[str, float]:
        """Return the distances of one video, generated now unless it was."""
        key = f"{name}|{name_of(case)}"
        if key not in self.results:
            self._check_time(key)
            dense = self._dense(case)
            frames = self._video(case, method())
            found = measure(dense, frames, torch.device(self.pipe._execution_device))
            mse = float(np.square((dense.astype(np.float64) - frames) / 255).mean())
            self.results[key] = {
                "psnr": found.psnr if math.isfinite(found.psnr) else 99.0,
                "ssim": found.ssim,
                "flicker": found.flicker,
                "mse": mse,
            }
            write_text(self.folder / "results.json", json.dumps(self.results, indent=1))
            print(f"{key}: {self.results[key]['psnr']:.2f} dB", flush=True)
        return self.results[key]


def weights(mses: Sequence[float], middle: Sequence[float]) -> tuple[float, ...]:
    """Factors of variance: a part's error in the video over its predicted one, in bounds."""
    ratio = [mse / expected for mse, expected in zip(mses, middle, strict=True)]
    typical = statistics.median(ratio)
    return tuple(min(max(each / typical, 1 / SPREAD), SPREAD) for each in ratio)


def variances(plan: Plan, folder: Path) -> tuple[list[float], list[float]]:
    """Predicted variance of a plan by layer and by step group, summed over the other."""
    store = RunStore(folder)
    first = store.record(store.names()[0])
    places = [group_of(at, first.schedule_steps) for at in first.positions]
    groups = sorted(set(places))
    price = ZoneTarget(price=plan.metadata.thresholds["price"])
    found = np.zeros((len(first.sites), len(groups)))
    for index, size in enumerate(first.sites):
        for group in groups:
            steps = [step for step, place in enumerate(places) if place == group]
            entry = ZoneMap(
                size.heads,
                (size.query_length, size.key_length),
                first.block,
                squares_of(folder, size.name, steps, False, 1.0),
                len(steps),
            )
            pricing = ZonePricing([entry.source()])
            found[index, group] = pricing.search(price).error ** 2 * len(steps)
    return found.sum(1).tolist(), found.sum(0).tolist()


def sensitivities(
    videos: Distances, plan: Plan, folder: Path, cases: Sequence[Case]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Factors of layers and step groups from videos in which each alone is sparse."""
    layers, steps = variances(plan, folder)
    by_layer = [
        statistics.fmean(
            videos.measure(f"only {site}", case, lambda s=site: Only(plan, site=s))["mse"]
            for case in cases
        )
        for site in plan.sites
    ]
    by_group = [
        statistics.fmean(
            videos.measure(f"only steps {group}", case, lambda g=group: Only(plan, group=g))["mse"]
            for case in cases
        )
        for group in range(len(steps))
    ]
    return weights(by_layer, layers), weights(by_group, steps)


def make_plans(
    todo: Mapping[str, Choice], recordings: Mapping[str, Path], density: float, work: Path, n: int
) -> None:
    """Make the plans that are not there, several at a time."""
    with ProcessPoolExecutor(n, mp_context=get_context("spawn")) as pool:
        futures = []
        for name, choice in todo.items():
            out = plan_path(work, name)
            if not out.exists():
                like = recordings[choice.order]
                folder = Path(f"{like}.calibration")
                futures.append(pool.submit(make_plan, folder, like, choice, density, out))
        for future in futures:
            print(future.result(), flush=True)


def plan_path(work: Path, name: str) -> Path:
    """Return where the plan of a choice lies."""
    return work / f"{name.replace(' ', '-').replace(chr(39), '')}.calibatt"


def run(options: argparse.Namespace) -> int:
    """Calibrate, make plans, measure, report."""
    device = pipelines.device_of(options.device)
    dtype = pipelines.dtype_of("auto", device)
    pipe = pipelines.load_pipeline(str(options.model or find("model")), device, dtype)
    pipe.set_progress_bar_config(disable=True)
    chosen = read_settings(options.settings or find("demo.json"))
    arguments = {**chosen.arguments, **(QUICK if options.quick else {})}
    inputs, prompts = (1, 1) if options.quick else (options.inputs, options.prompts)
    setting = Setting(
        arguments=pipelines.pipeline_arguments(pipe, arguments, None),
        calibration=chosen.calibration[:inputs],
        held_out=chosen.held_out[:prompts],
        densities=[options.density],
        block=16 if options.quick else options.block,
        C=0.85 if options.quick else 0.01,
        k=8.0,
        token_order=options.token_order,
        inductor=False,
    )
    options.work.mkdir(parents=True, exist_ok=True)
    ours = OurPlans(pipe, setting, options.work)
    orders = ["raster", *([options.token_order] if options.token_order else [])]
    for order in orders:
        ours._recording(order)
    recordings = {order: options.work / f"calibrated-{order}.calibatt" for order in orders}
    todo = dict(CHOICES)
    if options.token_order:
        todo[f"token order {options.token_order}"] = Choice(order=options.token_order)
    deadline = time.monotonic() + 60 * options.minutes
    make_plans(todo, recordings, options.density, options.work, options.workers)
    videos = Distances(pipe, setting, options.work, deadline)
    with observed(pipe.transformer, videos.switch, setting.inductor):
        folder = Path(f"{recordings['raster']}.calibration")
        probe = ours._recording("raster")._zones(options.density, None)
        layers, steps = sensitivities(videos, probe, folder, setting.calibration[:2])
        more = {
            BY_LAYER: Choice(layers=layers),
            BY_STEPS: Choice(steps=steps),
            BOTH: Choice(layers=layers, steps=steps),
        }
        make_plans(more, recordings, options.density, options.work, options.workers)
        todo |= more
        try:
            for case in setting.held_out:
                for name, choice in todo.items():
                    plan = Plan.load(plan_path(options.work, name))
                    how = TwoSamples if choice.two_samples else Planned
                    videos.measure(name, case, lambda p=plan, how=how: how(p))
        except OutOfTimeError as reached:
            print(f"out of time before {reached}; run again to go on", flush=True)
    densities = {name: Plan.load(plan_path(options.work, name)).density() for name in todo}
    table = rows(videos.results, setting.held_out, densities)
    for row in table:
        print(
            f"{row['choice']:42s} {row['median']:6.2f} dB, {row['gain']:+.2f} of {AS_IT_IS}, "
            f"better in {row['better']:.0%} of {row['videos']} videos",
            flush=True,
        )
    print(f"factors of layers {np.round(layers, 2)}, of step groups {np.round(steps, 2)}")
    if options.out is not None:
        settings = {"check": options.quick, "block": setting.block, "density": options.density}
        settings |= {"layers": list(layers), "step_groups": list(steps)}
        settings |= {"model": Path(options.model).parent.name if options.model else "demo"}
        write_record(options.out / "zone_choices.json", device, table, **settings)
    return 0 if all(row["videos"] == len(setting.held_out) for row in table) else 3


def rows(
    results: Mapping[str, Mapping[str, float]],
    cases: Sequence[Case],
    densities: Mapping[str, float],
) -> list[dict[str, Any]]:
    """Return a row for each choice, over the videos that it and the fit as it is have."""
    found = []
    for name, density in densities.items():
        keys = [f"{name}|{name_of(case)}" for case in cases]
        bases = [f"{AS_IT_IS}|{name_of(case)}" for case in cases]
        there = [(k, b) for k, b in zip(keys, bases, strict=True) if {k, b} <= set(results)]
        if not there:
            continue
        psnr = [results[key]["psnr"] for key, _ in there]
        gains = [results[key]["psnr"] - results[base]["psnr"] for key, base in there]
        found.append(
            {
                "choice": name,
                "density": density,
                "videos": len(there),
                "median": statistics.median(psnr),
                "psnr": statistics.fmean(psnr),
                "ssim": statistics.median(results[key]["ssim"] for key, _ in there),
                "gain": statistics.median(gains),
                "mean_gain": statistics.fmean(gains),
                "better": sum(gain > 0 for gain in gains) / len(gains),
            }
        )
    return found


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, default=Path("zone-choices"), help="what is kept")
    parser.add_argument("--model", type=Path, help="a pipeline's folder; default: the demo's model")
    parser.add_argument("--settings", type=Path, help="prompts and sizes; default: the demo's")
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--block", type=int, default=32, help="tokens a query block and key block")
    parser.add_argument("--inputs", type=int, default=8, help="calibration prompts")
    parser.add_argument("--prompts", type=int, default=8, help="held-out prompts")
    parser.add_argument("--token-order", help="also zones in this order, such as 2x4x4")
    parser.add_argument("--workers", type=int, default=2, help="plans made at a time")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no video after them")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that all works")
    parser.add_argument("--out", type=Path)
    raise SystemExit(run(parser.parse_args()))


if __name__ == "__main__":
    main()
