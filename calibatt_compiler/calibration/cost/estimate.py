"""What a calibration will cost, before it runs: time, memory, disk."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from calibatt_compiler.calibration.config import AUTO, CalibrationConfig, checked_config
from calibatt_compiler.calibration.cost import zones
from calibatt_compiler.calibration.cost.first_step import FirstStepClock
from calibatt_compiler.calibration.cost.order_search import (
    survey_bytes,
    surveyed_count,
    surveyed_step_seconds,
)
from calibatt_compiler.calibration.cost.sizes import Sizes
from calibatt_compiler.calibration.observe.pipelines import (
    ObservedPipeline,
    Prompt,
    read_inputs,
    samples_of,
)
from calibatt_compiler.calibration.observe.recorder import AttentionRecorder
from calibatt_compiler.calibration.order_search.candidates import INPUTS
from calibatt_compiler.calibration.order_search.search import describe
from calibatt_compiler.calibration.pipeline import about_pipeline, run_folder
from calibatt_compiler.calibration.store import identity
from calibatt_compiler.calibration.store.energies import EnergyBuffer
from calibatt_compiler.calibration.store.order_survey import stored
from calibatt_compiler.calibration.store.ranks import Ranks
from calibatt_compiler.calibration.store.records import InputRecord
from calibatt_compiler.calibration.store.run_folder import RunStore, identity_text, record_text
from calibatt_compiler.model.families import cfg_mode
from calibatt_compiler.plan.order import RASTER


@dataclass(frozen=True)
class Measurement:
    """One step of one input, as calibration runs it.

    Attributes:
        step_seconds: of the step, with all branches of guidance and the recording.
        input_seconds: from the start of the input to its first attention call.
        warm_up_seconds: what the very first step took longer: compiling.
        scoring_seconds: what a step takes longer where spatial repetition is scored.
        device_bytes: most that the GPU held, model included; None on a CPU.
        record: of the input, as if all its steps had been run.
    """

    step_seconds: float
    input_seconds: float
    warm_up_seconds: float
    device_bytes: int | None
    record: InputRecord
    scoring_seconds: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """What a calibration will cost.

    Times are those of one measured step; sizes follow from shapes. Memory is an upper bound on
    what calibration takes beside the model and beside what generating takes anyway.

    Attributes:
        inputs: how many there are.
        finished: how many of them an earlier run has left done.
        steps: diffusion steps an input; all of the sampler's, though a model may serve fewer.
        sites: attention calls that are observed.
        measured: the step that was run.
        device_bytes: memory on the model's device, which may be the host.
        host_bytes: memory of the host, `device_bytes` included if the model is there.
        run_bytes: of the folder of finished inputs; 0 if it does not stay.
        plan_bytes: of the plan's file, at most: steps may share patterns.
        processes: that share the inputs; each needs the memory.
        scored: inputs still to be run that are scored for spatial repetition.
        survey_seconds: of the survey of token orders still to be made; 0 without one.
        input_bytes: that a process writes for each input of a run for zones, over what it wrote
            before, so that files do not grow; 0 for masks.
    """

    inputs: int
    finished: int
    steps: int
    sites: int
    measured: Measurement
    device_bytes: int
    host_bytes: int
    run_bytes: int
    plan_bytes: int
    processes: int = 1
    scored: int = 0
    survey_seconds: float = 0.0
    input_bytes: int = 0

    @property
    def seconds(self) -> float:
        """Time of the inputs still to be run; reading and writing of files is not in it."""
        todo = self.inputs - self.finished
        if todo == 0:
            return self.survey_seconds
        each = self.measured.input_seconds + self.steps * self.measured.step_seconds
        scoring = self.steps * self.measured.scoring_seconds
        shares = math.ceil(todo / self.processes), math.ceil(self.scored / self.processes)
        recording = shares[0] * each + shares[1] * scoring
        return self.survey_seconds + recording + self.measured.warm_up_seconds

    @property
    def disk_bytes(self) -> int:
        """Bytes of all files that will lie there when it is done."""
        return self.run_bytes + self.plan_bytes


def estimate(
    pipe: Any,
    prompts: Sequence[Prompt],
    seeds: int | Sequence[int] = 0,
    *,
    out: str | os.PathLike[str] | None = None,
    config: CalibrationConfig | None = None,
    **pipeline_arguments: Any,
) -> Estimate:
    """Tell what `calibrate` with the same arguments will cost.

    Runs two steps of the first input as calibration would, one to compile and one to measure, two
    more with scores if there are any, two more if token orders are to be surveyed, and writes
    nothing. The pipeline is left as it was.

    Raises:
        CalibrationError: the pipeline can't be calibrated.
        OptionError: prompts, seeds or arguments that can't be used.
    """
    config = checked_config(config)
    inputs = read_inputs(prompts, seeds, pipeline_arguments, pipe)
    arguments = identity.describe(pipeline_arguments)
    model = ObservedPipeline.of(pipe, config)
    surveyed = config.token_order == AUTO
    recording = replace(config, token_order=str(RASTER)) if surveyed else config
    measured = measure_step(replace(model, config=recording), inputs[0], pipeline_arguments)
    record = measured.record
    scored = min(config.similarity_inputs, len(inputs)) if config.gamma is not None else 0
    sizes = Sizes(record, config.keep_energies, config.anchor_rows if scored else 0)
    about = about_pipeline(pipe)
    whole = identity.of_run(model.module, config, about, cfg_mode(pipe), arguments)
    run_bytes = records_bytes = len(identity_text(whole).encode())
    for index, (seed, varying) in enumerate(inputs):
        what = identity.describe({"seed": seed, **varying})
        run_bytes += sizes.input_bytes(f"{index:05d}", what, scored=index < scored)
        records_bytes += len(record_text(record.model_copy(update={"about": what})).encode())
    folder = run_folder(config, out)
    survey_seconds = 0.0
    if surveyed:
        first = inputs[:INPUTS]
        run_bytes += survey_bytes(describe(first), record)
        if folder is None or config.restart or stored(folder) is None:
            count = surveyed_count(record)
            each = surveyed_step_seconds(model, inputs[0], pipeline_arguments)
            dense = (len(record.timesteps) - count) * measured.step_seconds
            one = measured.input_seconds + dense + count * each
            survey_seconds = measured.warm_up_seconds + len(first) * one
    parameter = next(model.module.parameters())
    working = sizes.working_bytes(parameter.element_size(), parameter.device)
    thresholds = {**record.thresholds, "rho": config.rho}
    if config.gamma is not None:
        thresholds |= {"gamma": config.gamma, "anchor_rows": float(config.anchor_rows)}
    thresholds |= config.refiner().thresholds()
    host_bytes = sizes.host_bytes()
    plan_bytes = sizes.plan_bytes(thresholds, len(inputs))
    processes = Ranks.current().size if config.distributed else 1
    input_bytes = 0
    if config.zoned:
        groups = min(config.step_groups, record.schedule_steps)
        run_bytes = records_bytes + zones.sums_bytes(record, groups, processes, len(inputs))
        input_bytes = zones.input_bytes(record, groups, processes, len(inputs))
        host_bytes = zones.host_bytes(record, groups)
        plan_bytes = zones.plan_bytes(record, config)
    return Estimate(
        inputs=len(inputs),
        finished=_finished(folder, config, len(inputs)),
        steps=len(record.timesteps),
        sites=len(record.sites),
        measured=measured,
        device_bytes=working,
        host_bytes=host_bytes + (working if parameter.device.type == "cpu" else 0),
        run_bytes=run_bytes if folder is not None and config.keep_run else 0,
        plan_bytes=0 if out is None else plan_bytes,
        processes=processes,
        scored=scored - _finished(folder, config, scored),
        survey_seconds=survey_seconds,
        input_bytes=input_bytes,
    )


def measure_step(
    model: ObservedPipeline,
    one: tuple[int, Mapping[str, Any]],
    pipeline_arguments: Mapping[str, Any],
) -> Measurement:
    """Run the first step of an input twice, the second time by the clock; with scores again.

    Args:
        model: what is observed.
        one: seed and arguments of the input.
        pipeline_arguments: of all inputs.

    Raises:
        CalibrationError: nothing can be observed.
    """
    device = next(model.module.parameters()).device
    clock = FirstStepClock(device)
    with tempfile.TemporaryDirectory(prefix="calibatt-") as folder:
        model = replace(model, on_step=clock.on_step)
        probe = _Probe(model, EnergyBuffer(Path(folder) / "energies"))
        seed, varying = one
        arguments = {**pipeline_arguments, **varying}
        with model.shown_to(probe):
            laps: list[tuple[float, ...]] = []
            for scored in (False, False) + (True, True) * (model.config.gamma is not None):
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                clock.ticks.clear()
                probe.begin("00000", {}, samples_of(arguments), scored=scored)
                clock.tick()
                clock.run(model.pipe, seed, arguments)
                record = probe.whole()
                laps.append(tuple(clock.ticks))
    steps = [end - first for _, first, end in laps]
    wholes = [end - start for start, _, end in laps]
    pairs = zip(wholes[::2], wholes[1::2], strict=True)
    return Measurement(
        step_seconds=steps[1],
        input_seconds=wholes[1] - steps[1],
        warm_up_seconds=sum(max(0.0, cold - warm) for cold, warm in pairs),
        device_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        record=record.model_copy(update={"anchor_rows": 0}),
        scoring_seconds=max(0.0, steps[-1] - steps[1]),
    )


_LONG: Any = 1 / 3
"""A share with as many digits as a measured one."""


class _Probe(AttentionRecorder):
    """A recorder whose input ends after its first step."""

    def whole(self) -> InputRecord:
        """Forget the input; return its record as if every step had been like the first."""
        run = self._input
        assert run is not None
        if not run.votes:
            run.check_complete(self._skips)  # says why nothing was observed
        timesteps = run.schedule.timesteps if run.schedule else tuple(run.timesteps)
        for site, _ in list(run.votes):
            for step in range(len(timesteps)):
                run.votes[site, step] = run.votes[site, 0]
                run.kept_mass[site, step] = run.best_share[site, step] = _LONG * run.votes[site, 0]
        run.timesteps = list(timesteps)
        run.positions = list(range(len(timesteps)))
        record = self._record(run, self._steps(run) or len(timesteps))
        self.abandon()
        return record


def _finished(folder: Path | None, config: CalibrationConfig, inputs: int) -> int:
    if folder is None or config.restart or not folder.is_dir():
        return 0
    store = RunStore(folder)
    return sum(store.has(f"{index:05d}") for index in range(inputs))
