"""`calibatt env`: what a bug report needs to know of this machine."""

from __future__ import annotations

import json
import platform
from typing import Annotated

import typer
from rich.console import Console


def env(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show versions, devices and folders, for a bug report."""
    facts = _facts()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for name, value in facts.items():
        console.print(f"{name}: {value}")


def _facts() -> dict[str, str]:
    import torch

    from calibatt_compiler.evaluation.comparison import device_name, versions
    from calibatt_compiler.kernels.hopper.capability import gluon_reason
    from calibatt_compiler.options import cache_dir

    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **versions(),
        "cuda of torch": str(torch.version.cuda or "none: a build for CPUs"),
        "cpu": device_name(torch.device("cpu")),
    }
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        device = torch.device("cuda", index)
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        facts[f"cuda:{index}"] = f"{device_name(device)}, sm_{major}{minor}, {memory:.0f} GiB"
    facts["Hopper kernels"] = gluon_reason() or "this triton has what they need"
    facts["kernel cache"] = str(cache_dir())
    return facts
