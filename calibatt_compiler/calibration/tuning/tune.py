"""Search for the thresholds of a model: fidelity against predicted time."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibatt_compiler.calibration.config import CalibrationConfig
from calibatt_compiler.calibration.cost.estimate import Estimate, estimate
from calibatt_compiler.calibration.observe.pipelines import Prompt, quiet, read_inputs
from calibatt_compiler.calibration.pipeline import calibrate
from calibatt_compiler.calibration.select.derive import plan_from_run
from calibatt_compiler.calibration.store import identity
from calibatt_compiler.calibration.store.lock import FolderLock
from calibatt_compiler.calibration.store.run_folder import RunStore
from calibatt_compiler.calibration.tuning.config import TuningConfig
from calibatt_compiler.calibration.tuning.pareto import (
    Point,
    SearchPoint,
    Tuning,
    choose,
    cost_of,
)
from calibatt_compiler.calibration.tuning.picture import write_front
from calibatt_compiler.calibration.tuning.plan_server import PlanServer, served
from calibatt_compiler.calibration.tuning.study import JOURNAL, Study, finished
from calibatt_compiler.calibration.tuning.trials import TIMING_STEPS, PlanEvaluator
from calibatt_compiler.calibration.validation.validate import validate_run
from calibatt_compiler.errors import CalibrationError, OptionError
from calibatt_compiler.evaluation.compare import Progress, Silent
from calibatt_compiler.files import check_folder, naming, write_text
from calibatt_compiler.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Iterator


OUTPUTS = ("plan.calibatt", "tuning.json", "front.png", "search.json", JOURNAL)
"""Files that a search writes into its folder."""

_OF_SELECTION = ("rho", "share_steps", "merge_budget", "sample_power")
"""Settings of a calibration that the stored energies don't depend on, but the trials do."""


@dataclass(frozen=True)
class TuningCost:
    """What a search will cost.

    Attributes:
        recording: of the calibration that it goes by, with its energies.
        trials: how many are still to be run.
        videos: generated in each; 0 by proxy.
    """

    recording: Estimate
    trials: int
    videos: int

    @property
    def video_seconds(self) -> float:
        """Of one dense video as it is recorded, without decoding."""
        measured = self.recording.measured
        return measured.input_seconds + self.recording.steps * measured.step_seconds

    @property
    def trial_seconds(self) -> float:
        """Of the videos of one trial; selecting its plan from the energies is not in it."""
        return self.videos * self.video_seconds

    @property
    def seconds(self) -> float:
        """Of recording, dense videos, measuring step times, and all trials."""
        measured = self.recording.measured
        timing = self.video_seconds + TIMING_STEPS * measured.step_seconds
        return self.recording.seconds + timing + (self.trials + 1) * self.trial_seconds


def tuning_cost(
    pipe: Any,
    prompts: Sequence[Prompt],
    seeds: int | Sequence[int] = 0,
    *,
    out: str | os.PathLike[str],
    config: CalibrationConfig | None = None,
    tuning: TuningConfig | None = None,
    **pipeline_arguments: Any,
) -> TuningCost:
    """Tell what `tune` with the same arguments will cost. Runs two steps of the first input.

    Changes nothing in `out`, where a search may be under way.

    Raises:
        CalibrationError: the pipeline can't be calibrated.
        OptionError: arguments that can't be used.
    """
    tuning = tuning or TuningConfig()
    folder = Path(out)
    config = _recording(config, folder)
    _check_form(config, tuning)
    scored = _scored(config, tuning)
    recording = estimate(pipe, prompts, seeds, config=scored, **pipeline_arguments)
    done = finished(folder / JOURNAL)
    return TuningCost(recording, max(0, tuning.trials - done), 0 if tuning.proxy else tuning.videos)


def tune(
    pipe: Any,
    prompts: Sequence[Prompt],
    seeds: int | Sequence[int] = 0,
    *,
    out: str | os.PathLike[str],
    config: CalibrationConfig | None = None,
    tuning: TuningConfig | None = None,
    progress: Progress | None = None,
    **pipeline_arguments: Any,
) -> Tuning:
    """Search A, C, k and rho for the best trade of fidelity against time.

    Calibrates once with energies, then makes each trial's plan from them. A trial generates
    videos of the first inputs under its plan and compares them with the dense ones; the model is
    compiled once for all plans. The same call goes on after a kill at any moment, and finds what
    an undisturbed search finds.

    Writes into `out`: `tuning.json`, `front.png`, `study.journal` (an Optuna study), the recording,
    and `plan.calibatt` if a point reaches the goal.

    Args:
        pipe: see `calibrate`.
        prompts: see `calibrate`; trials are measured on the first of them.
        seeds: see `calibrate`.
        out: the folder of the search.
        config: how the model is calibrated. `A`, `C`, `k`, `rho`, `pooled` and `gamma` are where
            the search begins;
            `inductor` is taken for on, also on a CPU.
        tuning: how to search.
        progress: receives how far it is.
        **pipeline_arguments: see `calibrate`.

    Raises:
        CalibrationError: the pipeline can't be calibrated, or the folder is of another search.
        OptionError: arguments that can't be used, or Optuna is not installed.
        FileError: the folder, or a file in it, can't be written.
    """
    tuning, progress = tuning or TuningConfig(), progress or Silent()
    folder = Path(out)
    config = _recording(config, folder)
    _check_form(config, tuning)
    inputs = read_inputs(prompts, seeds, pipeline_arguments, pipe)
    check_folder(folder, OUTPUTS)
    with _held(folder):
        _check(folder, config, tuning, inputs)
        progress.start("calibrating", None)
        scored = _scored(config, tuning)
        first = calibrate(pipe, prompts, seeds, config=scored, **pipeline_arguments)
        search = _Search(folder, config, tuning, first)
        server = PlanServer()
        inductor = config.inductor is not False
        with quiet(pipe), served(pipe, config.component, server, inductor=inductor) as model:
            some = inputs[: tuning.videos]
            evaluator = PlanEvaluator(pipe, model, server, some, pipeline_arguments, folder)
            progress.start("measuring step times", None)
            times = evaluator.times(search.ends)
            progress.start("trials", tuning.trials)
            points = search.run(evaluator, progress)
        goal = {"speed_up": tuning.speed_up, "fidelity": tuning.fidelity}
        chosen = choose(points, times, **goal)
        plan = None if chosen is None else search.plan(chosen.settings)
        found = Tuning(tuple(points), times, tuning.proxy, chosen, plan)
        _write(found, folder)
    return found


class _Search:
    """Makes plans of a recording and tries them."""

    def __init__(
        self, folder: Path, config: CalibrationConfig, tuning: TuningConfig, first: Plan
    ) -> None:
        recorded = first.metadata.thresholds
        thresholds = recorded["A"], recorded["C"], recorded["k"]
        start = SearchPoint(*thresholds, config.rho, config.pooled, config.gamma)
        self._recording = folder / "recording"
        self._config = config
        self._tuning = tuning
        self._study = Study(folder / JOURNAL, tuning.space, start, tuning.seed)

    def plan(self, at: SearchPoint) -> Plan:
        """Make a plan; what is not searched is as configured."""
        return plan_from_run(self._recording, at.selection(self._config))

    def ends(self) -> tuple[Plan, Plan]:
        """Make the sparsest and the densest plan of the search."""
        sparse, dense = self._tuning.space.ends()
        return self.plan(sparse), self.plan(dense)

    def run(self, evaluator: PlanEvaluator, progress: Progress) -> list[Point]:
        """Run the trials that are missing; return all."""
        points = self._study.points()
        for _ in points[: self._tuning.trials]:
            progress.advance()
        while len(points) < self._tuning.trials:
            points.append(self._study.trial(lambda at: self._try(at, evaluator)))
            progress.advance()
        return points

    def _try(self, at: SearchPoint, evaluator: PlanEvaluator) -> Point:
        plan = self.plan(at)
        fidelity = (
            round(validate_run(self._recording, plan).mean, 9)
            if self._tuning.proxy
            else evaluator.fidelity(plan)
        )
        return Point(at, fidelity, cost_of(plan), plan.density(), plan.digest)


def _recording(config: CalibrationConfig | None, folder: Path) -> CalibrationConfig:
    return replace(
        config or CalibrationConfig(),
        run_folder=folder / "recording",
        keep_energies=True,
        keep_run=True,
        distributed=False,
    )


def _scored(config: CalibrationConfig, tuning: TuningConfig) -> CalibrationConfig:
    """Return settings of a recording that has scores if some trial may need them."""
    some = [value for value in tuning.space.gamma if value is not None]
    return replace(config, gamma=min(some, default=None))


def _check_form(config: CalibrationConfig, tuning: TuningConfig) -> None:
    """Refuse settings of the calibration that the search would pass over, or can't judge."""
    if config.pooled not in tuning.space.pooled:
        problem, expected = "pooled is not in the search space", f"one of {tuning.space.pooled}"
        got: object = config.pooled
    elif config.gamma not in tuning.space.gamma:
        problem, expected = "gamma is not in the search space", f"one of {tuning.space.gamma}"
        got = config.gamma
    elif config.form != "masks":
        problem, expected = "the search is one for thresholds of masks", "form='masks'"
        got = config.form
    elif tuning.proxy and config.sampled:
        problem, expected = "the proxy can't judge sampled blocks", "sample_power=None"
        got = config.sample_power
    else:
        return
    raise OptionError(
        problem,
        expected=expected,
        got=got,
        remedy="set SearchSpace(pooled=..., gamma=...) for these, and proxy=False for samples",
    )


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(folder)
    lock.take()
    try:
        yield
    finally:
        lock.release()


def _check(
    folder: Path,
    config: CalibrationConfig,
    tuning: TuningConfig,
    inputs: Sequence[tuple[int, Mapping[str, Any]]],
) -> None:
    """Refuse a folder whose trials were of something else."""
    path = folder / "search.json"
    about = {name: getattr(tuning, name) for name in ("videos", "proxy", "seed")}
    about |= {"space": asdict(tuning.space)}
    about |= {name: getattr(config, name) for name in _OF_SELECTION}
    about |= {"inputs": [identity.describe({"seed": seed, **varying}) for seed, varying in inputs]}
    text = json.dumps(about, indent=2, sort_keys=True) + "\n"
    begun = finished(folder / JOURNAL) or RunStore(folder / "recording").names()
    if not begun or not path.exists():  # without anything finished it is nobody's
        write_text(path, text)
        return
    found = path.read_text(encoding="utf-8")
    if found != text:
        raise CalibrationError(
            f"{folder} holds another search",
            expected=found,
            got=text,
            remedy="search in another folder, or with the settings of this one; the number of "
            "trials and the goal may differ",
        )


def _write(found: Tuning, folder: Path) -> None:
    write_text(folder / "tuning.json", json.dumps(found.to_dict(), indent=2) + "\n")
    write_front(found, folder / "front.png")
    if found.plan is not None:
        found.plan.save(folder / "plan.calibatt")
