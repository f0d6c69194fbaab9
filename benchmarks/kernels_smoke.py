"""Are the portable kernels right on this GPU, and how fast beside SDPA and FlexAttention?

    python benchmarks/kernels_smoke.py --out results    about a minute on an H100
    python benchmarks/kernels_smoke.py --sweep          also other tiles for the table kernel

Errors are against float64 on sampled query blocks, as a multiple of SDPA's own error in the same
dtype. Times are medians of rounds in which all kernels take turns, in one process. Efficiency is
density * t(SDPA, dense) / t. Without a GPU, tiny shapes run under Triton's interpreter: it tests
this script, its times mean nothing. Results are written to OUT/kernels_smoke.json.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined
# A cache of its own: what is measured is compiled now.
_folder = tempfile.TemporaryDirectory(prefix="calibatt-smoke-")
os.environ["CALIBATT_CACHE_DIR"] = _folder.name

import torch.nn.functional as F  # noqa: E402
from record import write_record  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from calibatt_compiler.kernels.baked.attention import BakedTier  # noqa: E402
from calibatt_compiler.kernels.baked.cover import EXACT  # noqa: E402
from calibatt_compiler.kernels.portable.attention import TableAttention  # noqa: E402
from calibatt_compiler.kernels.portable.energy_scores import triton_energy  # noqa: E402
from calibatt_compiler.kernels.portable.tiles import TileSettings  # noqa: E402
from calibatt_compiler.kernels.request import KernelRequest  # noqa: E402
from calibatt_compiler.plan.pattern import BlockPattern  # noqa: E402

DEVICE = torch.device("cuda", torch.cuda.current_device()) if GPU else torch.device("cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
ROUNDS = 15 if GPU else 1
SWEEP = [
    TileSettings(m, n, warps, stages)
    for m, n, warps, stages in (
        (128, 128, 8, 2),
        (128, 128, 8, 3),
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 64, 8, 4),
        (128, 64, 4, 2),
        (128, 64, 4, 3),
        (128, 32, 4, 4),
        (64, 64, 4, 3),
        (64, 128, 4, 3),
    )
]
Kernel = Callable[[], Tensor]


@dataclass(frozen=True)
class Shape:
    """One measured problem; `frame` is the stride of the diagonals in blocks."""

    name: str
    tokens: int
    heads: int
    head_dim: int
    block: int
    frame: int
    ragged: bool


SHAPES = (
    [
        Shape("demo, ragged", 2160, 4, 64, 64, 6, True),
        Shape("480p, bands", 32760, 12, 128, 128, 12, False),
        Shape("480p, ragged", 32760, 12, 128, 128, 12, True),
    ]
    if GPU
    else [Shape("tiny, ragged", 100, 2, 32, 16, 3, True)]
)


@dataclass
class Result:
    """What was found for one shape; times in milliseconds."""

    shape: Shape
    density: float
    errors: dict[str, float] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    efficiency: dict[str, float] = field(default_factory=dict)
    equal_bits: bool = False
    notes: list[str] = field(default_factory=list)


def make_pattern(shape: Shape) -> BlockPattern:
    """Diagonals a frame apart and a global prefix; each head has its own widths."""
    blocks = -(-shape.tokens // shape.block)
    generator = torch.Generator().manual_seed(0)
    row, column = torch.arange(blocks)[:, None], torch.arange(blocks)[None]
    mask = torch.zeros(shape.heads, blocks, blocks, dtype=torch.bool)
    for head in range(shape.heads):
        for frame in range(-3, 4):
            width = (1 + head % 3 + 2 * (frame == 0)) * blocks // 100
            mask[head] |= (column - row - frame * (shape.frame + head)).abs() <= width
    mask[:, :, : max(1, blocks // 64)] = True
    if shape.ragged:
        edge = (mask.roll(1, 2) | mask.roll(-1, 2)) & ~mask
        mask |= edge & (torch.rand(mask.shape, generator=generator) < 0.3)
        mask &= torch.rand(mask.shape, generator=generator) > 0.03
        mask |= torch.eye(blocks, dtype=torch.bool)
    return BlockPattern.from_mask(
        mask,
        query_length=shape.tokens,
        key_length=shape.tokens,
        block=(shape.block, shape.block),
    )


def sampled_errors(
    pattern: BlockPattern, q: Tensor, k: Tensor, v: Tensor, outputs: dict[str, Tensor]
) -> dict[str, float]:
    """RMS error against float64 over SDPA's own, on twelve query blocks."""
    generator = torch.Generator().manual_seed(1)
    mask = pattern.mask()
    squares = dict.fromkeys([*outputs, "sdpa"], 0.0)
    rows = torch.randint(pattern.query_blocks, (11,), generator=generator).tolist()
    for i, r in enumerate([*rows, pattern.query_blocks - 1]):
        h = i % pattern.heads
        kept = mask[h, r].repeat_interleave(pattern.block_n)[: pattern.key_length].to(q.device)
        tokens = slice(r * pattern.block_m, min((r + 1) * pattern.block_m, pattern.query_length))
        part = q[:1, h : h + 1, tokens], k[:1, h : h + 1, kept], v[:1, h : h + 1, kept]
        scores = part[0].double() @ part[1].double().transpose(-1, -2) / math.sqrt(q.shape[-1])
        exact = scores.softmax(-1) @ part[2].double()
        plain = F.scaled_dot_product_attention(*part)
        squares["sdpa"] += (plain.double() - exact).square().sum().item()
        for name, output in outputs.items():
            difference = output[:1, h : h + 1, tokens].double() - exact
            squares[name] += difference.square().sum().item()
    own = squares.pop("sdpa")
    return {name: math.sqrt(value / own) for name, value in squares.items()}


def energy_error(q: Tensor, k: Tensor, block: int) -> float:
    """Largest error of the block energies of two query blocks, against float64."""
    scale = 1 / math.sqrt(q.shape[-1])
    energy = triton_energy(q, k, (block, block), scale, None)
    largest = 0.0
    for r in (0, energy.shape[2] - 1):
        rows = q[:, :, r * block : (r + 1) * block].double()
        weights = (rows @ k.double().transpose(-1, -2) * scale).softmax(-1).mean(2)
        padded = F.pad(weights, (0, -weights.shape[-1] % block))
        exact = padded.unflatten(-1, (-1, block)).sum(-1)
        largest = max(largest, (energy[:, :, r].double() - exact).abs().max().item())
    return largest


def milliseconds(run: Kernel) -> float:
    """Time of one call: device time on a GPU, wall time else."""
    if not GPU:
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    run()
    run()
    end_event.record()
    end_event.synchronize()
    return float(start_event.elapsed_time(end_event)) / 2


def round_robin(kernels: dict[str, Kernel]) -> dict[str, float]:
    """Median time of each kernel; they take turns, so that all meet the same clocks."""
    samples: dict[str, list[float]] = {name: [] for name in kernels}
    for warm_up in kernels.values():
        warm_up()
    for _ in range(ROUNDS):
        for name, run in kernels.items():
            samples[name].append(milliseconds(run))
    return {name: statistics.median(values) for name, values in samples.items()}


def sdpa_kernels(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Kernel]:
    """Dense SDPA by every backend that takes these operands."""
    if not GPU:
        return {"sdpa math": lambda: F.scaled_dot_product_attention(q, k, v)}
    backends = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
    found: dict[str, Kernel] = {}
    for backend in backends:

        def run(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        try:
            run()
        except RuntimeError:
            continue
        found[f"sdpa {backend.name.split('_')[0].lower()}"] = run
    return found


def flex_kernels(
    pattern: BlockPattern,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    other_settings: bool,
    notes: list[str],
) -> dict[str, Kernel]:
    """FlexAttention with whole blocks only, in its own settings and in others."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    counts, indices = (x[None].to(q.device) for x in pattern.kv_blocks())
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(counts),
        indices,
        counts,
        indices,
        BLOCK_SIZE=(pattern.block_m, pattern.block_n),
        seq_lengths=(pattern.query_length, pattern.key_length),
    )
    settings: dict[str, dict[str, Any]] = {
        "flex": {},
        "flex 128x64": {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
        "flex 128x128": {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
    }
    found: dict[str, Kernel] = {}
    compiled = torch.compile(flex_attention, dynamic=False)
    for name, options in settings.items():
        # Each takes seconds to compile: other settings are tried on one shape only.
        if options and (options["BLOCK_M"] > pattern.block_m or not other_settings):
            continue

        def run(options: dict[str, Any] = options) -> Tensor:
            return compiled(q, k, v, block_mask=mask, kernel_options=options)  # type: ignore[no-any-return]

        try:
            run()
        except Exception as error:
            notes.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
            continue
        found[name] = run
    return found


def measure(shape: Shape, sweep: bool) -> Result:
    """Check and time all kernels on one shape."""
    torch.manual_seed(0)
    pattern = make_pattern(shape)
    # As diffusers hands them over: permuted views of (B, S, H, D).
    q, k, v = (
        torch.randn(
            1, shape.tokens, shape.heads, shape.head_dim, dtype=DTYPE, device=DEVICE
        ).transpose(1, 2)
        for _ in range(3)
    )
    where: dict[str, Any] = {"device": DEVICE, "dtype": DTYPE, "head_dim": shape.head_dim}
    start = time.perf_counter()
    baked = BakedTier(KernelRequest(pattern, **where), limits=EXACT)
    covered = time.perf_counter() - start
    served = baked.wait(120)
    kernel = baked.kernel() or baked.table
    result = Result(shape, pattern.density)
    result.notes.append(
        f"cover {covered:.1f} s, compiled after {time.perf_counter() - start:.1f} s"
        + ("" if served else f"; NOT BAKED: {baked.reason}")
    )
    table = TableAttention(KernelRequest(pattern, **where))
    outputs = {"table": table(q, k, v)}
    result.errors = sampled_errors(pattern, q, k, v, outputs)
    output = kernel(q, k, v)
    result.errors |= sampled_errors(pattern, q, k, v, {"baked": output})
    result.equal_bits = torch.equal(output, outputs["table"])
    result.errors["energy, absolute"] = energy_error(q, k, shape.block)

    kernels: dict[str, Kernel] = sdpa_kernels(q, k, v)
    if GPU:
        kernels |= flex_kernels(
            pattern, q, k, v, other_settings=not shape.ragged, notes=result.notes
        )
    kernels["table"] = lambda: table(q, k, v)
    kernels["baked"] = lambda: kernel(q, k, v)
    if sweep:
        for tiles in SWEEP:
            if shape.block % tiles.m or shape.block % tiles.n:
                continue
            tiled = TableAttention(KernelRequest(pattern, **where), settings=tiles)
            name = f"table {tiles.m}x{tiles.n} w{tiles.warps} s{tiles.stages}"
            try:
                tiled(q, k, v)
            except Exception as error:
                result.notes.append(f"{name}: {type(error).__name__}")
                continue
            kernels[name] = lambda tiled=tiled: tiled(q, k, v)  # type: ignore[misc]
    scale = 1 / math.sqrt(shape.head_dim)
    kernels["energy"] = lambda: triton_energy(q, k, (shape.block, shape.block), scale, None)
    result.times = round_robin(kernels)
    dense = min(value for name, value in result.times.items() if name.startswith("sdpa"))
    for name, value in result.times.items():
        if not name.startswith("sdpa") and name != "energy":
            density = kernel.density if name == "baked" else pattern.density
            result.efficiency[name] = density * dense / value
    return result


def report(result: Result) -> None:
    """Print one shape's findings."""
    shape = result.shape
    print(
        f"\n{shape.name}: S={shape.tokens} H={shape.heads} D={shape.head_dim} "
        f"block {shape.block}, density {result.density:.3f}, "
        f"table and baked equal: {result.equal_bits}"
    )
    print("  errors: " + ", ".join(f"{n} {e:.3g}" for n, e in result.errors.items()))
    for name, value in result.times.items():
        e = result.efficiency.get(name)
        print(f"  {name:24s} {value:9.3f} ms" + (f"   efficiency {e:.2f}" if e else ""))
    for note in result.notes:
        print(f"  {note}")


def main() -> int:
    """Measure every shape; exit status 1 if a kernel is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sweep", action="store_true", help="also time other tiles")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    name = torch.cuda.get_device_name() if GPU else "CPU, Triton interpreter"
    print(f"{name}, torch {torch.__version__}, {DTYPE}")
    results, wrong = [], False
    for shape in SHAPES:
        result = measure(shape, options.sweep)
        report(result)
        results.append(result)
        # Float32 SDPA on a CPU sums in another order: only low precision is a fair yardstick.
        worst = max(result.errors["table"], result.errors["baked"])
        limit = 1.2 if GPU else 10.0
        wrong |= not (worst <= limit and result.errors["energy, absolute"] < 1e-3)
        wrong |= not result.equal_bits
    print("\nWRONG" if wrong else "\nall right")
    if options.out is not None:
        write_record(options.out / "kernels_smoke.json", name, results, check=not GPU)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
