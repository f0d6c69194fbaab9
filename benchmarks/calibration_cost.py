"""What observing a forward pass adds to a dense compiled one, side by side in one process.

    python benchmarks/calibration_cost.py --out results            480p, 2 layers of Wan 14B
    python benchmarks/calibration_cost.py --sizes 480p 720p
    python benchmarks/calibration_cost.py --check                  no GPU: tiny, times mean nothing

The model has Wan 2.1 14B's widths and random weights. `dense` is stock `torch.compile`; `observed`
is the same forward as calibration runs it: attention, block energies and the selection of blocks.
Both are timed by the wall clock, in turn, each until the device is done; medians over the steps of
one input, the first two of which compile. The aim is a ratio of at most 1.35.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from dit_layer import SCALES, make_model
from record import write_record

import calibatt_compiler
from calibatt_compiler.calibration import CalibrationConfig

AIM = 1.35
COMPILING = 2
"""Steps that are not counted."""


@dataclass
class Row:
    """One size; milliseconds a forward pass of `layers` layers."""

    size: str
    tokens: int
    layers: int
    dense: float
    observed: float
    ratio: float


def timed(run: Any, device: torch.device) -> float:
    """Milliseconds until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def measure(size: str, options: argparse.Namespace, device: torch.device) -> Row:
    """Time both at one size."""
    scale = SCALES[size]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = make_model(scale, options.layers, device, dtype)
    dense = torch.compile(deepcopy(model), fullgraph=True, dynamic=False)
    block = 128 if device.type == "cuda" else 32
    steps = options.steps + COMPILING
    given = {
        "hidden_states": torch.randn(1, 16, *scale.latent, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, scale.text, 4096, device=device, dtype=dtype),
        "return_dict": False,
    }
    times: dict[str, list[float]] = {"dense": [], "observed": []}
    with tempfile.TemporaryDirectory() as folder:
        config = CalibrationConfig(
            grid=scale.grid,
            block=(block, block),
            num_steps=steps,
            run_folder=Path(folder) / "run",
            progress=False,
        )
        with calibatt_compiler.calibration(model, config) as run, run.input():
            for step in range(steps):
                at = torch.tensor([1000.0 * (1 - step / steps)], device=device)
                for name, module in (("dense", dense), ("observed", model)):
                    took = timed(lambda m=module, t=at: m(**given, timestep=t), device)
                    if step >= COMPILING:
                        times[name].append(took)
    middle = {name: statistics.median(values) for name, values in times.items()}
    ratio = middle["observed"] / middle["dense"]
    tokens = scale.grid[0] * scale.grid[1] * scale.grid[2]
    return Row(size, tokens, options.layers, middle["dense"], middle["observed"], ratio)


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=list(SCALES), default=["480p"])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="that are counted")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--check", action="store_true", help="tiny, on a CPU: shows that it runs")
    options = parser.parse_args()
    if options.check:
        options.sizes, options.layers, options.steps = ["tiny"], 1, 1
    device = torch.device("cpu" if options.check else "cuda")
    rows = []
    for size in options.sizes:
        row = measure(size, options, device)
        rows.append(row)
        print(
            f"{size}: {row.tokens} tokens, {row.layers} layers: dense {row.dense:.1f} ms, observed "
            f"{row.observed:.1f} ms, ratio {row.ratio:.2f}; aim {AIM}",
            flush=True,
        )
        if options.out is not None:
            write_record(options.out / "calibration_cost.json", device, rows, check=options.check)
    return 0


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())
