"""Options that several commands share, with their help; nothing heavy is imported for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from calibatt_compiler.cli.groups import ADVANCED

if TYPE_CHECKING:
    import torch

    from calibatt_compiler.evaluation.cases import Case
    from calibatt_compiler.plan import Plan

_VIDEO = "The video"
_HOW = "How sparse"
_WHERE = "Where it runs"


def option(
    panel: str | None, text: str, metavar: str | None = None, *names: str, **more: Any
) -> Any:
    """Return what typer needs of an option; without names it is called after its parameter."""
    return typer.Option(*names, help=text, metavar=metavar, rich_help_panel=panel, **more)


Model = Annotated[str, typer.Argument(help="Folder or Hub name of a pipeline.", show_default=False)]
PlanFile = Annotated[
    Path, typer.Argument(help="Plan file that `calibatt calibrate` wrote.", show_default=False)
]
Lowering = Annotated[
    str,
    option(
        ADVANCED,
        "baked: blocks written into generated kernels; table: one kernel that reads them; "
        "reference: slow and plain.",
    ),
]
_PROMPTS = 'One a line; or JSON (.jsonl: one a line) of texts or {"prompt": ..., "seed": ...}.'


@dataclass(frozen=True)
class Inputs:
    """Prompts and seeds."""

    prompts: Annotated[Path | None, option(None, _PROMPTS, "FILE")] = None
    prompt: Annotated[
        list[str] | None, option(None, "A prompt; may be given several times.", "TEXT")
    ] = None
    seed: Annotated[int, option(None, "Seed of the first prompt.", "N")] = 0

    def cases(self) -> list[Case]:
        """Read them."""
        from calibatt_compiler.cli.pipelines import read_cases

        return read_cases(self.prompts, self.prompt, self.seed)


HELD_OUT = Inputs(seed=1000)
"""Default of commands that measure: other seeds than those of calibration."""


@dataclass(frozen=True)
class Size:
    """Size and steps of a video."""

    height: Annotated[int | None, option(_VIDEO, "Pixels.", "N")] = None
    width: Annotated[int | None, option(_VIDEO, "Pixels.", "N")] = None
    frames: Annotated[int | None, option(_VIDEO, "Frames of the video.", "N")] = None
    steps: Annotated[int | None, option(_VIDEO, "Diffusion steps.", "N")] = None


@dataclass(frozen=True)
class Sampling:
    """What else a pipeline is given."""

    guidance: Annotated[
        float | None, option(_VIDEO, "Of classifier-free guidance; 1 is off.", "X")
    ] = None
    negative_prompt: Annotated[str | None, option(ADVANCED, "What the video should not be.")] = None
    settings: Annotated[
        list[str] | None,
        option(
            ADVANCED,
            "Any other argument of the pipeline, such as --set max_sequence_length=256; may be "
            "given several times.",
            "NAME=VALUE",
            "--set",
        ),
    ] = None

    def arguments(self, pipe: Any) -> dict[str, Any]:
        """Return those of the pipeline's call that were given."""
        from calibatt_compiler.cli.pipelines import pipeline_arguments

        return pipeline_arguments(pipe, self._named(), self.settings)

    def arguments_for(self, pipe: Any, plan: Plan) -> dict[str, Any]:
        """Return the same, size and steps of the plan where they were not given."""
        from calibatt_compiler.cli.pipelines import arguments_for_plan

        return arguments_for_plan(pipe, plan, self._named(), self.settings)

    def _named(self) -> dict[str, Any]:
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        del given["settings"]
        return {_IN_PIPELINES.get(name, name): value for name, value in given.items()}


_IN_PIPELINES = {
    "frames": "num_frames",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
}


@dataclass(frozen=True)
class Video(Sampling, Size):
    """The whole call of a pipeline."""


@dataclass(frozen=True)
class Device:
    """Where a pipeline is loaded."""

    device: Annotated[
        str, option(_WHERE, "cpu, cuda, cuda:N, or auto: a GPU if there is one.", "NAME")
    ] = "auto"
    dtype: Annotated[
        str,
        option(
            ADVANCED,
            "float32, bfloat16 or float16; auto is bfloat16 on a GPU, float32 on a CPU.",
            "NAME",
        ),
    ] = "auto"

    def place(self) -> torch.device:
        """Return the device."""
        from calibatt_compiler.cli.pipelines import device_of

        return device_of(self.device)

    def load(self, model: str, place: torch.device | None = None) -> Any:
        """Load a pipeline there, or at another place."""
        from calibatt_compiler.cli.pipelines import dtype_of, load_pipeline

        place = place or self.place()
        return load_pipeline(model, place, dtype_of(self.dtype, place))


@dataclass(frozen=True)
class Place(Device):
    """Where a pipeline is loaded, and which module of it is meant."""

    component: Annotated[str, option(ADVANCED, "Which transformer of the pipeline.")] = (
        "transformer"
    )


@dataclass(frozen=True)
class Observation:
    """What is observed; of `ObservationConfig` the settings of these names."""

    block: Annotated[int, option(_HOW, "Tokens a block.", "N")] = 128
    queries: Annotated[
        int,
        option(
            ADVANCED,
            "Take the energies of every N-th query only. On a GPU where one kernel gives them "
            "with attention, all queries cost least.",
            "N",
            min=1,
        ),
    ] = 1
    token_order: Annotated[
        str,
        option(
            ADVANCED,
            "Cut blocks from tokens in raster order; tile by tile: frames x height x width of a "
            "tile in latent tokens, such as 2x8x8; from strips along one axis, such as 2x8xall; "
            "or auto: measure such orders on the first two prompts, take the sparsest that pays.",
            "ORDER",
        ),
    ] = "raster"
    anchor_rows: Annotated[
        int,
        option(
            ADVANCED,
            "Rows of each frame that a row-shared head computes; the others copy them.",
            "ROWS",
        ),
    ] = 5

    def of_config(self) -> dict[str, Any]:
        """Return them as settings of `CalibrationConfig`."""
        return {**vars(self), "block": (self.block, self.block)}


@dataclass(frozen=True)
class Selection:
    """How blocks are selected; of `SelectionConfig` the settings of these names."""

    A: Annotated[
        float | None,
        option(
            _HOW,
            "Of masks: attention to keep at late steps, 0 to 1: lower is sparser. Default 0.84, "
            "or 0.763 up to 8 steps.",
            "SHARE",
            "--A",
        ),
    ] = None
    C: Annotated[
        float | None,
        option(
            ADVANCED,
            "Share to keep at the first, noisiest step. Default 0.99, or 0.863 up to 8 steps.",
            "SHARE",
            "--C",
        ),
    ] = None
    k: Annotated[
        float | None,
        option(
            ADVANCED,
            "How fast the share falls from C to A. Default 16, or 5.64 up to 8 steps.",
            "RATE",
        ),
    ] = None
    rho: Annotated[
        float,
        option(ADVANCED, "A block is kept if this share of the prompts needs it.", "SHARE"),
    ] = 0.5
    share_steps: Annotated[
        float,
        option(
            ADVANCED,
            "Consecutive steps whose masks agree this much (intersection over union) share one: a "
            "smaller plan. 1 shares equal masks only.",
            "IOU",
        ),
    ] = 0.97
    merge_budget: Annotated[
        float | None,
        option(
            ADVANCED,
            "Fill the smallest gaps between kept blocks, up to this share of all blocks, such as "
            "0.02: fewer runs to walk, more blocks to compute. Default: none.",
            "DENSITY",
        ),
    ] = None
    pooled: Annotated[
        int,
        option(
            ADVANCED,
            "Let each dropped block take part as this many mean keys, such as 1 or 4, instead of "
            "not at all. It costs KEYS / BLOCK of dense attention.",
            "KEYS",
        ),
    ] = 0
    gamma: Annotated[
        float | None,
        option(
            ADVANCED,
            "Let a head compute a few rows of each frame and copy the others where its rows attend "
            "alike by this score or more, that is cheaper, and its output error is no larger; "
            "0.87 is the paper's. Default: no head does.",
            "SCORE",
        ),
    ] = None
    form: Annotated[
        str | None,
        option(
            _HOW,
            "zones (default) or masks.",
            "FORM",
        ),
    ] = None
    density: Annotated[
        float | None, option(_HOW, "Of zones: blocks to keep. Default 0.25.", "SHARE")
    ] = None
    speed_up: Annotated[
        float | None,
        option(
            ADVANCED,
            "Of zones, instead: how many times as fast a step is to be, predicted from "
            "--attention-share.",
            "FACTOR",
            "--speed-up",
        ),
    ] = None
    error: Annotated[
        float | None,
        option(
            ADVANCED,
            "Of zones, instead: expected relative error of attention's output, such as 0.2.",
            "ERROR",
        ),
    ] = None
    attention_share: Annotated[
        float | None,
        option(
            ADVANCED,
            "Share of a dense step's time that self-attention takes, for --speed-up.",
            "SHARE",
            "--attention-share",
        ),
    ] = None


@dataclass(frozen=True)
class Storage:
    """What stays of the run."""

    coarse_energies: Annotated[
        bool,
        option(
            ADVANCED,
            "Keep block energies in a byte each, 8 times the size of the masks: to select again.",
            None,
            "--coarse-energies",
        ),
    ] = False
    keep_energies: Annotated[
        bool,
        option(
            ADVANCED,
            "Keep block energies exactly, 32 times the size of the masks: to select again with "
            "other thresholds, or to validate another plan on these inputs.",
            None,
            "--keep-energies",
        ),
    ] = False
    restart: Annotated[
        bool,
        option(
            ADVANCED,
            "Forget what an interrupted run has done, and start again.",
            None,
            "--restart",
        ),
    ] = False

    def of_config(self) -> dict[str, Any]:
        """Return them as settings of `CalibrationConfig`."""
        coarse = "coarse" if self.coarse_energies else False
        return {"keep_energies": self.keep_energies or coarse, "restart": self.restart}


def texts_and_seeds(cases: Sequence[Case]) -> dict[str, Any]:
    """Return prompts and seeds as `calibrate` and its kin take them."""
    return {
        "prompts": [case.prompt for case in cases],
        "seeds": [case.seed for case in cases],
    }
