"""`calibatt compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from calibatt_compiler.cli import options
from calibatt_compiler.cli.groups import ADVANCED, grouped
from calibatt_compiler.cli.options import option
from calibatt_compiler.files import check_folder
from calibatt_compiler.printable import printable

if TYPE_CHECKING:
    from calibatt_compiler.evaluation.comparison import Comparison, DenseKind


@grouped
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
    video: options.Video,
    place: options.Place,
    inputs: options.Inputs = options.HELD_OUT,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the results.")] = Path(
        "calibatt-comparison"
    ),
    dense: Annotated[
        str,
        option(None, "What to measure against: inductor (stock torch.compile) or eager."),
    ] = "inductor",
    rounds: Annotated[int, option(ADVANCED, "How often each denoising step is timed.", min=5)] = 5,
    fps: Annotated[int, option(ADVANCED, "Frames a second of the videos.", min=1)] = 16,
    min_psnr: Annotated[
        float | None,
        option(None, "Fail (exit code 1) if the mean PSNR of the first plan is below this, in dB."),
    ] = None,
    lowering: options.Lowering = "baked",
) -> None:
    """Generate videos with and without a plan, from the same prompts and seeds, and compare them.

    Size and steps are those of the plan unless given. Give prompts that were not used to
    calibrate. The folder gets compare.json, side-by-side videos, a sheet of frames for each, and
    index.html with all of it. Times of a denoising step are taken in turn, dense and sparse, in
    one process; the first, compiling call does not count.

    Example: calibatt compare ./wan wan-480p.calibatt --prompts held-out.txt --guidance 5
    """
    from calibatt_compiler.cli.progress import TerminalProgress
    from calibatt_compiler.errors import OptionError
    from calibatt_compiler.evaluation.compare import compare as run_comparison
    from calibatt_compiler.evaluation.comparison import ComparisonConfig
    from calibatt_compiler.evaluation.results import OUTPUTS, Results
    from calibatt_compiler.options import CompileOptions
    from calibatt_compiler.plan import Plan

    if dense not in ("inductor", "eager"):
        raise OptionError(
            "--dense has an unknown value",
            expected="inductor or eager",
            got=repr(dense),
            remedy="leave it out for the default",
        )
    check_folder(out, OUTPUTS, inputs=[*plan, inputs.prompts])
    plans = {path.stem: Plan.load(path) for path in plan}
    first = next(iter(plans.values()))
    checked = CompileOptions.parse({"plan": first, "lowering": lowering})
    cases = inputs.cases()
    pipe = place.load(model)
    config = ComparisonConfig(
        arguments=video.arguments_for(pipe, first),
        component=place.component,
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
    from calibatt_compiler.evaluation.results import terminal
    from calibatt_compiler.terminal import PlainConsole

    console = PlainConsole()
    console.print(comparison.main.summary)
    console.print(terminal(comparison))
    console.print(f"results: {printable(index)}", soft_wrap=True)
