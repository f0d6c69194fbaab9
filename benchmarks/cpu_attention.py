"""Time the CPU kernel against stock SDPA and FlexAttention, and block energies against SDPA.

    python benchmarks/cpu_attention.py --threads 2 --out results
    python benchmarks/cpu_attention.py --check                    seconds: shows that it runs

Prints, per density, medians in milliseconds of rounds that interleave all candidates, so that a
busy machine disturbs them alike, the ratio dense / kernel, and the kernel's efficiency e =
density x dense / kernel. Writes OUT/cpu_attention.json.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import write_record
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from calibatt_compiler.kernels.cpu.attention import NativeCpuAttention
from calibatt_compiler.kernels.energy import attention_with_energy, block_energy
from calibatt_compiler.plan.pattern import BlockPattern


def medians(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds by candidate: median over interleaved rounds, after one to warm up."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name, candidate in candidates.items():
            start = time.perf_counter()
            candidate()
            if turn:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def random_pattern(heads: int, tokens: int, block: int, density: float) -> BlockPattern:
    """Keep blocks at random, the diagonal always."""
    blocks = math.ceil(tokens / block)
    mask = torch.rand(heads, blocks, blocks) < density
    mask |= torch.eye(blocks, dtype=torch.bool)
    return BlockPattern.from_mask(
        mask, query_length=tokens, key_length=tokens, block=(block, block)
    )


def flex_kernel(pattern: BlockPattern, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
    """FlexAttention through Inductor; blocks are kept whole, so nothing is evaluated in them."""
    count, indices = pattern.kv_blocks()
    blocks = BlockMask.from_kv_blocks(
        count[None],
        indices[None],
        BLOCK_SIZE=(pattern.block_m, pattern.block_n),
        seq_lengths=(pattern.query_length, pattern.key_length),
        compute_q_blocks=False,
    )
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    options = {"SKIP_MASK_SCORE": True}
    return lambda: compiled(q, k, v, block_mask=blocks, kernel_options=options)


def main() -> None:
    """Parse the arguments, time, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2160)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--blocks", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.2, 0.3, 0.4, 0.5, 0.6, 1])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--without-flex", action="store_true", help="spare the C++ compiler")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--check", action="store_true", help="tiny: shows that it runs")
    options = parser.parse_args()
    if options.check:
        options.tokens, options.blocks, options.densities, options.rounds = 300, [64], [0.4], 1
        options.without_flex = True
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shape = (1, options.tokens, options.heads, options.head_dim)
    dtype = getattr(torch, options.dtype)
    q, k, v = (torch.randn(shape).to(dtype).transpose(1, 2) for _ in range(3))

    def dense() -> object:
        return scaled_dot_product_attention(q, k, v)

    rows: list[dict[str, Any]] = []
    for block in options.blocks:
        for density in options.densities:
            pattern = random_pattern(options.heads, options.tokens, block, density)
            kernel = NativeCpuAttention(pattern, dtype=dtype, head_dim=options.head_dim)
            candidates: dict[str, Callable[[], object]] = {
                "SDPA": dense,
                "ours": lambda kernel=kernel: kernel(q, k, v),
            }
            if not options.without_flex:
                torch.compiler.reset()
                candidates["FlexAttention"] = flex_kernel(pattern, q, k, v)
            ms = medians(candidates, options.rounds)
            row = "  ".join(
                f"{name} {ms[name]:7.2f} ms (x{ms['SDPA'] / ms[name]:.2f}, "
                f"e {pattern.density * ms['SDPA'] / ms[name]:.2f})"
                for name in ms
            )
            print(f"block {block:4d}  density {pattern.density:.2f}  {row}", flush=True)
            rows.append({"block": block, "density": pattern.density, "ms": ms})
        size = (block, block)
        ms = medians(
            {
                "SDPA": dense,
                "energies alone": lambda size=size: block_energy(q, k, block=size),
                "output and energies": lambda size=size: attention_with_energy(q, k, v, block=size),
            },
            options.rounds,
        )
        print(
            f"block {block:4d}  energies {ms['energies alone']:.2f} ms, with output "
            f"{ms['output and energies']:.2f} ms, dense {ms['SDPA']:.2f} ms",
            flush=True,
        )
        rows.append({"block": block, "density": 1.0, "ms": ms})
    if options.out is not None:
        settings = {name: getattr(options, name) for name in ("tokens", "heads", "head_dim")}
        settings |= {"dtype": options.dtype, "rounds": options.rounds, "check": options.check}
        path = options.out / "cpu_attention.json"
        write_record(path, torch.device("cpu"), rows, **settings)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
