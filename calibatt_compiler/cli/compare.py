"""The command `calibatt compare`: dense and sparse videos side by side, quality and time."""

from __future__ import annotations

from collections.abc import Sequence
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
    from calibatt_compiler.cli.interruption import said_if_interrupted
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
    plans = {label: Plan.load(path) for label, path in labels(plan).items()}
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

    def kept() -> str:
        return f"videos finished so far are in {out}; the same command begins anew"

    with said_if_interrupted(kept), TerminalProgress() as progress:
        comparison = run_comparison(
            pipe, cases, plans, config, progress=progress, on_video=results.add_video
        )
        progress.start("writing results", None)
        index = results.write(comparison, title=f"{plan[0].name}: dense against sparse")
    show(comparison, index)
    if min_psnr is not None and comparison.main.psnr < min_psnr:
        raise typer.Exit(1)


def labels(files: Sequence[Path]) -> dict[str, Path]:
    """Name plans by the shortest ends of their paths that tell them apart.

    A file that is given twice, and one that would be taken for the dense model, has a number.
    """
    from calibatt_compiler.evaluation.comparison import DENSE

    whole = [path.resolve().with_suffix("").parts for path in files]
    found: dict[str, Path] = {}
    for path, parts in zip(files, whole, strict=True):
        others = [other for other in whole if other != parts]
        length = 1
        while length < len(parts) and any(other[-length:] == parts[-length:] for other in others):
            length += 1
        label = name = "/".join(parts[-length:])
        number = 1
        while label in found or label == DENSE:
            number += 1
            label = f"{name} ({number})"
        found[label] = path
    return found


def show(comparison: Comparison, index: Path) -> None:
    """Print the figures of a comparison."""
    from calibatt_compiler.evaluation.results import terminal
    from calibatt_compiler.terminal import PlainConsole

    console = PlainConsole()
    console.print(comparison.main.summary)
    console.print(terminal(comparison))
    console.print(f"results: {printable(index)}", soft_wrap=True)
