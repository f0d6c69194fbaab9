"""Compile the energy kernels for GPUs that need not be here; for test_triton_energy.py.

A process of its own: it puts a stand-in driver in Triton's place. Prints one JSON line a kernel.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile

import torch
from triton import knobs

from calibatt_compiler.kernels.portable.energy_offline import compile_energy


def resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}


def main() -> None:
    for kernel, arch, dtype, head_dim, block in json.loads(sys.argv[1]):
        made = compile_energy(
            kernel, arch=arch, dtype=getattr(torch, dtype), head_dim=head_dim, block=tuple(block)
        )
        ptx = made.asm["ptx"]
        marks = ("wgmma.mma_async", "mma.sync", "tcgen05.mma", "cp.async")
        facts = {mark: ptx.count(mark) for mark in marks}
        # Before the compiler adds barriers of its own: those that the source asks for.
        facts["barriers"] = made.asm["ttir"].count("barrier")
        facts |= resources(made.asm["cubin"])
        print(json.dumps({**facts, "shared": made.metadata.shared}), flush=True)


if __name__ == "__main__":
    main()
