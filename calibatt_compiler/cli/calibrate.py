"""`calibatt calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from calibatt_compiler.cli import options

if TYPE_CHECKING:
    from rich.console import RenderableType

    from calibatt_compiler.calibration import CalibrationConfig
    from calibatt_compiler.evaluation.cases import Case

_HOW = options.HOW_SPARSE


def calibrate(
    model: options.Model,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Plan file to write.", show_default=False)
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
    block: Annotated[
        int,
        typer.Option(
            help="Tokens a block, for queries and keys. Smaller blocks fit the attention more "
            "closely, larger ones run faster on a GPU.",
            rich_help_panel=_HOW,
        ),
    ] = 128,
    a: Annotated[
        float | None,
        typer.Option(
            "--A",
            help="Share of attention to keep at late steps, 0 to 1. The one to turn: lower is "
            "sparser and faster. Default 0.84, or 0.763 up to 8 steps.",
            rich_help_panel=_HOW,
            show_default=False,
        ),
    ] = None,
    c: Annotated[
        float | None,
        typer.Option(
            "--C",
            help="Share to keep at the first, noisiest step. Default 0.99, or 0.863 up to 8 steps.",
            rich_help_panel=_HOW,
            show_default=False,
        ),
    ] = None,
    k: Annotated[
        float | None,
        typer.Option(
            "--k",
            help="How fast the share falls from C to A. Default 16, or 5.64 up to 8 steps.",
            rich_help_panel=_HOW,
            show_default=False,
        ),
    ] = None,
    rho: Annotated[
        float,
        typer.Option(
            help="A block is kept if this share of the prompts needs it.", rich_help_panel=_HOW
        ),
    ] = 0.5,
    share_steps: Annotated[
        float,
        typer.Option(
            "--share-steps",
            metavar="IOU",
            help="Consecutive steps whose masks agree this much (intersection over union) share "
            "one: a smaller plan. 1 shares equal masks only; samples are never shared.",
            rich_help_panel=_HOW,
        ),
    ] = 0.97,
    merge_budget: Annotated[
        float | None,
        typer.Option(
            "--merge-budget",
            metavar="DENSITY",
            help="Fill the smallest gaps between kept blocks, up to this share of all blocks, "
            "such as 0.02: fewer runs to walk, more blocks to compute. Default: none.",
            rich_help_panel=_HOW,
            show_default=False,
        ),
    ] = None,
    pooled: Annotated[
        int,
        typer.Option(
            metavar="KEYS",
            help="Let each dropped block take part as this many mean keys, such as 1 or 4, "
            "instead of not at all. It costs KEYS / BLOCK of dense attention.",
            rich_help_panel=_HOW,
        ),
    ] = 0,
    sample_power: Annotated[
        float | None,
        typer.Option(
            "--sample-power",
            metavar="POWER",
            help="Keep a weighted random sample of blocks, drawn in proportion to this power of "
            "their energy, such as 1, instead of the highest. Needs --keep-energies or "
            "--coarse-energies.",
            rich_help_panel=_HOW,
            show_default=False,
        ),
    ] = None,
    queries: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="Take the energies of every N-th query only. On a GPU where one kernel gives "
            "them with attention, all queries cost least.",
            rich_help_panel=_HOW,
        ),
    ] = 1,
    gamma: Annotated[
        float | None,
        typer.Option(
            metavar="SCORE",
            help="Let a head compute a few rows of each frame and copy the others where its rows "
            "attend alike by this score or more, that is cheaper, and errs no more; 0.87 is the "
            "paper's. Default: no head does.",
            rich_help_panel=_HOW,
            show_default=False,
        ),
    ] = None,
    anchor_rows: options.AnchorRows = 5,
    token_order: Annotated[
        str,
        typer.Option(
            metavar="ORDER",
            help="Cut blocks from tokens in raster order; tile by tile: frames x height x width of "
            "a tile in latent tokens, such as 2x8x8; from ropes along one axis, such as 2x8xall; "
            "or auto: measure such orders on the first two prompts, take the sparsest that pays.",
            rich_help_panel=_HOW,
        ),
    ] = "raster",
    component: options.Component = "transformer",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    keep_energies: Annotated[
        bool,
        typer.Option(
            "--keep-energies",
            help="Keep the block energies too, 32 times the size of the masks: to select again "
            "with other thresholds, or to validate another plan on these inputs.",
        ),
    ] = False,
    coarse_energies: Annotated[
        bool,
        typer.Option(
            "--coarse-energies",
            help="The same in a byte each, a quarter of that; enough for --sample-power.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Say what it will cost in time, memory and disk, and write nothing. Loads the "
            "model and runs two steps, one of them by the clock.",
        ),
    ] = False,
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Forget what an interrupted run has done, and start again."),
    ] = False,
) -> None:
    """Observe a model on sample prompts and write a plan of what its attention needs.

    Takes about as long as generating a video for each prompt. 16 varied prompts do for a large
    model. The plan serves one size of video and one number of steps. An interrupted run goes on
    where it stopped if the same command is given again.

    On several GPUs, torchrun shares the prompts among them: torchrun --nproc-per-node=8 -m
    calibatt_compiler calibrate ... gives the same plan.

    Example: calibatt calibrate Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompts prompts.txt
    --height 480 --width 832 --frames 81 --steps 50 --out wan-480p.calibatt
    """
    from rich.console import Console

    from calibatt_compiler.calibration import CalibrationConfig
    from calibatt_compiler.cli import pipelines, ranks

    config = CalibrationConfig(
        block=(block, block),
        A=a,
        C=c,
        k=k,
        rho=rho,
        share_steps=share_steps,
        merge_budget=merge_budget,
        pooled=pooled,
        sample_power=sample_power,
        queries=queries,
        gamma=gamma,
        anchor_rows=anchor_rows,
        token_order=token_order,
        component=component,
        keep_energies=keep_energies or ("coarse" if coarse_energies else False),
        restart=restart,
    )
    cases = pipelines.read_cases(prompts, prompt, seed)
    named = {
        "height": height,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "negative_prompt": negative_prompt,
    }
    place = ranks.own_device(pipelines.device_of(device))
    with ranks.process_group() as rank:
        if dry_run and rank:
            return
        pipe = pipelines.load_pipeline(model, place, pipelines.dtype_of(dtype, place))
        arguments = pipelines.pipeline_arguments(pipe, named, settings)
        said = _estimate if dry_run else _calibrate
        text = said(pipe, cases, out, config, arguments)
    if rank == 0:
        console = Console(highlight=False, soft_wrap=True)
        console.print(text)
        if not dry_run:
            console.print(f"measure it: calibatt compare {model} {out} --prompts HELD_OUT.txt")


def _estimate(
    pipe: Any, cases: list[Case], out: Path, config: CalibrationConfig, arguments: dict[str, Any]
) -> RenderableType:
    from calibatt_compiler.calibration import estimate
    from calibatt_compiler.cli.tables import costs

    texts, seeds = [case.prompt for case in cases], [case.seed for case in cases]
    return costs.terminal(estimate(pipe, texts, seeds, out=out, config=config, **arguments))


def _calibrate(
    pipe: Any, cases: list[Case], out: Path, config: CalibrationConfig, arguments: dict[str, Any]
) -> RenderableType:
    from calibatt_compiler.calibration import calibrate
    from calibatt_compiler.calibration.pipeline import run_folder
    from calibatt_compiler.calibration.store.run_folder import RunStore
    from calibatt_compiler.cli.interruption import said_if_interrupted
    from calibatt_compiler.report.inspect import orders_surveyed

    texts, seeds = [case.prompt for case in cases], [case.seed for case in cases]
    folder = run_folder(config, out)

    def kept() -> str:
        done = 0 if folder is None else len(RunStore(folder).names())
        return f"{done} of {len(cases)} inputs are kept in {folder}; the same command goes on"

    with said_if_interrupted(kept):
        plan = calibrate(pipe, texts, seeds, out=out, config=config, **arguments)
    measured = orders_surveyed(plan)
    order = "" if measured is None else f"token order {plan.token_order}; {measured}\n"
    return (
        f"{out}: {len(plan.sites)} sites, {plan.steps} steps, sparsity {1 - plan.density():.1%}\n"
        f"{order}"
        f"see it:     calibatt inspect {out} --html plan.html"
    )
