"""The search for thresholds: what it measures, what it chooses, and that it resumes."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from calibatt_compiler import Plan
from calibatt_compiler.calibration import (
    CalibrationConfig,
    SearchSpace,
    TuningConfig,
    calibrate,
    plan_from_run,
    tune,
    tuning_cost,
    validate_run,
)
from calibatt_compiler.calibration.store.lock import FolderLock
from calibatt_compiler.calibration.tuning.pareto import (
    CEILING,
    Point,
    SearchPoint,
    StepTime,
    choose,
    cost_of,
    front,
)
from calibatt_compiler.calibration.tuning.plan_server import PlanServer, served
from calibatt_compiler.calibration.tuning.study import JOURNAL, MaskStudy, finished
from calibatt_compiler.calibration.tuning.trials import PlanEvaluator
from calibatt_compiler.calibration.tuning.tune import _check
from calibatt_compiler.errors import CalibrationError, OptionError
from calibatt_compiler.evaluation.compare import to_bytes
from calibatt_compiler.evaluation.quality import psnr

pytest.importorskip("optuna", reason="the extra `tune`")

PROMPTS = ["a big rabbit runs", "the bird flies"]
CONFIG = CalibrationConfig(block=(32, 32), form="masks", inductor=False)
TIMES = StepTime(dense=2.0, costs=(0.2, 0.8), seconds=(0.9, 1.8))


def point(fidelity: float, cost: float) -> Point:
    return Point(SearchPoint(0.8, 0.9, 4.0, 0.5), fidelity, cost, cost, "")


def test_front_and_choice() -> None:
    good, fair, poor = point(35, 0.6), point(30, 0.3), point(20, 0.1)
    beaten, equal = point(29, 0.31), point(30, 0.4)
    points = [beaten, good, poor, equal, fair]
    assert front(points) == [poor, fair, good]
    assert TIMES.at(0.4) == pytest.approx(1.2)
    assert TIMES.speed_up(0.6) == pytest.approx(2 / 1.5)
    assert choose(points, TIMES, speed_up=1.3) == good
    assert choose(points, TIMES, speed_up=1.4) == fair
    assert choose(points, TIMES, speed_up=9) is None
    assert choose(points, TIMES, fidelity=30) == fair
    assert choose(points, TIMES, fidelity=36) is None
    assert choose(points, TIMES) is None
    with pytest.raises(OptionError, match="one goal"):
        choose(points, TIMES, fidelity=30, speed_up=1)


def test_settings_that_cannot_be_searched() -> None:
    for wrong in ({"A": (0.9, 0.5)}, {"k": (0.0, 1.0)}, {"rho": (0.5, 1.5)}, {"pooled": ()}):
        with pytest.raises(OptionError):
            SearchSpace(**wrong)  # type: ignore[arg-type]
    for wrong in ({"gamma": ()}, {"gamma": (None, None)}, {"gamma": (0.2,)}):
        with pytest.raises(OptionError):
            SearchSpace(**wrong)  # type: ignore[arg-type]
    for wrong in ({"trials": 0}, {"videos": 0}, {"speed_up": 1.3, "fidelity": 30}):
        with pytest.raises(OptionError):
            TuningConfig(**wrong)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="pooled"):
        TuningConfig(proxy=True, space=SearchSpace(pooled=(0, 1)))
    with pytest.raises(OptionError, match="gamma"):
        TuningConfig(proxy=True, space=SearchSpace(gamma=(None, 0.9)))
    for gamma, ends in (((None,), (None, None)), ((None, 0.9, 0.8), (0.8, None))):
        assert tuple(end.gamma for end in SearchSpace(gamma=gamma).ends()) == ends
    assert [end.gamma for end in SearchSpace(gamma=(0.9, 0.8)).ends()] == [0.8, 0.9]


def test_settings_that_a_search_would_pass_over(tiny_wan_pipeline: Any, tmp_path: Path) -> None:
    for changes, message in (
        ({"pooled": 1}, "search space"),
        ({"gamma": 0.87}, "gamma is not in the search space"),
    ):
        config = replace(CONFIG, **changes)
        for action in (tune, tuning_cost):
            with pytest.raises(OptionError, match=message):
                action(
                    tiny_wan_pipeline,
                    PROMPTS,
                    out=tmp_path,
                    config=config,
                    tuning=TuningConfig(proxy=True),
                )


def test_a_search_begun_when_samples_were_a_setting_goes_on_without_them(tmp_path: Path) -> None:
    path, search = tmp_path / "search.json", (tmp_path, CONFIG, TuningConfig(proxy=True), [])
    _check(*search)
    begun = json.loads(path.read_text())
    assert begun.pop("sample_power", 1.0) is None, "as it was written before"
    shutil.copytree(Path(__file__).parents[1] / "store" / "old_run", tmp_path / "recording")
    _check(*search)
    path.write_text(path.read_text().replace('"sample_power": null', '"sample_power": 1.0'))
    with pytest.raises(CalibrationError, match=r'"sample_power": 1\.0'):
        _check(*search)


def score(at: SearchPoint) -> Point:
    """A made-up trade: fidelity rises with A and k, and so does the cost."""
    return Point(at, 20 + 10 * at.A + math.log(at.k), at.A**2 + at.C, at.rho, "d")


class Killed(BaseException):
    pass


def test_a_study_goes_on_as_if_undisturbed(tmp_path: Path) -> None:
    space = SearchSpace(pooled=(0, 1, 4), gamma=(None, 0.87))
    start = SearchPoint(0.84, 0.99, 16.0, 0.5)
    whole = MaskStudy(tmp_path / "whole" / JOURNAL, space, start, seed=3)
    points = [whole.trial(score) for _ in range(14)]  # past the random ones
    first = points[0].settings
    assert (first.A, first.k, first.rho, first.pooled) == (0.84, 16.0, 0.5, 0)
    assert first.gamma is None
    assert pytest.approx(0.99) == first.C
    for at in (each.settings for each in points):
        assert space.A[0] <= at.A <= at.C <= 0.999
        assert space.k[0] <= at.k <= space.k[1]
    assert len({each.settings for each in points}) == 14
    # Names in files: searches of earlier versions go on.
    attributes = whole._trials("COMPLETE")[0].user_attrs
    assert set(attributes) == {"knobs", "density", "digest"}
    assert attributes["knobs"] == points[0].to_dict()["knobs"] == asdict(points[0].settings)
    assert {each.settings.pooled for each in points} == {0, 1, 4}
    assert {each.settings.gamma for each in points} == {None, 0.87}

    path = tmp_path / "cut" / JOURNAL
    assert finished(path) == 0

    def die(_: SearchPoint) -> Point:
        raise Killed

    for stop in (0, 5, 12):  # before the first, at random, by the sampler
        study = MaskStudy(path, space, start, seed=3)
        while len(study.points()) < stop:
            study.trial(score)
        study._study.ask()  # as a kill leaves it: running for ever
        with path.open("ab") as file:
            file.write(b'{"op_code": 6, "wor')  # and half a line
    study = MaskStudy(path, space, start, seed=3)
    with pytest.raises(Killed):
        study.trial(die)
    assert study.points() == points[:12]
    assert [study.trial(score) for _ in range(2)] == points[12:]
    assert finished(path) == 14
    other = MaskStudy(tmp_path / "other" / JOURNAL, space, start, seed=4)
    assert [other.trial(score) for _ in range(2)][1] != points[1]


@pytest.fixture(scope="module")
def arguments(tiny_wan_arguments: dict[str, int]) -> dict[str, int]:
    return {**tiny_wan_arguments, "num_inference_steps": 2}


@pytest.mark.slow
def test_one_compilation_serves_every_plan(
    tiny_wan_pipeline: Any, arguments: dict[str, int], tmp_path: Path
) -> None:
    """And a trial's PSNR is that of the plan compiled in the ordinary way."""
    pipe = tiny_wan_pipeline
    config = replace(CONFIG, keep_energies=True, run_folder=tmp_path / "run")
    calibrate(pipe, PROMPTS[:1], seeds=1, config=config, **arguments)
    plans = [plan_from_run(tmp_path / "run", A=A, C=A, k=1) for A in (0.5, 0.9)]
    assert plans[0].density() < plans[1].density() < 1
    server, captures = PlanServer(), []
    server.on_capture = captures.append  # type: ignore[method-assign]
    held = pipe.transformer
    with served(pipe, "transformer", server, inductor=False) as model:
        inputs = [(1, {"prompt": PROMPTS[0]})]
        evaluator = PlanEvaluator(pipe, model, server, inputs, arguments, tmp_path)
        found = [evaluator.fidelity(plan) for plan in plans]
        assert evaluator.fidelity(plan_from_run(tmp_path / "run", A=1, C=1, k=1)) > 50
        times = evaluator.times(lambda: (plans[0], plans[1]))
        assert evaluator.times(lambda: pytest.fail("measured again")) == times
    assert len(captures) == 1
    assert pipe.transformer is held
    assert times.costs == (plans[0].density(), plans[1].density())
    assert min(times.dense, *times.seconds) > 0

    def video() -> Any:
        generator = torch.Generator().manual_seed(1)
        out = pipe(prompt=PROMPTS[0], generator=generator, output_type="np", **arguments)
        return to_bytes(out.frames[0])

    dense = video()
    options = {"plan": plans[0], "lowering": "reference", "on_mismatch": "error"}
    pipe.transformer = torch.compile(held, backend="calibatt", options=options)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("calibatt_compiler.backend._inductor", lambda gm, *_: gm.forward)
            expected = psnr(dense, video())
    finally:
        pipe.transformer = held
    assert found[0] == pytest.approx(expected, abs=0.05)
    assert found[0] < found[1] < CEILING


@pytest.mark.slow
def test_cost_counts_pooled_keys(tiny_wan_pipeline: Any, arguments: dict[str, int]) -> None:
    plain, pooled = (
        calibrate(tiny_wan_pipeline, PROMPTS[:1], config=replace(CONFIG, pooled=n), **arguments)
        for n in (0, 4)
    )
    assert cost_of(plain) == pytest.approx(plain.density())
    assert cost_of(pooled) == pytest.approx(plain.density() + 4 / 32)


def test_a_search_under_way_is_left_alone(
    tiny_wan_pipeline: Any, arguments: dict[str, int], tmp_path: Path
) -> None:
    """Its costs can be estimated, and it can't be started twice."""
    tuning = TuningConfig(trials=5)
    lock = FolderLock(tmp_path)
    lock.take()
    study = MaskStudy(
        tmp_path / JOURNAL, tuning.space, SearchPoint(0.84, 0.99, 16.0, 0.5), tuning.seed
    )
    for _ in range(2):
        study.trial(score)
    study._study.ask()  # a trial that runs
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(b'{"op_code": 6, "wor')  # a line that is being written
    (tmp_path / f"{JOURNAL}.lock").touch()

    def content() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    before = content()
    common = {"config": CONFIG, "out": tmp_path, "tuning": tuning, **arguments}
    cost = tuning_cost(tiny_wan_pipeline, PROMPTS, **common)
    assert cost.trials == 3
    assert content() == before
    with pytest.raises(CalibrationError, match="another calibration works"):
        tune(tiny_wan_pipeline, PROMPTS, **common)
    assert content() == before
    lock.release()


@pytest.mark.slow
def test_a_search_by_videos(
    tiny_wan_pipeline: Any, arguments: dict[str, int], tmp_path: Path
) -> None:
    tuning = TuningConfig(trials=3, fidelity=5.0, space=SearchSpace(A=(0.3, 0.95), pooled=(0, 1)))
    common = {"seeds": 1, "config": CONFIG, **arguments}
    cost = tuning_cost(tiny_wan_pipeline, PROMPTS, out=tmp_path, tuning=tuning, **common)
    assert (cost.trials, cost.videos, cost.recording.inputs) == (3, 1, 2)
    assert cost.seconds > cost.recording.seconds + 3 * cost.trial_seconds > 0
    assert not list(tmp_path.iterdir())
    found = tune(tiny_wan_pipeline, PROMPTS, out=tmp_path, tuning=tuning, **common)
    assert len(found.points) == 3
    assert found.chosen in found.front
    assert found.plan == Plan.load(tmp_path / "plan.calibatt")
    assert found.plan is not None
    assert found.plan.digest == found.chosen.digest
    assert found.plan.metadata.thresholds["A"] == found.chosen.settings.A
    stored = json.loads((tmp_path / "tuning.json").read_text())
    assert stored == json.loads(json.dumps(found.to_dict()))
    assert stored["chosen"]["speed_up"] == found.times.speed_up(found.chosen.cost)
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")

    # More trials, another goal: what is done is not done again.
    more = replace(tuning, trials=4, fidelity=None, speed_up=1000.0)
    again = tune(tiny_wan_pipeline, PROMPTS, out=tmp_path, tuning=more, **common)
    assert again.points[:3] == found.points
    assert len(again.points) == 4
    assert again.chosen is again.plan is None
    assert again.times == found.times
    other = replace(tuning, seed=1)
    with pytest.raises(CalibrationError, match="another search"):
        tune(tiny_wan_pipeline, PROMPTS, out=tmp_path, tuning=other, **common)


@pytest.mark.slow
def test_a_search_of_repetitive_heads(
    tiny_wan_pipeline: Any, arguments: dict[str, int], tmp_path: Path
) -> None:
    """It records scores though it begins without them, and its plans go by them."""
    pipe, space = tiny_wan_pipeline, SearchSpace(gamma=(None, 0.5))
    tuning = TuningConfig(trials=4, space=space)
    common = {"seeds": 1, "config": replace(CONFIG, anchor_rows=2), **arguments}
    weight = pipe.transformer.blocks[1].attn1.norm_q.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():  # uniform attention: all rows attend alike
            weight.zero_()
        assert tuning_cost(pipe, PROMPTS, out=tmp_path, tuning=tuning, **common).recording.scored
        found = tune(pipe, PROMPTS[:1], out=tmp_path, tuning=tuning, **common)
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert found.points[0].settings.gamma is None
    with_gamma = next(point for point in found.points if point.settings.gamma == 0.5)
    plan = plan_from_run(tmp_path / "recording", **asdict(with_gamma.settings))
    assert plan.digest == with_gamma.digest
    assert plan.metadata.quality["repetitive_heads"] == pytest.approx(0.5)
    blocks = asdict(replace(with_gamma.settings, gamma=None))
    assert cost_of(plan) < cost_of(plan_from_run(tmp_path / "recording", **blocks))


SCRIPT = """
import os, signal, sys
from diffusers import WanPipeline
from calibatt_compiler.calibration import CalibrationConfig, TuningConfig, tune
from calibatt_compiler.calibration.tuning import tune as tuning

folder, out = sys.argv[1:]
calls = 0

def dying(*arguments):
    global calls
    calls += 1
    if calls == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return validate_run(*arguments)

validate_run, tuning.validate_run = tuning.validate_run, dying
tune(
    WanPipeline.from_pretrained(folder), ["a big rabbit runs", "the bird flies"], seeds=1, out=out,
    config=CalibrationConfig(block=(32, 32), form="masks", inductor=False),
    tuning=TuningConfig(trials=4, proxy=True),
    height=112, width=144, num_frames=9, num_inference_steps=2, max_sequence_length=16,
)
"""


@pytest.mark.slow
def test_killed_and_resumed_finds_the_same(
    tiny_wan_folder: Path, tiny_wan_pipeline: Any, arguments: dict[str, int], tmp_path: Path
) -> None:
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    command = [sys.executable, "-c", SCRIPT, tiny_wan_folder, cut]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == -9, done.stderr
    assert finished(cut / JOURNAL) == 2

    tuning = TuningConfig(trials=4, proxy=True, speed_up=1e-3)
    common = {"seeds": 1, "config": CONFIG, "tuning": tuning, **arguments}
    undisturbed = tune(tiny_wan_pipeline, PROMPTS, out=whole, **common)
    # Energies of another process may differ in the last bit (threads): go by the same recording.
    resumed = tune(tiny_wan_pipeline, PROMPTS, out=cut, **common)
    assert [each.settings for each in resumed.points] == [
        each.settings for each in undisturbed.points
    ]
    assert [each.digest for each in resumed.points] == [each.digest for each in undisturbed.points]
    assert resumed.points == undisturbed.points
    for each in resumed.points:
        plan = plan_from_run(cut / "recording", **vars(each.settings))
        assert each.digest == plan.digest
        assert each.fidelity == round(validate_run(whole / "recording", plan).mean, 9)
    assert resumed.chosen == max(resumed.points, key=lambda each: each.fidelity)
