"""The search for a density of zones: where it looks, what it finds, and that it resumes."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from calibatt_compiler import Plan
from calibatt_compiler.calibration import (
    CalibrationConfig,
    SearchSpace,
    Tuning,
    TuningConfig,
    tune,
    tuning_cost,
    zone_plan_from_run,
)
from calibatt_compiler.calibration.tuning.config import with_form
from calibatt_compiler.calibration.tuning.pareto import Point, StepTime, ZonePoint, choose, cost_of
from calibatt_compiler.calibration.tuning.study import JOURNAL, finished
from calibatt_compiler.calibration.tuning.trials import PlanEvaluator
from calibatt_compiler.calibration.tuning.zone_study import DensitySearch, ZoneStudy
from calibatt_compiler.cli.tables.tuning import cost_table, front_table
from calibatt_compiler.errors import CalibrationError, OptionError

pytest.importorskip("optuna", reason="the extra `tune`")

SPACE = (0.1, 0.6)
TEXT = 0.2
"""Share of the blocks that is text, kept whole."""


def cost(density: float) -> float:
    return TEXT + (1 - TEXT) * density


TIMES = StepTime(dense=2.0, costs=(cost(SPACE[0]), cost(SPACE[1])), seconds=(0.9, 1.6))


def psnr_of(density: float) -> float:
    """As videos have it: rising, by logarithm, with a bend."""
    return 40 + 6 * math.log2(density) + density


def tried(
    search: DensitySearch, count: int, fidelity: Callable[[float], float] = psnr_of
) -> list[Point]:
    points: list[Point] = []
    while len(points) < count and (at := search.next(points)) is not None:
        points.append(Point(ZonePoint(at), fidelity(at), cost(at), cost(at), "d"))
    return points


def densities(points: list[Point]) -> list[float]:
    return [point.settings.density for point in points]  # type: ignore[union-attr]


def test_without_a_goal_the_range_is_filled_evenly() -> None:
    found = densities(tried(DensitySearch(SPACE, 0.25, TIMES), 17))
    assert found[:3] == [0.25, 0.1, 0.6]
    for count, most in ((5, 2), (9, 4), (17, 8)):
        gaps = [math.log(high / low) for low, high in pairwise(sorted(found[:count]))]
        assert max(gaps) <= math.log(6) / most + 1e-3
    assert len(set(found)) == 17
    # A start out of the range is moved into it; a range of one density is tried once.
    assert densities(tried(DensitySearch(SPACE, 0.9, TIMES), 2)) == [0.6, 0.1]
    assert densities(tried(DensitySearch((0.3, 0.3), 0.25, TIMES), 9)) == [0.3]
    narrow = densities(tried(DensitySearch((0.3, 0.303), 0.3, TIMES), 9))
    assert narrow == [0.3, 0.303]


@pytest.mark.parametrize("goal", [1.26, 1.4, 1.8, 2.2])
def test_a_speed_up_is_predicted(goal: float) -> None:
    points = tried(DensitySearch(SPACE, 0.25, TIMES, speed_up=goal), 3)
    chosen = choose(points, TIMES, speed_up=goal)
    assert chosen is not None
    most = TIMES.cost(goal)
    assert most is not None
    assert TIMES.speed_up(most) == pytest.approx(goal)
    assert chosen.cost <= most <= 1.02 * chosen.cost
    assert len(set(densities(points))) == 3


def test_a_speed_up_out_of_reach_or_of_times_that_say_nothing() -> None:
    plain = densities(tried(DensitySearch(SPACE, 0.25, TIMES), 6))
    assert densities(tried(DensitySearch(SPACE, 0.25, TIMES, speed_up=9), 6)) == plain
    for seconds in ((1.6, 1.6), (1.6, 0.9)):
        times = replace(TIMES, seconds=seconds)
        assert times.cost(1.3) is None
        assert densities(tried(DensitySearch(SPACE, 0.25, times, speed_up=1.3), 6)) == plain
    # If the densest is fast enough, it comes second.
    assert densities(tried(DensitySearch(SPACE, 0.25, TIMES, speed_up=1.1), 2)) == [0.25, 0.6]


@pytest.mark.parametrize("wanted", [0.11, 0.2, 0.26, 0.34, 0.59])
def test_a_fidelity_is_bisected(wanted: float) -> None:
    points = tried(DensitySearch(SPACE, 0.25, TIMES, fidelity=psnr_of(wanted)), 9)
    chosen = choose(points, TIMES, fidelity=psnr_of(wanted))
    assert chosen is not None
    assert wanted <= densities([chosen])[0] <= 1.021 * wanted
    assert len(set(densities(points))) == 9


def test_a_fidelity_out_of_reach_and_one_that_jumps() -> None:
    points = tried(DensitySearch(SPACE, 0.25, TIMES, fidelity=99), 12)
    assert len(set(densities(points))) == 12
    assert 0.6 in densities(points)
    always = densities(tried(DensitySearch(SPACE, 0.25, TIMES, fidelity=1), 12))
    assert min(always) < 0.102

    def jumps(density: float) -> float:
        return psnr_of(density) + 3 * math.sin(90 * density)

    goal = 30.0
    points = tried(DensitySearch(SPACE, 0.25, TIMES, fidelity=goal), 12, jumps)
    chosen = choose(points, TIMES, fidelity=goal)
    assert chosen is not None
    below = [each for each in points if each.cost < chosen.cost]
    assert all(each.fidelity < goal for each in below)
    assert chosen.cost <= 1.02 * max(each.cost for each in below)


def test_what_comes_next_depends_on_the_set_of_finished_trials() -> None:
    for goal in ({}, {"speed_up": 1.5}, {"fidelity": 28.0}):
        search = DensitySearch(SPACE, 0.25, TIMES, **goal)
        points = tried(search, 7)
        assert search.next(points) == search.next(points[::-1])


class Killed(BaseException):
    pass


def test_a_study_goes_on_as_if_undisturbed(tmp_path: Path) -> None:
    search = DensitySearch(SPACE, 0.25, TIMES, fidelity=psnr_of(0.3))

    def score(at: ZonePoint) -> Point:
        return Point(at, psnr_of(at.density), cost(at.density), at.density, "d")

    def die(_: ZonePoint) -> Point:
        raise Killed

    whole = ZoneStudy(tmp_path / "whole" / JOURNAL, search)
    points = [whole.trial(score) for _ in range(10)]
    assert points == [replace(each, density=each.settings.density) for each in tried(search, 10)]
    assert set(whole._trials("COMPLETE")[0].params) == {"density"}

    path = tmp_path / "cut" / JOURNAL
    for stop in (0, 1, 6):
        study = ZoneStudy(path, search)
        while len(study.points()) < stop:
            study.trial(score)
        with pytest.raises(Killed):
            study.trial(die)
        # As a kill leaves them: enqueued for another goal, for this one, and one that runs.
        study._study.enqueue_trial({"density": 0.123})
        study._study.enqueue_trial({"density": search.next(study.points())})
        study._study.ask()
        with path.open("ab") as file:
            file.write(b'{"op_code": 6, "wor')  # and half a line
    study = ZoneStudy(path, search)
    while len(study.points()) < 10:
        study.trial(score)
    assert study.points() == points
    assert finished(path) == 10
    one = ZoneStudy(tmp_path / "one" / JOURNAL, replace(search, space=(0.25, 0.25)))
    assert one.trial(score) == points[0]
    assert one.trial(score) is None


def test_which_form_is_searched() -> None:
    plain, masks = CalibrationConfig(), CalibrationConfig(A=0.8)
    wide = TuningConfig(space=SearchSpace(density=(0.2, 0.9)))
    assert with_form(plain, TuningConfig()).form == "zones"
    assert with_form(plain, wide).zoned
    assert with_form(replace(plain, density=0.3), TuningConfig()).density == 0.3
    for space in ({"pooled": (0, 1)}, {"gamma": (None, 0.8)}, {"A": (0.6, 0.9)}):
        tuning = TuningConfig(space=SearchSpace(**space))  # type: ignore[arg-type]
        assert with_form(plain, tuning).form == "masks"
        with pytest.raises(OptionError, match=next(iter(space))):
            with_form(replace(plain, form="zones"), tuning)
        with pytest.raises(OptionError, match="density"):
            with_form(replace(plain, density=0.3), tuning)
    assert with_form(plain, TuningConfig(proxy=True)).form == "masks"
    assert with_form(masks, TuningConfig()).form == "masks"
    with pytest.raises(OptionError, match="kept mass says nothing of zones"):
        with_form(replace(plain, form="zones"), TuningConfig(proxy=True))
    with pytest.raises(OptionError, match="seed"):
        with_form(plain, TuningConfig(seed=1))
    for config in (masks, replace(plain, form="masks")):
        with pytest.raises(OptionError, match="density"):
            with_form(config, wide)
    for wrong in ((0.0, 0.5), (0.5, 0.4), (0.5, 1.1)):
        with pytest.raises(OptionError, match="density"):
            SearchSpace(density=wrong)
    assert TuningConfig().number(zoned=True) == 12
    assert TuningConfig().number(zoned=False) == 40
    assert TuningConfig(trials=3).number(zoned=True) == 3


PROMPTS = ["a big rabbit runs", "the bird flies"]
CONFIG = CalibrationConfig(
    block=(16, 16), inductor=False, density=0.4, step_groups=1, zone_numbers=256
)
GOAL = TuningConfig(trials=4, fidelity=5.0, space=SearchSpace(density=(0.2, 0.8)))


@pytest.fixture(scope="module")
def common(tiny_wan_arguments: dict[str, int]) -> dict[str, Any]:
    return {"seeds": 1, "config": CONFIG, **tiny_wan_arguments, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def whole(
    tiny_wan_pipeline: Any, common: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Tuning]:
    """A search by videos, and its folder: leave it as you find it."""
    folder = tmp_path_factory.mktemp("zones") / "search"
    return folder, tune(tiny_wan_pipeline, PROMPTS, out=folder, tuning=GOAL, **common)


def test_a_search_of_zones(
    whole: tuple[Path, Tuning], tiny_wan_pipeline: Any, common: dict[str, Any]
) -> None:
    folder, found = whole
    assert densities(list(found.points))[0] == 0.4
    assert len(found.points) == 4
    assert found.chosen in found.front
    assert found.plan == Plan.load(folder / "plan.calibatt")
    assert found.chosen is not None
    for point in found.points:
        assert isinstance(point.settings, ZonePoint)
        plan = zone_plan_from_run(
            folder / "recording", density=point.settings.density, numbers=CONFIG.zone_numbers
        )
        assert (point.digest, point.cost) == (plan.digest, cost_of(plan))
        assert {len(site.zones.zones) for site in plan.sites.values() if site.zones} == {1}
        assert point.density == pytest.approx(point.settings.density, abs=0.1)
        assert 0 < point.fidelity < 100
    by_density = sorted(found.points, key=lambda point: point.density)
    assert by_density[0].fidelity < by_density[-1].fidelity
    stored = json.loads((folder / "tuning.json").read_text())
    assert stored == json.loads(json.dumps(found.to_dict()))
    assert stored["chosen"]["knobs"] == {"density": found.chosen.settings.density}  # type: ignore[union-attr]
    assert (folder / "front.png").read_bytes().startswith(b"\x89PNG")

    told = tuning_cost(tiny_wan_pipeline, PROMPTS, out=folder, tuning=TuningConfig(), **common)
    assert (told.trials, told.zoned, told.recording.finished) == (8, True, 2)
    console = Console(width=200, record=True)
    console.print(cost_table(told))
    console.print(front_table(found))
    text = " ".join(console.export_text().split())
    for words in ("of sums on disk", "8 trials x", "speed-up density asked", "chosen"):
        assert words in text


def test_the_folder_is_that_of_zones(
    whole: tuple[Path, Tuning], tiny_wan_pipeline: Any, common: dict[str, Any], tmp_path: Path
) -> None:
    """Another goal goes on in it; masks, another range or other zones do not."""
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    config, pipe = common["config"], tiny_wan_pipeline
    others: list[tuple[dict[str, Any], TuningConfig]] = [
        (
            {"form": "masks", "density": None, "step_groups": 5, "zone_numbers": 2048},
            TuningConfig(),
        ),
        ({}, TuningConfig()),
        ({"zone_numbers": 128}, GOAL),
    ]
    for changes, tuning in others:
        other = {**common, "config": replace(config, **changes)}
        with pytest.raises(CalibrationError, match="another search"):
            tune(pipe, PROMPTS, out=tmp_path, tuning=tuning, **other)
    fast = replace(GOAL, trials=5, fidelity=None, speed_up=1e-3)
    again = tune(pipe, PROMPTS, out=tmp_path, tuning=fast, **common)
    assert again.points[:4] == whole[1].points
    assert len(again.points) == 5
    assert again.times == whole[1].times
    assert again.chosen == max(again.points, key=lambda point: point.fidelity)


def test_killed_and_resumed_finds_the_same(
    whole: tuple[Path, Tuning],
    tiny_wan_pipeline: Any,
    common: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(whole[0] / "recording", tmp_path / "recording")
    shutil.copy(whole[0] / "times.json", tmp_path)  # measured anew they would be others
    measured, calls = PlanEvaluator.fidelity, 0

    def dying(self: PlanEvaluator, plan: Plan) -> float:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Killed
        return measured(self, plan)

    with monkeypatch.context() as patch:
        patch.setattr(PlanEvaluator, "fidelity", dying)
        with pytest.raises(Killed):
            tune(tiny_wan_pipeline, PROMPTS, out=tmp_path, tuning=GOAL, **common)
    assert finished(tmp_path / JOURNAL) == 2
    resumed = tune(tiny_wan_pipeline, PROMPTS, out=tmp_path, tuning=GOAL, **common)
    assert resumed.points == whole[1].points
    assert resumed.chosen == whole[1].chosen
