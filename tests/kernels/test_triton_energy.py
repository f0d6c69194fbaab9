"""The energy kernel without a GPU: interpreted on small operands, compiled for three GPUs."""

import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

INTERPRETED = """
import torch
from calibatt_compiler.kernels.energy_reference import reference_energy
from calibatt_compiler.kernels.triton_energy import triton_energy

torch.manual_seed(0)
errors = []
for length_q, length_k, head_dim, block in [
    (128, 64, 64, (64, 64)),
    (35, 83, 64, (32, 48)),
    (40, 33, 128, (16, 128)),
    (20, 40, 40, (16, 32)),
]:
    q = torch.randn(2, length_q, 2, head_dim).transpose(1, 2)
    k = torch.randn(2, length_k, 2, head_dim).transpose(1, 2)
    scale = 0.2
    exact = reference_energy(q, k, block=block, scale=scale)
    lse = torch.logsumexp(q @ k.mT * scale, -1)
    for given in (None, lse):
        energy = triton_energy(q, k, block, scale, given)
        assert energy.shape == exact.shape, (energy.shape, exact.shape)
        errors.append((energy - exact).abs().max().item())
print(max(errors))
"""

COMPILED = """
import json, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from calibatt_compiler.kernels.triton_energy import STRIDES, energy_constexprs, energy_tile
from calibatt_compiler.kernels.triton_launch import launch_config
from calibatt_compiler.plan.pattern import BlockPattern

report = {}
for name, (arch, element, head_dim, has_lse) in json.loads(sys.argv[1]).items():
    dtype = {"*bf16": torch.bfloat16, "*fp16": torch.float16, "*fp32": torch.float32}[element]
    pattern = BlockPattern.dense(1, 1000, 1000)
    config = launch_config(pattern, arch=arch, dtype=dtype, head_dim=head_dim)
    constexprs = energy_constexprs(config, has_lse=has_lse)
    signature = {"q_ptr": element, "k_ptr": element, "lse_ptr": "*fp32", "energy_ptr": "*fp32"}
    signature |= {s: "i32" if s.endswith("s") else "i64" for s in STRIDES}
    signature |= dict.fromkeys(("heads", "length_q", "length_k", "tiles", "key_blocks"), "i32")
    signature |= {"scale_log2": "fp32"} | dict.fromkeys(constexprs, "constexpr")
    attributes = {(i,): [["tt.divisibility", 16]] for i in range(4)}
    source = ASTSource(energy_tile, signature, constexprs, attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=config.options)
    with open(f"{sys.argv[2]}/{name}.cubin", "wb") as file:
        file.write(kernel.asm["cubin"])
    marks = ("wgmma.mma_async", "mma.sync", "tcgen05.mma", "cp.async")
    report[name] = [mark for mark in marks if mark in kernel.asm["ptx"]]
print(json.dumps(report))
"""

VARIANTS = {
    # name: architecture, element, head dim, whether the log-sum-exp is given
    "ampere-64": (80, "*bf16", 64, False),
    "ampere-128": (80, "*bf16", 128, False),
    "hopper-64": (90, "*bf16", 64, False),
    "hopper-128": (90, "*bf16", 128, False),
    "blackwell-64": (100, "*bf16", 64, False),
    "blackwell-128": (100, "*bf16", 128, False),
    "half-known-lse": (90, "*fp16", 128, True),
    "single": (80, "*fp32", 128, False),
}
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


def run_python(code: str, *arguments: str, **environment: str) -> str:
    """Run code in a process of its own: the interpreter is chosen when kernels are defined."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_interpreted_kernel_equals_the_definition():
    assert float(run_python(INTERPRETED, TRITON_INTERPRET="1")) < 1e-6


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Folder of cubins, and which instructions are in each variant's PTX."""
    folder = tmp_path_factory.mktemp("energy")
    out = run_python(COMPILED, json.dumps(VARIANTS), str(folder), TRITON_INTERPRET="0")
    return folder, json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("name", VARIANTS)
def test_compiled_kernel_uses_tensor_cores_and_spills_nothing(compiled, name):
    folder, instructions = compiled
    arch, element, *_ = VARIANTS[name]
    if element != "*fp32":  # exact float32 products have no tensor core
        assert TENSOR_CORES[arch] in instructions[name]
        assert "cp.async" in instructions[name]
    assert local_memory(folder / f"{name}.cubin") == 0


def local_memory(cubin) -> int:
    """Bytes of local memory a thread, from the cubin's resource usage: 0 without spills."""
    from triton import knobs

    usage = subprocess.run(
        [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    match = re.search(r"STACK:(\d+).*?LOCAL:(\d+)", usage)
    assert match, usage
    return int(match[1]) + int(match[2])
