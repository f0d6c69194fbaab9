"""`calibatt build`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from calibatt_compiler.cli import options
from calibatt_compiler.errors import OptionError, PlanError

if TYPE_CHECKING:
    import torch

    from calibatt_compiler.kernels.compiler import KernelSpec
    from calibatt_compiler.plan import Plan

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
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            "-j",
            min=1,
            help="Compilers at a time. Default: one a core.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Compile all GPU kernels of a plan ahead of time, into the cache on disk.

    Not needed, but it spares the first run the wait: a model otherwise begins with a general
    kernel and takes up its own one by one. Works without a GPU too, for a machine like the one
    named by --arch. What is compiled already is not compiled again. On a CPU there is nothing to
    build: PyTorch compiles those kernels in the first call.

    Example: calibatt build wan-480p.calibatt --arch sm_90
    """
    import os

    from rich.console import Console

    from calibatt_compiler.cli.pipelines import dtype_of
    from calibatt_compiler.cli.progress import TerminalProgress
    from calibatt_compiler.kernels.compiler import KernelCompiler
    from calibatt_compiler.options import cache_dir
    from calibatt_compiler.plan import Plan

    loaded = Plan.load(plan)
    targets = _archs(arch)
    specs = specs_of(loaded, targets, dtype_of(dtype, _cuda()), head_dim)
    count = workers or os.cpu_count() or 1
    with TerminalProgress() as progress:
        progress.start(f"compiling {len(specs)} kernels, {count} at a time", len(specs))
        KernelCompiler(workers=count).build(specs, on_progress=lambda *_: progress.advance())
    Console().print(
        f"{len(specs)} kernels of {plan} are ready in {cache_dir()} for "
        + ", ".join(f"sm_{target}" for target in targets),
        highlight=False,
        soft_wrap=True,
    )


def specs_of(
    plan: Plan, archs: list[int], dtype: torch.dtype, head_dim: int | None
) -> list[KernelSpec]:
    """Return what a plan needs compiled: each distinct pattern once for each GPU generation.

    Patterns that keep every block are left out: the stock dense kernel serves them.

    Raises:
        PlanError: the plan does not record the channels of a head, and none were given.
    """
    from calibatt_compiler.kernels.compiler import KernelSpec

    specs: dict[tuple[str, int, int], KernelSpec] = {}
    for name, site in plan.sites.items():
        channels = site.head_dim or head_dim
        if channels is None:
            raise PlanError(
                f"the plan does not say how many channels a head of {name} has",
                expected="a plan from `calibatt calibrate`, or --head-dim",
                got="a plan made from masks",
                remedy="give --head-dim, such as 128 for Wan",
            )
        for pattern in site.patterns:
            if pattern.density == 1.0:
                continue
            for arch in archs:
                key = (pattern.digest, channels, arch)
                specs[key] = KernelSpec(pattern, dtype, channels, arch)
    return list(specs.values())


def _archs(names: list[str] | None) -> list[int]:
    import torch

    if not names:
        capabilities = {
            torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())
        }
        if not capabilities:
            raise OptionError(
                "this machine has no GPU to compile for",
                expected="--arch with the GPU generation of the machine that will run the model",
                got="no --arch",
                remedy="give --arch sm_90 for an H100, sm_80 for an A100, sm_89 for an RTX 4090",
            )
        return sorted(10 * major + minor for major, minor in capabilities)
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


def _cuda() -> torch.device:
    import torch

    return torch.device("cuda")
