"""`calibatt tune`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from calibatt_compiler.cli import options

_SEARCH = "The search"


def tune(
    model: options.Model,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the search.", show_default=False)
    ],
    prompts: options.Prompts = None,
    prompt: options.Prompt = None,
    seed: options.Seed = 0,
    height: options.Height = None,
    width: options.Width = None,
    frames: options.Frames = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    negative_prompt: options.NegativePrompt = None,
    settings: options.Settings = None,
    speed_up: Annotated[
        float | None,
        typer.Option(
            "--speed-up",
            help="Choose the most faithful plan that makes a step at least this much faster than "
            "dense, such as 1.3.",
            rich_help_panel=_SEARCH,
            show_default=False,
        ),
    ] = None,
    psnr: Annotated[
        float | None,
        typer.Option(
            "--psnr",
            help="Choose the fastest plan of at least this PSNR in dB, such as 30.",
            rich_help_panel=_SEARCH,
            show_default=False,
        ),
    ] = None,
    trials: Annotated[
        int,
        typer.Option(
            min=1,
            help="How many plans to try, those of an interrupted search included.",
            rich_help_panel=_SEARCH,
        ),
    ] = 40,
    videos: Annotated[
        int,
        typer.Option(
            min=1,
            help="Videos that each trial generates, of the first prompts.",
            rich_help_panel=_SEARCH,
        ),
    ] = 1,
    proxy: Annotated[
        bool,
        typer.Option(
            "--proxy",
            help="Generate no videos: go by the share of attention mass that a plan keeps.",
            rich_help_panel=_SEARCH,
        ),
    ] = False,
    pooled: Annotated[
        str,
        typer.Option(
            metavar="KEYS,...",
            help="Numbers of mean keys for each dropped block to choose from, such as 0,1,4.",
            rich_help_panel=_SEARCH,
        ),
    ] = "0",
    gamma: Annotated[
        str,
        typer.Option(
            metavar="SCORE,...",
            help="Scores for repetitive heads to choose from, as of calibatt calibrate, and off "
            "for none, such as off,0.8,0.87.",
            rich_help_panel=_SEARCH,
        ),
    ] = "off",
    anchor_rows: options.AnchorRows = 5,
    search_seed: Annotated[
        int, typer.Option("--search-seed", min=0, help="Seed.", rich_help_panel=_SEARCH)
    ] = 0,
    block: Annotated[int, typer.Option(help="Tokens a block, for queries and keys.")] = 128,
    token_order: Annotated[
        str, typer.Option(metavar="ORDER", help="As of calibatt calibrate.")
    ] = "raster",
    component: options.Component = "transformer",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before it starts.")] = False,
) -> None:
    """Search the thresholds A, C, k and rho: fidelity against predicted time.

    Records the prompts once, with energies, then tries plans made from them: each generates a
    video and is compared with the dense one. The folder gets front.png, tuning.json and, with
    --speed-up or --psnr, plan.calibatt. Says first what it will cost. An interrupted search goes on
    if the same command is given again.

    Example: calibatt tune ./wan --prompts prompts.txt --steps 50 --speed-up 1.3 --out search
    """
    from rich.console import Console

    from calibatt_compiler.calibration import CalibrationConfig, TuningConfig, tuning_cost
    from calibatt_compiler.calibration import tune as run
    from calibatt_compiler.calibration.store.run_folder import RunStore
    from calibatt_compiler.calibration.tuning.study import JOURNAL, SearchSpace, finished
    from calibatt_compiler.cli import pipelines
    from calibatt_compiler.cli.interruption import said_if_interrupted
    from calibatt_compiler.cli.progress import TerminalProgress
    from calibatt_compiler.cli.tables import tuning as report
    from calibatt_compiler.errors import OptionError

    if proxy and psnr is not None:
        raise OptionError(
            "a search by proxy generates no video",
            expected="--speed-up with --proxy",
            got="--psnr",
            remedy="leave --proxy out",
        )
    keys, scores = _numbers(pooled), _scores(gamma)
    config = CalibrationConfig(
        pooled=keys[0],
        gamma=scores[0],
        anchor_rows=anchor_rows,
        block=(block, block),
        token_order=token_order,
        component=component,
    )
    tuning = TuningConfig(
        trials=trials,
        videos=videos,
        proxy=proxy,
        space=SearchSpace(pooled=keys, gamma=scores),
        seed=search_seed,
        speed_up=speed_up,
        fidelity=psnr,
    )
    cases = pipelines.read_cases(prompts, prompt, seed)
    place = pipelines.device_of(device)
    pipe = pipelines.load_pipeline(model, place, pipelines.dtype_of(dtype, place))
    named = {
        "height": height,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "negative_prompt": negative_prompt,
    }
    arguments = pipelines.pipeline_arguments(pipe, named, settings)
    texts, seeds = [case.prompt for case in cases], [case.seed for case in cases]
    common = {"out": out, "config": config, "tuning": tuning, **arguments}
    console = Console(highlight=False, soft_wrap=True)
    console.print(report.cost_table(tuning_cost(pipe, texts, seeds, **common)))
    if not yes and sys.stdin.isatty():
        typer.confirm("Start?", abort=True)

    def kept() -> str:
        inputs = len(RunStore(out / "recording").names())
        return (
            f"{inputs} of {len(cases)} recorded inputs and {finished(out / JOURNAL)} of {trials} "
            f"trials are kept in {out}; the same command goes on"
        )

    with said_if_interrupted(kept), TerminalProgress() as progress:
        found = run(pipe, texts, seeds, progress=progress, **common)
    console.print(report.front_table(found))
    console.print(f"the front: {out / 'front.png'}, {out / 'tuning.json'}")
    if found.chosen is not None:
        console.print(f"the chosen plan: {out / 'plan.calibatt'}")
    elif speed_up is not None or psnr is not None:
        console.print("no trial reached the goal")
        raise typer.Exit(1)


def _scores(text: str) -> tuple[float | None, ...]:
    from calibatt_compiler.errors import OptionError

    try:
        return tuple(None if word == "off" else float(word) for word in text.split(","))
    except ValueError as error:
        raise OptionError(
            "--gamma takes scores",
            expected="numbers and off with commas between, such as off,0.8,0.87",
            got=text,
            remedy="leave it out for no repetitive heads",
        ) from error


def _numbers(text: str) -> tuple[int, ...]:
    from calibatt_compiler.errors import OptionError

    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise OptionError(
            "--pooled takes numbers",
            expected="numbers of keys with commas between, such as 0,1,4",
            got=text,
            remedy="leave it out to drop blocks as they are",
        ) from error
