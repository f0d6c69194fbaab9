"""`calibatt compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from calibatt_compiler.cli import options
from calibatt_compiler.files import check_folder
from calibatt_compiler.printable import printable

if TYPE_CHECKING:
    from calibatt_compiler.report.comparison import Comparison, DenseKind


def compare(
    model: options.Model,
    plan: Annotated[
        list[Path],
        typer.Argument(
            help="Plan files. The first gets videos; several give a curve of quality against "
            "sparsity.",
            show_default=False,
        ),
    ],
    prompts: options.Prompts = None,
    prompt: options.Prompt = None,
    seed: options.Seed = 1000,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the results.")] = Path(
        "calibatt-comparison"
    ),
    height: options.Height = None,
    width: options.Width = None,
    frames: options.Frames = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    negative_prompt: options.NegativePrompt = None,
    settings: options.Settings = None,
    dense: Annotated[
        str,
        typer.Option(help="What to measure against: inductor (stock torch.compile) or eager."),
    ] = "inductor",
    rounds: Annotated[int, typer.Option(min=5, help="How often each denoising step is timed.")] = 5,
    fps: Annotated[int, typer.Option(min=1, help="Frames a second of the videos.")] = 16,
    min_psnr: Annotated[
        float | None,
        typer.Option(
            "--min-psnr",
            help="Fail (exit code 1) if the mean PSNR of the first plan is below this, in dB.",
            show_default=False,
        ),
    ] = None,
    component: options.Component = "transformer",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    lowering: options.Lowering = "baked",
) -> None:
    """Generate videos with and without a plan, from the same prompts and seeds, and compare them.

    Size and steps are those of the plan unless given. Give prompts that were not used to
    calibrate. The folder gets compare.json, side-by-side videos, a sheet of frames for each, and
    index.html with all of it. Times of a denoising step are taken in turn, dense and sparse, in
    one process; the first, compiling call does not count.

    Example: calibatt compare ./wan wan-480p.calibatt --prompts held-out.txt --guidance 5
    """
    from calibatt_compiler.cli import pipelines
    from calibatt_compiler.cli.progress import TerminalProgress
    from calibatt_compiler.errors import OptionError
    from calibatt_compiler.options import CompileOptions
    from calibatt_compiler.plan import Plan
    from calibatt_compiler.report.compare import compare as run_comparison
    from calibatt_compiler.report.comparison import ComparisonConfig
    from calibatt_compiler.report.results import OUTPUTS, Results

    if dense not in ("inductor", "eager"):
        raise OptionError(
            "--dense has an unknown value",
            expected="inductor or eager",
            got=repr(dense),
            remedy="leave it out for the default",
        )
    check_folder(out, OUTPUTS, inputs=[*plan, prompts])
    plans = {path.stem: Plan.load(path) for path in plan}
    first = next(iter(plans.values()))
    checked = CompileOptions.parse({"plan": first, "lowering": lowering})
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
    arguments = pipelines.arguments_for_plan(pipe, first, named, settings)
    config = ComparisonConfig(
        arguments=arguments,
        component=component,
        dense=cast("DenseKind", dense),
        lowering=checked.lowering,
        rounds=rounds,
    )
    results = Results(out, fps=fps)
    with TerminalProgress() as progress:
        comparison = run_comparison(
            pipe, cases, plans, config, progress=progress, on_video=results.add_video
        )
        progress.start("writing results", None)
        index = results.write(comparison, title=f"{plan[0].name}: dense against sparse")
    show(comparison, index)
    if min_psnr is not None and comparison.main.psnr < min_psnr:
        raise typer.Exit(1)


def show(comparison: Comparison, index: Path) -> None:
    """Print the figures of a comparison."""
    from calibatt_compiler.report.results import terminal
    from calibatt_compiler.terminal import PlainConsole

    console = PlainConsole()
    console.print(comparison.main.summary)
    console.print(terminal(comparison))
    console.print(f"results: {printable(index)}", soft_wrap=True)
