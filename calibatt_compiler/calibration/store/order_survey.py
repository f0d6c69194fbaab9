"""What a run folder holds of the search for a token order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from calibatt_compiler.errors import CalibrationError
from calibatt_compiler.files import write_text
from calibatt_compiler.plan.order import DENSITY, ERROR, said

FILE = "order.json"
"""Of the run folder: the survey of its first inputs."""


class OrderSurvey(BaseModel):
    """What a survey has measured.

    Attributes:
        format: of the file.
        inputs: what the surveyed inputs were, as JSON values.
        steps: places in the sampler's schedule that were measured at.
        density: by order, kept blocks / all blocks over these steps and all sites.
        error: by order, relative error of attention's output where each order keeps as many blocks
            as raster's, over sampled query blocks of the same calls.
        held_out: whether the masks of that output were chosen on another input.
        sites: density by order and site.
        chosen: the order that the calibration takes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    format: Literal[1] = 1
    inputs: Any
    steps: tuple[int, ...]
    density: dict[str, float] = Field(min_length=1)
    error: dict[str, float]
    held_out: bool
    sites: dict[str, dict[str, float]]
    chosen: str

    def text(self) -> str:
        """Return the content of the file."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"

    def write(self, folder: Path) -> None:
        """Store it in a run folder."""
        write_text(folder / FILE, self.text())

    def __str__(self) -> str:
        one = "" if self.held_out else "; of one input's own masks, not judged on another"
        return f"token order {self.chosen}; {said(self.density, self.error)}{one}"


def stored(folder: Path) -> OrderSurvey | None:
    """Return the survey of a run folder, or None if it has none.

    Raises:
        CalibrationError: it is damaged.
    """
    path = folder / FILE
    try:
        survey = OrderSurvey.model_validate_json(path.read_text(encoding="utf-8"))
        if survey.chosen not in survey.density:
            raise ValueError(f"{survey.chosen} is chosen but was not measured")
    except FileNotFoundError:
        return None
    except (pydantic.ValidationError, ValueError) as error:
        raise CalibrationError(
            "the survey of token orders is damaged",
            expected=f"{path} as it was written",
            got=str(error),
            remedy="restart the run (--restart, CalibrationConfig(restart=True))",
        ) from error
    return survey


def figures(folder: Path) -> dict[str, float]:
    """Return what a plan's `quality` says of the survey of a run folder; empty without one."""
    survey = stored(folder)
    if survey is None:
        return {}
    return {
        **{f"{DENSITY}{name}": value for name, value in survey.density.items()},
        **{f"{ERROR}{name}": value for name, value in survey.error.items()},
    }
