"""Options that several commands share, with their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_VIDEO = "The video"
HOW_SPARSE = "How sparse"
_WHERE = "Where it runs"

Model = Annotated[
    str,
    typer.Argument(
        help="Folder of a diffusers text-to-video pipeline, or its name on the Hugging Face Hub.",
        show_default=False,
    ),
]
PlanFile = Annotated[
    Path, typer.Argument(help="Plan file that `calibatt calibrate` wrote.", show_default=False)
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        help="File of prompts: text with one a line, or JSON: a list of texts or of "
        '{"prompt": ..., "seed": ...}; .jsonl has one of them a line.',
        show_default=False,
    ),
]
Prompt = Annotated[
    list[str] | None,
    typer.Option("--prompt", help="A prompt; may be given several times.", show_default=False),
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed",
        help="Seed of the first prompt; each further prompt takes the next number, "
        "unless the file names its own.",
    ),
]
Height = Annotated[
    int | None,
    typer.Option("--height", help="Pixels.", rich_help_panel=_VIDEO, show_default=False),
]
Width = Annotated[
    int | None,
    typer.Option("--width", help="Pixels.", rich_help_panel=_VIDEO, show_default=False),
]
Frames = Annotated[
    int | None,
    typer.Option(
        "--frames", help="Frames of the video.", rich_help_panel=_VIDEO, show_default=False
    ),
]
Steps = Annotated[
    int | None,
    typer.Option("--steps", help="Diffusion steps.", rich_help_panel=_VIDEO, show_default=False),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        "--guidance",
        help="Scale of classifier-free guidance; 1 switches it off.",
        rich_help_panel=_VIDEO,
        show_default=False,
    ),
]
NegativePrompt = Annotated[
    str | None,
    typer.Option(
        "--negative-prompt",
        help="What the video should not be.",
        rich_help_panel=_VIDEO,
        show_default=False,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Any other argument of the pipeline, such as --set max_sequence_length=256; "
        "may be given several times.",
        rich_help_panel=_VIDEO,
        show_default=False,
    ),
]
AnchorRows = Annotated[
    int,
    typer.Option(
        "--anchor-rows",
        metavar="ROWS",
        help="Rows of each frame that a repetitive head computes; the others copy them.",
        rich_help_panel=HOW_SPARSE,
    ),
]
Component = Annotated[
    str,
    typer.Option("--component", help="Which transformer of the pipeline.", rich_help_panel=_WHERE),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        help="cpu, cuda or cuda:N; auto takes a GPU if there is one.",
        rich_help_panel=_WHERE,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="float32, bfloat16 or float16; auto is bfloat16 on a GPU, float32 on a CPU.",
        rich_help_panel=_WHERE,
    ),
]
Lowering = Annotated[
    str,
    typer.Option(
        "--lowering",
        help="baked: blocks written into generated kernels; table: one "
        "kernel that reads them; reference: slow and plain.",
        rich_help_panel=_WHERE,
    ),
]
