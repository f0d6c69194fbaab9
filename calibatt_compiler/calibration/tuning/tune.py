"""Search for the best plans of a model: fidelity against predicted time."""

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
from calibatt_compiler.calibration.select.zones.plans import zone_plan_from_run
from calibatt_compiler.calibration.store import identity
from calibatt_compiler.calibration.store.lock import FolderLock
from calibatt_compiler.calibration.store.run_folder import RunStore
from calibatt_compiler.calibration.tuning.config import TuningConfig, with_form
from calibatt_compiler.calibration.tuning.pareto import (
    Point,
    SearchPoint,
    Settings,
    StepTime,
    Tuning,
    ZonePoint,
    choose,
    cost_of,
)
from calibatt_compiler.calibration.tuning.picture import write_front
from calibatt_compiler.calibration.tuning.plan_server import PlanServer, served
from calibatt_compiler.calibration.tuning.study import (
    JOURNAL,
    MaskStudy,
    Study,
    finished,
)
from calibatt_compiler.calibration.tuning.trials import TIMING_STEPS, PlanEvaluator
from calibatt_compiler.calibration.tuning.zone_study import DensitySearch, ZoneStudy
from calibatt_compiler.calibration.validation.kept_mass import Validation
from calibatt_compiler.calibration.validation.validate import validate_run
from calibatt_compiler.errors import CalibrationError
from calibatt_compiler.evaluation.compare import Progress, Silent
from calibatt_compiler.files import check_folder, naming, write_text
from calibatt_compiler.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Iterator


OUTPUTS = ("plan.calibatt", "tuning.json", "front.png", "search.json", JOURNAL)
"""Files that a search writes into its folder."""

_OF_SELECTION = ("rho", "share_steps", "merge_budget")
"""Settings of a calibration that the stored energies don't depend on, but the trials do."""

_OF_ZONES = ("step_groups", "zone_numbers")
"""Likewise of zones."""


@dataclass(frozen=True)
class TuningCost:
    """What a search will cost.

    Attributes:
        recording: of the calibration that it goes by, with the sums or energies that it keeps.
        trials: how many are still to be run.
        videos: generated in each; 0 by proxy.
        zoned: whether zones are searched.
    """

    recording: Estimate
    trials: int
    videos: int
    zoned: bool

    @property
    def video_seconds(self) -> float:
        """Of one dense video as it is recorded, without decoding."""
        measured = self.recording.measured
        return measured.input_seconds + self.recording.steps * measured.step_seconds

    @property
    def trial_seconds(self) -> float:
        """Of the videos of one trial; making its plan from the recording is not in it."""
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
    config = _recording(config, tuning, folder)
    scored = _scored(config, tuning)
    recording = estimate(pipe, prompts, seeds, config=scored, **pipeline_arguments)
    missing = tuning.number(zoned=config.zoned) - finished(folder / JOURNAL)
    videos = 0 if tuning.proxy else tuning.videos
    return TuningCost(recording, max(0, missing), videos, config.zoned)


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
    """Search density of zones, or A, C, k and rho, for the best trade of fidelity against time.

    Calibrates once, for masks with energies, then makes each trial's plan from what was recorded.
    A trial generates videos of the first inputs under its plan and compares them with the dense
    ones; the model is compiled once for all plans. The same call goes on after a kill at any
    moment, and finds what an undisturbed search finds.

    The density of zones is tried where it is configured, then where it decides the goal if there
    is one, then evenly over the range; a range that has been tried all over ends the search.

    Writes into `out`: `tuning.json`, `front.png`, `study.journal` (an Optuna study), the recording,
    and `plan.calibatt` if a point reaches the goal.

    Args:
        pipe: see `calibrate`.
        prompts: see `calibrate`; trials are measured on the first of them.
        seeds: see `calibrate`.
        out: the folder of the search.
        config: how the model is calibrated, and by its `form` what is searched: zones, unless a
            setting of masks is given here or in `tuning`. `density`, or `A`, `C`, `k`, `rho`,
            `pooled` and `gamma`, are where the search begins; `inductor` is taken for on, also on
            a CPU.
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
    config = _recording(config, tuning, folder)
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
            progress.start("trials", tuning.number(zoned=config.zoned))
            points = search.run(evaluator, times, progress)
        chosen = choose(points, times, speed_up=tuning.speed_up, fidelity=tuning.fidelity)
        plan = None if chosen is None else search.plan(chosen.settings)
        found = Tuning(tuple(points), times, tuning.proxy, chosen, plan)
        _write(found, folder)
    return found


class _Search:
    """Makes plans of a recording and tries them."""

    def __init__(
        self, folder: Path, config: CalibrationConfig, tuning: TuningConfig, first: Plan
    ) -> None:
        self._journal = folder / JOURNAL
        self._recording = folder / "recording"
        self._config = config
        self._tuning = tuning
        self._first = first

    def plan(self, at: Settings) -> Plan:
        """Make a plan; what is not searched is as configured."""
        config = self._config
        if isinstance(at, ZonePoint):
            return zone_plan_from_run(
                self._recording,
                density=at.density,
                step_groups=config.step_groups,
                numbers=config.zone_numbers,
            )
        return plan_from_run(self._recording, at.selection(config))

    def ends(self) -> tuple[Plan, Plan]:
        """Make the sparsest and the densest plan of the search."""
        space = self._tuning.space
        if self._config.zoned:
            return self.plan(ZonePoint(space.density[0])), self.plan(ZonePoint(space.density[1]))
        sparse, dense = space.ends()
        return self.plan(sparse), self.plan(dense)

    def run(self, evaluator: PlanEvaluator, times: StepTime, progress: Progress) -> list[Point]:
        """Run the trials that are missing; return all."""
        study, number = self._study(times), self._tuning.number(zoned=self._config.zoned)
        points = study.points()
        for _ in points[:number]:
            progress.advance()
        while len(points) < number:
            point = study.trial(lambda at: self._try(at, evaluator))
            if point is None:
                break
            points.append(point)
            progress.advance()
        return points

    def _study(self, times: StepTime) -> Study:
        config, tuning = self._config, self._tuning
        if config.zoned:
            target = config.zones().target
            # Where an error is wanted, the first plan says how dense that is.
            start = target.wanted_density or round(self._first.density(), 4)
            goals = (tuning.speed_up, tuning.fidelity)
            search = DensitySearch(tuning.space.density, start, times, *goals)
            return ZoneStudy(self._journal, search)
        recorded = self._first.metadata.thresholds
        thresholds = recorded["A"], recorded["C"], recorded["k"]
        start_at = SearchPoint(*thresholds, config.rho, config.pooled, config.gamma)
        return MaskStudy(self._journal, tuning.space, start_at, tuning.seed)

    def _try(self, at: Settings, evaluator: PlanEvaluator) -> Point:
        plan = self.plan(at)
        fidelity = self._kept_mass(plan) if self._tuning.proxy else evaluator.fidelity(plan)
        return Point(at, fidelity, cost_of(plan), plan.density(), plan.digest)

    def _kept_mass(self, plan: Plan) -> float:
        found = validate_run(self._recording, plan)
        assert isinstance(found, Validation)
        return round(found.mean, 9)


def _recording(
    config: CalibrationConfig | None, tuning: TuningConfig, folder: Path
) -> CalibrationConfig:
    config = with_form(config or CalibrationConfig(), tuning)
    return replace(
        config,
        run_folder=folder / "recording",
        keep_energies=not config.zoned,
        keep_run=True,
        distributed=False,
    )


def _scored(config: CalibrationConfig, tuning: TuningConfig) -> CalibrationConfig:
    """Return settings of a recording that has scores if some trial may need them."""
    some = [value for value in tuning.space.gamma if value is not None]
    return replace(config, gamma=min(some, default=None))


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
    space = asdict(tuning.space)
    density = space.pop("density")
    about: dict[str, Any]
    if config.zoned:
        about = {"form": "zones", "videos": tuning.videos, "space": {"density": density}}
        about |= {name: getattr(config, name) for name in _OF_ZONES}
    else:
        about = {name: getattr(tuning, name) for name in ("videos", "proxy", "seed")}
        about |= {"space": space}
        about |= {name: getattr(config, name) for name in _OF_SELECTION}
        about |= {"sample_power": None}  # a removed setting: searches begun with it unset go on
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
