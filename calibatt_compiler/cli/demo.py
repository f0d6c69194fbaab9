"""`calibatt demo`: the whole of it on the small model of this repository."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from calibatt_compiler.cli import options
from calibatt_compiler.cli.groups import grouped
from calibatt_compiler.errors import PipelineError
from calibatt_compiler.evaluation.cases import Case
from calibatt_compiler.files import check_folder

if TYPE_CHECKING:
    from calibatt_compiler.plan import Plan

EXAMPLE = Path("examples") / "tiny_wan"
BLOCK = 32
"""Tokens a block: the model's videos are short. All else is what `calibatt calibrate` does."""
CURVE = (0.15, 0.40)
"""Other densities, chosen from the same recording, for the curve."""
CPU_CALIBRATION, CPU_HELD_OUT = 8, 3
"""How many prompts a CPU runs: what two cores do in ten minutes. A GPU runs all."""


@dataclass(frozen=True)
class DemoSettings:
    """What the demo runs.

    Attributes:
        arguments: of the pipeline, common to all videos.
        calibration: prompts and seeds that the plan is made from.
        held_out: others, that it is measured on.
    """

    arguments: Mapping[str, Any]
    calibration: Sequence[Case]
    held_out: Sequence[Case]

    def for_cpu(self) -> DemoSettings:
        """Return the same settings with as many prompts as a CPU has time for."""
        return replace(
            self,
            calibration=self.calibration[:CPU_CALIBRATION],
            held_out=self.held_out[:CPU_HELD_OUT],
        )

    def quick(self) -> DemoSettings:
        """Return the smallest settings that still do everything: a check, not a measurement."""
        arguments = {**self.arguments, "num_inference_steps": 4}
        return replace(
            self,
            arguments=arguments,
            calibration=self.calibration[:2],
            held_out=self.held_out[:1],
        )


@grouped
def demo(
    where: options.Device,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the results.")] = Path(
        "calibatt-demo"
    ),
    model: Annotated[
        Path | None,
        typer.Option(
            help="Another pipeline than the repository's examples/tiny_wan/model.",
            show_default=False,
        ),
    ] = None,
    settings: Annotated[
        Path | None,
        typer.Option(
            help="Another file of prompts and sizes than examples/tiny_wan/demo.json.",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Few steps and prompts: shows that all works, measures nothing."
        ),
    ] = False,
) -> None:
    """Show the whole product on a small trained model: calibrate, compile, compare.

    Calibrates the model on a few prompts, writes the plan and a page about it, compiles the model
    with the plan, generates videos from other prompts with and without it, and measures quality
    and time. Then open index.html in the results folder. Needs a checkout of the repository, for
    the model; a GPU is used if there is one, else a CPU of two cores does in a few minutes.

    Example: calibatt demo --out results
    """
    from calibatt_compiler.cli import pipelines
    from calibatt_compiler.cli.compare import show
    from calibatt_compiler.cli.progress import TerminalProgress
    from calibatt_compiler.evaluation.compare import compare as run_comparison
    from calibatt_compiler.evaluation.comparison import ComparisonConfig
    from calibatt_compiler.evaluation.results import OUTPUTS, Results
    from calibatt_compiler.report.plan_page import write_page

    started = time.perf_counter()
    check_folder(out, (*OUTPUTS, "plan.calibatt", "inspect.html"), inputs=[settings])
    chosen = read_settings(settings or find("demo.json"))
    if quick:
        chosen = chosen.quick()
    place = where.place()
    if place.type == "cpu":
        chosen = chosen.for_cpu()
    pipe = where.load(str(model or find("model")), place)
    arguments = pipelines.pipeline_arguments(pipe, chosen.arguments, None)
    progress = TerminalProgress()
    progress.start(f"calibrating on {len(chosen.calibration)} prompts", len(chosen.calibration))
    plans = calibrate_plans(pipe, chosen.calibration, arguments, out / "plan.calibatt")
    main = next(iter(plans.values()))
    write_page(main, out / "inspect.html", title="The demo's plan")
    config = ComparisonConfig(arguments=arguments, timed_steps=2 if quick else 4)
    results = Results(out, fps=12)
    with progress:
        comparison = run_comparison(
            pipe, chosen.held_out, plans, config, progress=progress, on_video=results.add_video
        )
    links = [
        ("inspect.html", "what the plan keeps, layer by layer"),
        ("plan.calibatt", "the plan"),
    ]
    took = ", ".join(f"{what} {seconds:.0f} s" for what, seconds in progress.seconds.items())
    index = results.write(comparison, title="calibatt demo", links=links, facts=[("took", took)])
    show(comparison, index)
    typer.echo(f"the demo took {(time.perf_counter() - started) / 60:.1f} minutes")


def calibrate_plans(
    pipe: Any, cases: Sequence[Case], arguments: Mapping[str, Any], out: Path
) -> dict[str, Plan]:
    """Calibrate for zones, at the default density and at those of the curve, and for masks.

    The last plan is the paper's: masks, by its thresholds.

    Args:
        pipe: the pipeline.
        cases: prompts and seeds.
        arguments: of the pipeline.
        out: where the main plan goes.

    Returns:
        Plans by label, the main one first.
    """
    from calibatt_compiler.calibration import CalibrationConfig, calibrate, zone_plan_from_run

    config = CalibrationConfig(block=(BLOCK, BLOCK))
    given = {**options.texts_and_seeds(cases), **arguments}
    main = calibrate(pipe, out=out, config=config, **given)
    run = f"{out}.calibration"
    plans = {
        f"{density:.0%} of the blocks": zone_plan_from_run(run, density=density)
        for density in CURVE
    }
    masks = calibrate(pipe, config=replace(config, form="masks"), **given)
    return {
        f"{main.density():.0%} of the blocks": main,
        **plans,
        f"the paper's masks, {masks.density():.0%}": masks,
    }


def find(name: str) -> Path:
    """Return a file or folder of the example, in the checkout or below the current folder.

    Raises:
        PipelineError: it is in neither.
    """
    roots = (Path(__file__).resolve().parents[2], Path.cwd())
    for root in roots:
        path = root / EXAMPLE / name
        if path.exists():
            return path
    raise PipelineError(
        f"the demo's {name} is not there",
        expected=" or ".join(str(root / EXAMPLE / name) for root in roots),
        got="no such file",
        remedy="run the demo in a checkout of the repository, which holds the model; or give "
        "--model and --settings",
    )


def read_settings(path: Path) -> DemoSettings:
    """Read prompts and sizes.

    Raises:
        PipelineError: the file can't be read, or lacks prompts.
    """

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        calibration = [Case(case["prompt"], case["seed"]) for case in content.pop("calibration")]
        held_out = [Case(case["prompt"], case["seed"]) for case in content.pop("held_out")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PipelineError(
            "the demo's settings can't be read",
            expected="JSON with pipeline arguments, and `calibration` and `held_out` as lists of "
            '{"prompt": ..., "seed": ...}',
            got=f"{path}: {error!r}",
            remedy="restore the file from the repository",
        ) from error
    both = set(calibration) & set(held_out)
    if both or not calibration or not held_out:
        raise PipelineError(
            "the demo's prompts can't show anything",
            expected="prompts and seeds for calibration, and others to measure on",
            got=f"{len(calibration)} and {len(held_out)} prompts, {len(both)} in both",
            remedy="restore the file from the repository",
        )
    return DemoSettings(content, calibration, held_out)
