"""Each GPU kernel once on small shapes, to be run under compute-sanitizer:

    compute-sanitizer --tool memcheck python tests/support/sanitize.py
    compute-sanitizer --tool racecheck python tests/support/sanitize.py

Arguments: names of kernels; default all. Prints a line a kernel; errors are compute-sanitizer's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from gluon_control import run_control

from calibatt_compiler.kernels.energy import block_energy
from calibatt_compiler.kernels.hopper.attention import HopperAttention
from calibatt_compiler.kernels.hopper.energy import hopper_attention_and_energy
from calibatt_compiler.kernels.portable.attention import TableAttention
from calibatt_compiler.kernels.portable.energy_fused import triton_attention_and_energy
from calibatt_compiler.kernels.portable.tiles import HOPPER, architecture
from calibatt_compiler.kernels.request import KernelRequest
from calibatt_compiler.plan.pattern import BlockPattern

CUDA = torch.device("cuda", 0)
ROWS, KEYS, HEADS, D = 300, 461, 2, 64


def main() -> None:
    """Run what is asked for."""
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, rows, HEADS, D, device=CUDA, dtype=torch.bfloat16).transpose(1, 2)
        for rows in (ROWS, KEYS, KEYS)
    )
    mask = torch.rand(HEADS, 3, 4) < 0.6
    mask[..., 0] = True
    pattern = BlockPattern.from_mask(mask, query_length=ROWS, key_length=KEYS)
    where = {"device": CUDA, "dtype": q.dtype, "head_dim": D}
    cases: dict[str, Callable[[], object]] = {
        "table": lambda: TableAttention(KernelRequest(pattern, **where))(q, k, v),
        "energies": lambda: block_energy(q, k),
        "fused energies": lambda: triton_attention_and_energy(q, k, v, (128, 128), 0.125),
    }
    if architecture(CUDA) == HOPPER:
        spiked = q.clone()
        spiked[0, 0, 5] = 40.0 * k[0, 0, 460]
        cases |= {
            "hopper fixed": lambda: HopperAttention(KernelRequest(pattern, **where))(q, k, v),
            "hopper exact": lambda: HopperAttention(
                KernelRequest(pattern, softmax="exact", **where)
            )(q, k, v),
            "hopper repaired": lambda: HopperAttention(KernelRequest(pattern, **where))(
                spiked, k, v
            ),
            "control": run_control,
            "control barrier": lambda: run_control(barrier=True),
            "hopper energies": lambda: hopper_attention_and_energy(q, k, v, (128, 128), 0.125),
        }
    for name in sys.argv[1:] or cases:
        cases[name]()
        torch.cuda.synchronize()
        print(name, "ran", flush=True)


if __name__ == "__main__":
    main()
