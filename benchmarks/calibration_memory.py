"""Which memory calibrating a layer of a large model takes, on operands that are drawn.

    python benchmarks/calibration_memory.py --drawn     a layer of Wan 14B at 720p, 50 steps, CPU
    python benchmarks/calibration_memory.py             the same with its attention: needs a GPU
    python benchmarks/calibration_memory.py --heads 1 --steps 1     a CPU can do that much of it
    python benchmarks/calibration_memory.py --small     seconds: checks that it works

With `--drawn` attention is not computed and its energies are drawn: what is measured is recording,
the run folder and the making of the plan. Without, energies are those of random queries and keys.
Memory is what the process, or the GPU, holds at its peak beyond what it held before the
calibration: the model and the operands of its layers. Writes OUT/calibration_memory.json.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from plan_size import memory_mb
from record import write_record
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import calibatt_compiler
from calibatt_compiler.calibration import CalibrationConfig
from calibatt_compiler.kernels import energy as energies

LAYERS = 40
"""Layers of Wan 14B, that the memory of an input's masks is scaled to."""


class Layers(nn.Module):
    """Attention calls on operands that it holds."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        super().__init__()
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        tokens = math.prod(options.grid)
        shape = (1, tokens, options.heads, 16 if options.drawn else 128)
        generator = torch.Generator(device).manual_seed(0)
        for name in ("query", "key"):
            operand = torch.randn(shape, dtype=dtype, device=device, generator=generator)
            self.register_buffer(name, operand.transpose(1, 2))
        self.layers = nn.ModuleList(Layer() for _ in range(options.layers))

    def forward(self, timestep: Tensor) -> Tensor:
        """Return something that depends on every layer."""
        outputs = [layer(self.query, self.key, timestep) for layer in self.layers]
        return torch.stack([output.mean() for output in outputs])


class Layer(nn.Module):
    """One attention call."""

    def forward(self, query: Tensor, key: Tensor, timestep: Tensor) -> Tensor:
        """Attend; the scores depend on the timestep."""
        return scaled_dot_product_attention(query * (1 + timestep / 1000), key, key)


class DrawnEnergies:
    """Stands for `attention_with_energy`: mass that falls with distance, and noise."""

    def __init__(self) -> None:
        self._calls = 0
        self._drawn: Tensor | None = None

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        block: tuple[int, int],
        scale: float | None,
        queries: float,
        padding: None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return zeros, and energies (B, H, query_blocks, key_blocks) whose rows sum to 1."""
        rows, columns = (-(-x.shape[2] // size) for x, size in zip((q, k), block, strict=True))
        if self._drawn is None:
            distance = torch.arange(rows)[:, None] - torch.arange(columns)
            noise = torch.rand(
                q.shape[1], rows, columns, generator=torch.Generator().manual_seed(1)
            )
            self._drawn = torch.softmax(8 * noise - distance.abs() / (rows / 16), -1)
        self._calls += 1
        return torch.zeros_like(v), self._drawn.roll(self._calls, 1)[None]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Calibrate, and return what was measured."""
    device = torch.device("cuda" if torch.cuda.is_available() and not options.drawn else "cpu")
    module = Layers(options, device)
    before, on_gpu = memory_mb("VmRSS"), 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        on_gpu = torch.cuda.memory_allocated()
    drawn = patch.object(energies, "attention_with_energy", DrawnEnergies())
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        config = CalibrationConfig(
            grid=options.grid,
            block=(options.block, options.block),
            num_steps=options.steps,
            run_folder=Path(folder) / "run",
            progress=False,
        )
        if options.drawn:
            drawn.start()
        with calibatt_compiler.calibration(module, config) as run:
            for _ in range(options.inputs):
                with run.input():
                    for step in range(options.steps):
                        module(torch.tensor(1000.0 * (1 - step / options.steps), device=device))
            recorded = time.perf_counter() - start
            peak_recording = memory_mb("VmHWM")
            plan = run.plan()
            files = sum(path.stat().st_size for path in (Path(folder) / "run").glob("input-*"))
        plan.save(Path(folder) / "plan.calibatt")
    drawn.stop() if options.drawn else None
    blocks = -(-math.prod(options.grid) // options.block)
    masks = options.heads * blocks * -(-blocks // 8) * options.steps * options.layers / 1e6
    host = memory_mb("VmHWM") - before
    found: dict[str, Any] = {
        "energies": "drawn" if options.drawn else "computed",
        **{name: getattr(options, name) for name in ("layers", "heads", "steps", "inputs")},
        "tokens": math.prod(options.grid),
        "density of the plan": plan.density(),
        "seconds": time.perf_counter() - start,
        "seconds of recording": recorded,
        "run folder MB": files / 1e6,
        "masks of an input MB": masks,
        "host memory before MB": before,
        "host memory beyond that MB": host,
        "of which while recording MB": peak_recording - before,
        f"host memory with the masks of {LAYERS} layers MB": host
        + masks * (LAYERS / options.layers - 1),
    }
    if device.type == "cuda":
        found["GPU memory before MB"] = on_gpu / 1e6
        found["GPU memory beyond that MB"] = (torch.cuda.max_memory_allocated() - on_gpu) / 1e6
    return found


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--heads", type=int, default=40)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--inputs", type=int, default=2)
    parser.add_argument("--drawn", action="store_true", help="draw energies, compute no attention")
    parser.add_argument("--folder", type=Path, help="where the run folder is made")
    parser.add_argument("--small", action="store_true", help="a small video, 2 heads, 3 steps")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.grid, options.block = (21, 45, 80), 128
    if options.small:
        options.grid, options.block, options.heads, options.steps = (2, 9, 16), 32, 2, 3
    found = measure(options)
    if options.out is not None:
        on_gpu = torch.cuda.is_available() and not options.drawn
        device = torch.device("cuda" if on_gpu else "cpu")
        path = options.out / "calibration_memory.json"
        write_record(path, device, [found], check=options.small)
    for name, value in found.items():
        print(f"{name:44} {value:.4g}" if isinstance(value, float) else f"{name:44} {value}")


if __name__ == "__main__":
    main()
