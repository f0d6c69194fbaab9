"""The command `calibatt tune`: searches plans for a speed-up or a fidelity."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from calibatt_compiler.cli import options
from calibatt_compiler.cli.groups import grouped
from calibatt_compiler.cli.options import option
from calibatt_compiler.files import check_folder
from calibatt_compiler.printable import printable

_SEARCH = "The search"


@grouped
def tune(
    model: options.Model,
    out: Annotated[Path, option(None, "Folder of the search.", "FOLDER", "--out", "-o")],
    inputs: options.Inputs,
    video: options.Video,
    observation: options.Observation,
    place: options.Place,
    speed_up: Annotated[
        float | None,
        option(
            _SEARCH,
            "Choose the most faithful plan that makes a step at least this much faster than dense, "
            "such as 1.3.",
        ),
    ] = None,
    psnr: Annotated[
        float | None,
        option(_SEARCH, "Choose the fastest plan of at least this PSNR in dB, such as 30."),
    ] = None,
    form: Annotated[
        str | None,
        option(
            _SEARCH,
            "Search zones, by their density, or the paper's masks, by A, C, k and rho. Default: "
            "zones, unless an option of masks is given.",
            "FORM",
        ),
    ] = None,
    trials: Annotated[
        int | None,
        option(
            _SEARCH,
            "How many plans to try, those of an interrupted search included. Default 12, of "
            "masks 40.",
            min=1,
        ),
    ] = None,
    videos: Annotated[
        int, option(_SEARCH, "Videos that each trial generates, of the first prompts.", min=1)
    ] = 1,
    proxy: Annotated[
        bool,
        option(
            _SEARCH,
            "Of masks: generate no videos, go by the share of attention mass that a plan keeps. It "
            "says nothing of zones, which leave nothing out on average.",
            None,
            "--proxy",
        ),
    ] = False,
    pooled: Annotated[
        str,
        option(
            _SEARCH,
            "Of masks: numbers of mean keys for each dropped block to choose from, such as 0,1,4.",
            "KEYS,...",
        ),
    ] = "0",
    gamma: Annotated[
        str,
        option(
            _SEARCH,
            "Of masks: scores for row-shared heads to choose from, as of calibatt calibrate, and "
            "off for none, such as off,0.8,0.87.",
            "SCORE,...",
        ),
    ] = "off",
    search_seed: Annotated[int, option(_SEARCH, "Of masks: seed of the search.", min=0)] = 0,
    yes: Annotated[bool, option(None, "Do not ask before it starts.", None, "--yes", "-y")] = False,
) -> None:
    """Search the density of zones, or the thresholds of masks: fidelity against predicted time.

    Records the prompts once, then tries plans made from that: each
    generates a video and is compared with the dense one. The folder gets
    front.png, tuning.json and, with --speed-up or --psnr, plan.calibatt.
    Says first what it will cost. The same command goes on with an
    interrupted search.

    Example: calibatt tune ./wan --prompts prompts.txt --steps 50
    --speed-up 1.3 --out search
    """
    from calibatt_compiler.calibration import CalibrationConfig, TuningConfig, tuning_cost
    from calibatt_compiler.calibration import tune as run
    from calibatt_compiler.calibration.store.run_folder import RunStore
    from calibatt_compiler.calibration.tuning.config import with_form
    from calibatt_compiler.calibration.tuning.study import JOURNAL, SearchSpace, finished
    from calibatt_compiler.calibration.tuning.tune import OUTPUTS
    from calibatt_compiler.cli.interruption import said_if_interrupted
    from calibatt_compiler.cli.progress import TerminalProgress
    from calibatt_compiler.cli.tables import tuning as report
    from calibatt_compiler.errors import OptionError
    from calibatt_compiler.terminal import PlainConsole

    if proxy and psnr is not None:
        raise OptionError(
            "a search by proxy generates no video",
            expected="--speed-up with --proxy",
            got="--psnr",
            remedy="leave --proxy out",
        )
    check_folder(out, OUTPUTS, inputs=[inputs.prompts])
    keys, scores = _numbers(pooled), _scores(gamma)
    config = CalibrationConfig(
        pooled=keys[0],
        gamma=scores[0],
        **{"form": form, **observation.of_config()},
        component=place.component,
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
    number = tuning.number(zoned=with_form(config, tuning).zoned)
    given = options.texts_and_seeds(inputs.cases())
    pipe = place.load(model)
    common = {**given, "out": out, "config": config, "tuning": tuning, **video.arguments(pipe)}
    console = PlainConsole(soft_wrap=True)
    console.print(report.cost_table(tuning_cost(pipe, **common)))
    if not yes and sys.stdin.isatty():
        typer.confirm("Start?", abort=True)

    def kept() -> str:
        recorded = len(RunStore(out / "recording").names())
        return (
            f"{recorded} of {len(given['prompts'])} recorded inputs and {finished(out / JOURNAL)} "
            f"of {number} trials are kept in {out}; the same command goes on"
        )

    with said_if_interrupted(kept), TerminalProgress() as progress:
        found = run(pipe, progress=progress, **common)
    console.print(report.front_table(found))
    folder = printable(out)
    console.print(f"the front: {folder}/front.png, {folder}/tuning.json")
    if found.chosen is not None:
        console.print(f"the chosen plan: {folder}/plan.calibatt")
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
            remedy="leave it out for no row-shared heads",
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
