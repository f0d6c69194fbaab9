"""The command `calibatt build`: compiles a plan's kernels ahead of their first use."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Annotated

import typer

from calibatt_compiler.cli import options
from calibatt_compiler.errors import OptionError
from calibatt_compiler.printable import printable

OLDEST = 80


def build(
    plan: options.PlanFile,
    arch: Annotated[
        list[str] | None,
        typer.Option(
            "--arch",
            metavar="SM",
            help="GPU generation: sm_80 (A100), sm_86 (RTX 30), sm_89 (RTX 40), sm_90 (H100), "
            "sm_100 (B200); may be given several times. Default: the GPUs of this machine.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Of the model: bfloat16 or float16.")
    ] = "bfloat16",
    head_dim: Annotated[
        int | None,
        typer.Option(
            "--head-dim",
            min=1,
            help="Channels a head; needed only for plans made from masks, which don't record it.",
            show_default=False,
        ),
    ] = None,
    portable: Annotated[
        bool,
        typer.Option(
            "--portable", help="For sm_90: the kernels that the compile option hopper=False takes."
        ),
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            "-j",
            min=1,
            help="Compilers at a time. Default: one a core, at most 16.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print as JSON how many steps of all sites what serves.")
    ] = False,
) -> None:
    """Compile all GPU kernels of a plan ahead of time, into the cache on disk.

    Not needed, but it spares the first run the wait: a model otherwise begins with a general
    kernel and takes up its own one by one. Works without a GPU too, for a machine like the one
    named by --arch. What is compiled already is not compiled again. On a CPU there is nothing to
    build: PyTorch compiles those kernels in the first call.

    Example: calibatt build wan-480p.calibatt --arch sm_90
    """
    import torch

    from calibatt_compiler.build import PlanSpecs
    from calibatt_compiler.cli.pipelines import dtype_of
    from calibatt_compiler.cli.progress import TerminalProgress
    from calibatt_compiler.kernels.baked.cache_folder import writable
    from calibatt_compiler.kernels.baked.compiler import KernelCompiler
    from calibatt_compiler.plan import Plan
    from calibatt_compiler.terminal import PlainConsole

    loaded = Plan.load(plan)
    targets = _archs(arch)
    place = next(writable())
    specs = PlanSpecs(
        loaded, targets, dtype_of(dtype, torch.device("cuda")), head_dim, hopper=not portable
    )
    with TerminalProgress() as progress, KernelCompiler(workers) as compiler:
        progress.start(f"compiling kernels, {compiler.workers} at a time", len(specs))
        report = compiler.build(specs, lambda *_: progress.advance())
    if as_json:
        said = {**specs.count_steps(report), "declined": report.declined, "failed": report.failed}
        typer.echo(json.dumps(said, indent=2))
        if report.failed:
            raise typer.Exit(1)
        return
    cached = sum(source.cached for source in report.compiled)
    console = PlainConsole(soft_wrap=True)
    console.print(
        f"{len(report.compiled)} of {len(specs)} kernels are ready in {printable(place)} for "
        + ", ".join(f"sm_{target}" for target in targets)
        + f"; {cached} were there before"
    )
    for reason, count in Counter(report.declined.values()).items():
        console.print(f"{count} have none, the kernel with tables serves them: {printable(reason)}")
    if report.failed:
        for digest, reason in report.failed.items():
            console.print(f"pattern {digest[:12]}: {reason}")
        raise typer.Exit(1)


def _archs(names: list[str] | None) -> list[int]:
    import torch

    if not names:
        from calibatt_compiler.kernels.portable.tiles import architecture

        count = torch.cuda.device_count()
        local = {architecture(torch.device("cuda", index)) for index in range(count)}
        if not local:
            raise OptionError(
                "this machine has no GPU to compile for",
                expected="--arch with the GPU generation of the machine that will run the model",
                got="no --arch",
                remedy="give --arch sm_90 for an H100, sm_80 for an A100, sm_89 for an RTX 4090",
            )
        return sorted(local)
    found = set()
    for name in names:
        match = re.fullmatch(r"(?:sm_?)?(\d{2,3})a?", name.lower())
        if match is None or int(match[1]) < OLDEST:
            raise OptionError(
                "--arch names no GPU generation that kernels can be compiled for",
                expected=f"sm_{OLDEST} or newer, such as sm_90",
                got=repr(name),
                remedy="`nvidia-smi --query-gpu=compute_cap --format=csv` shows it: 9.0 is sm_90",
            )
        found.add(int(match[1]))
    return sorted(found)
