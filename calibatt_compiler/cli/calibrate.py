"""The command `calibatt calibrate`: observes a model and writes a plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from calibatt_compiler.cli import options
from calibatt_compiler.cli.groups import grouped
from calibatt_compiler.cli.options import option
from calibatt_compiler.files import check_folder, check_output
from calibatt_compiler.printable import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

    from calibatt_compiler.calibration import CalibrationConfig
    from calibatt_compiler.evaluation.cases import Case


@grouped
def calibrate(
    model: options.Model,
    out: Annotated[Path, option(None, "Plan to write.", "FILE", "--out", "-o")],
    inputs: options.Inputs,
    video: options.Video,
    selection: options.Selection,
    observation: options.Observation,
    storage: options.Storage,
    place: options.Place,
    dry_run: Annotated[
        bool, option(None, "Tell time, memory and disk; write nothing.", None, "--dry-run")
    ] = False,
) -> None:
    """Observe a model on prompts and write a plan of what its attention needs.

    Takes as long as generating a video for each prompt; 16 varied ones do.
    A plan serves one size of video and one number of steps. The same command
    goes on with an interrupted run. On several GPUs:
    torchrun --nproc-per-node=8 -m calibatt_compiler calibrate ...

    Example: calibatt calibrate ./wan --prompts prompts.txt --height 480
    --width 832 --frames 81 --steps 50 --out wan-480p.calibatt
    """
    from calibatt_compiler.calibration import CalibrationConfig
    from calibatt_compiler.cli import ranks
    from calibatt_compiler.terminal import PlainConsole

    config = CalibrationConfig(
        **vars(selection),
        **observation.of_config(),
        **storage.of_config(),
        component=place.component,
    )
    if not dry_run:
        check_output(out, inputs=[inputs.prompts])
        check_folder(f"{out}.calibration")
    cases = inputs.cases()
    own = ranks.own_device(place.place())
    with ranks.process_group() as rank:
        if dry_run and rank:
            return
        pipe = place.load(model, own)
        arguments = video.arguments(pipe)
        said = _estimate if dry_run else _calibrate
        text = said(pipe, cases, out, config, arguments)
    if rank == 0:
        console = PlainConsole(soft_wrap=True)
        console.print(text)
        if not dry_run:
            both = f"{printable(model)} {printable(out)}"
            console.print(f"measure it: calibatt compare {both} --prompts HELD_OUT.txt")


def _estimate(
    pipe: Any, cases: list[Case], out: Path, config: CalibrationConfig, arguments: dict[str, Any]
) -> RenderableType:
    from calibatt_compiler.calibration import estimate
    from calibatt_compiler.cli.tables import costs

    common = {**options.texts_and_seeds(cases), "out": out, "config": config, **arguments}
    return costs.terminal(estimate(pipe, **common))


def _calibrate(
    pipe: Any, cases: list[Case], out: Path, config: CalibrationConfig, arguments: dict[str, Any]
) -> RenderableType:
    from calibatt_compiler.calibration import calibrate
    from calibatt_compiler.calibration.pipeline import run_folder
    from calibatt_compiler.calibration.store.run_folder import RunStore
    from calibatt_compiler.cli.interruption import said_if_interrupted
    from calibatt_compiler.report.inspect import orders_surveyed

    folder = run_folder(config, out)

    def kept() -> str:
        done = 0 if folder is None else len(RunStore(folder).names())
        return f"{done} of {len(cases)} inputs are kept in {folder}; the same command goes on"

    given = options.texts_and_seeds(cases)
    with said_if_interrupted(kept):
        plan = calibrate(pipe, **given, out=out, config=config, **arguments)
    measured = orders_surveyed(plan)
    order = "" if measured is None else f"token order {plan.token_order}; {measured}\n"
    name = printable(out)
    return (
        f"{name}: {len(plan.sites)} sites, {plan.steps} steps, sparsity {1 - plan.density():.1%}\n"
        f"{order}"
        f"see it:     calibatt inspect {name} --html plan.html"
    )
