"""Videos of one pipeline by one method after another, and the dense ones, kept in a folder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from fidelity_study.perceptual import Frames
from fidelity_study.serve import Dense, Method, Switch
from fidelity_study.setting import Setting, name_of

from calibatt_compiler.calibration.observe.pipelines import generate
from calibatt_compiler.evaluation.cases import Case
from calibatt_compiler.evaluation.compare import to_bytes
from calibatt_compiler.files import replacing


class OutOfTimeError(Exception):
    """The time that a run was given is over; the next run goes on."""


class Videos:
    """What a study of videos has and does.

    Attributes:
        pipe: a diffusers pipeline on its device.
        setting: arguments and prompts.
        folder: where dense videos are kept.
        deadline: of `time.monotonic`, after which no video is begun.
        switch: what the pipeline's transformer is compiled with.
    """

    pipe: Any
    setting: Setting
    folder: Path
    deadline: float
    switch: Switch

    def _dense(self, case: Case) -> Frames:
        """Return the dense video of a case, generated once."""
        path = self.folder / f"dense-{name_of(case)}.npy"
        if not path.exists():
            self._check_time(f"the dense video of {case.prompt!r}")
            frames = self._video(case, Dense())
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.save(file, frames, allow_pickle=False)
        found: Frames = np.load(path, allow_pickle=False)
        return found

    def _video(self, case: Case, method: Method) -> Frames:
        """Generate one video with a method; uint8 (frames, height, width, 3)."""
        self.switch.method = method
        arguments = {**self.setting.arguments, "prompt": case.prompt, "output_type": "np"}
        output = generate(self.pipe, case.seed, arguments)
        return to_bytes(np.asarray(output.frames[0]))

    def _check_time(self, what: str) -> None:
        if time.monotonic() > self.deadline:
            raise OutOfTimeError(what)
