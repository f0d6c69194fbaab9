"""What one plan of a search is worth: fidelity of its videos, or its proxy, and step times."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from calibatt_compiler.calibration.observe.pipelines import generate
from calibatt_compiler.calibration.tuning.pareto import CEILING, StepTime, cost_of
from calibatt_compiler.calibration.tuning.plan_server import PlanServer
from calibatt_compiler.evaluation.compare import to_bytes
from calibatt_compiler.evaluation.quality import Frames, psnr
from calibatt_compiler.evaluation.timing import DenoisingStep, spread, time_steps, watching
from calibatt_compiler.files import replacing, write_text
from calibatt_compiler.plan import Plan

TIMED_STEPS, ROUNDS = 3, 5
TIMING_STEPS = 3 * TIMED_STEPS * (ROUNDS + 1)
"""Denoising steps that measuring the times takes: dense and two plans, a first round extra."""

Input = tuple[int, Mapping[str, Any]]


class PlanEvaluator:
    """Runs a pipeline whose model serves one plan after the other.

    Args:
        pipe: the pipeline, holding `model`.
        model: compiled for `server`.
        server: decides what the model computes.
        inputs: seed and own arguments of each video.
        arguments: common to all.
        folder: where dense videos and times are kept, for a search that goes on.
    """

    def __init__(
        self,
        pipe: Any,
        model: nn.Module,
        server: PlanServer,
        inputs: Sequence[Input],
        arguments: Mapping[str, Any],
        folder: Path,
    ) -> None:
        self._pipe = pipe
        self._model = model
        self._server = server
        self._inputs = inputs
        self._arguments = arguments
        self._folder = folder

    def fidelity(self, plan: Plan) -> float:
        """Mean PSNR in dB of the plan's videos against the dense ones, each at most `CEILING`."""
        values = []
        for index in range(len(self._inputs)):
            dense = self._dense(index)
            self._server.forget()
            values.append(min(CEILING, psnr(dense, self._video(plan, index))))
        return statistics.fmean(values)

    def times(self, ends: Callable[[], tuple[Plan, Plan]]) -> StepTime:
        """Return the times of a step, measured once a search: dense and under two plans.

        Args:
            ends: makes the sparsest and the densest plan of the search.
        """
        path = self._folder / "times.json"
        if path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))
            return StepTime(stored["dense"], tuple(stored["costs"]), tuple(stored["seconds"]))
        found = self._measure(ends())
        write_text(path, json.dumps(asdict(found), indent=2) + "\n")
        return found

    def _measure(self, plans: tuple[Plan, Plan]) -> StepTime:
        with watching(self._model, keep=True) as watch:
            self._video(None, 0)
        steps: list[DenoisingStep] = watch.steps
        self._server.forget()
        variants: dict[str, nn.Module] = {
            name: _Under(self._model, self._server, plan)
            for name, plan in (("dense", None), ("sparse", plans[0]), ("rich", plans[1]))
        }
        timed = {index: steps[index] for index in spread(len(steps), TIMED_STEPS)}
        device = next(self._model.parameters()).device
        times = time_steps(variants, timed, rounds=ROUNDS, device=device)
        self._server.forget()
        return StepTime(
            dense=times.median("dense"),
            costs=(cost_of(plans[0]), cost_of(plans[1])),
            seconds=(times.median("sparse"), times.median("rich")),
        )

    def _dense(self, index: int) -> Frames:
        path = self._folder / f"dense-{index:02d}.npy"
        if not path.exists():
            frames = self._video(None, index)
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.save(file, frames, allow_pickle=False)
        return cast(Frames, np.load(path, allow_pickle=False))

    def _video(self, plan: Plan | None, index: int) -> Frames:
        seed, varying = self._inputs[index]
        self._server.use(plan)
        arguments = {**self._arguments, **varying, "output_type": "np"}
        return to_bytes(np.asarray(generate(self._pipe, seed, arguments).frames[0]))


class _Under(nn.Module):
    """The model under one plan, as something that can be timed."""

    def __init__(self, model: nn.Module, server: PlanServer, plan: Plan | None) -> None:
        super().__init__()
        self._model = model
        self._server = server
        self._plan = plan

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        self._server.use(self._plan)
        return self._model(*args, **kwargs)
