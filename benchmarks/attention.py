"""Speed of attention, side by side in one process: FlashAttention, SDPA, FlexAttention, ours.

    python benchmarks/attention.py --quick --out results      few cases; minutes on an H100
    python benchmarks/attention.py --out results              all of them
    python benchmarks/attention.py --check                    no GPU: tiny, times mean nothing
    python benchmarks/attention.py --sizes 480p --masks banded --densities 0.2 0.375 \
        --kernels fa3 table "hopper fixed"
    python benchmarks/attention.py --masks zones --rounds 4 --out results     octave zones

Efficiency is density x t(dense) / t: the density is what the mask keeps, the dense time that of
FlashAttention-3 where it is installed (`pip install fa3-fwd`), else of the fastest SDPA backend.
Errors are against float64, over SDPA's own. Results are printed and written to OUT/attention.json
after each case, with a picture. The exit status is 1 if one of our kernels is wrong.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

# A cache of its own: what is measured is compiled now.
_folder = tempfile.TemporaryDirectory(prefix="calibatt-attention-")
os.environ.setdefault("CALIBATT_CACHE_DIR", _folder.name)

from attention_cases import MASKS, SIZES, ZONES, Case, make_operands, make_pattern  # noqa: E402
from attention_kernels import ALL, DENSE, Contestant, Operands  # noqa: E402
from attention_timing import beat, relative_error, sustained_and_burst  # noqa: E402
from record import write_record  # noqa: E402
from zone_cases import cpu, drawn, hopper, make_zones, portable  # noqa: E402

from calibatt_compiler.plan.pattern import BlockPattern  # noqa: E402

DENSITIES = (0.1, 0.2, 0.32, 0.375, 0.6, 1.0)
ZONE_DENSITIES = (0.12, 0.2, 0.3, 0.4)
OF_ZONES = {
    "hopper zones": hopper(),
    "hopper zones literals": hopper(literal=True),
    "hopper zones by rows": hopper(order="rows"),
    "hopper drawn": drawn(ALL["hopper fixed"]),
    "table zones": portable(),
    "table zones literals": portable(literal=True),
    "table drawn": drawn(ALL["table"]),
    "cpu zones": cpu,
}
ZONE_KERNELS = (
    "fa3", "hopper zones", "hopper zones literals", "hopper zones by rows", "table zones literals"
)  # fmt: skip
KERNELS = tuple(name for name in ALL if name not in ("math", "reference", "cpu"))
QUICK = (
    ("480p", "banded", 0.2),
    ("480p", "ragged", 0.375),
    ("480p", "random", 0.375),
    ("480p", "mixed", 0.2),
    ("480p", "dense", 1.0),
    ("720p", "banded", 0.375),
)
QUICK_KERNELS = ("fa3", "cudnn", "table", "hopper exact", "hopper fixed", "hopper literals")
CHECK = (("tiny", "banded", 0.4), ("tiny", "random", 0.4), ("tiny", "mixed", 0.3))
CHECK_KERNELS = ("math", "reference")
CHECK_ZONES = ("math", "cpu zones")
OTHERS = (*DENSE, "fa4 sparse", "flex", "flex 128x64", "flex 128x128")


@dataclass
class Result:
    """What was found for one case; times in milliseconds, by kernel."""

    case: str
    tokens: int
    heads: int
    density: float
    errors: dict[str, float] = field(default_factory=dict)
    densities: dict[str, float] = field(default_factory=dict)
    first_call_s: dict[str, float] = field(default_factory=dict)
    sustained: dict[str, float] = field(default_factory=dict)
    burst: dict[str, float] = field(default_factory=dict)
    efficiency: dict[str, float] = field(default_factory=dict)
    burst_efficiency: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    allowed_error: float = 1.1

    @property
    def wrong(self) -> list[str]:
        """Kernels of ours whose error is too large, NaN included."""
        ours = (name for name in self.errors if name not in OTHERS)
        return [name for name in ours if not self.errors[name] <= self.allowed_error]


def contestants(
    names: Sequence[str], pattern: Any, operands: Operands, result: Result
) -> dict[str, Contestant]:
    """Make each kernel, call it once and look at its error."""
    found = {}
    for name in names:
        beat()
        start = time.perf_counter()
        try:
            contestant = (ALL | OF_ZONES)[name](pattern, operands)
            out = contestant.run()
            if out.is_cuda:
                torch.cuda.synchronize()
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            result.notes.append(f"{name} left out: {reason[:300]}")
            print(f"  {result.notes[-1]}", flush=True)
            continue
        result.first_call_s[name] = time.perf_counter() - start
        result.errors[name] = relative_error(contestant, out, operands)
        result.densities[name] = contestant.density
        found[name] = contestant
        print(
            f"  {name:16s} error {result.errors[name]:.3f} of SDPA's, made and called in "
            f"{result.first_call_s[name]:.1f} s",
            flush=True,
        )
    return found


def measure(
    case: Case, names: Sequence[str], device: torch.device, dtype: torch.dtype, rounds: int
) -> Result:
    """Check and time all kernels on one case."""
    pattern = make_zones(case) if case.mask == ZONES else make_pattern(case)
    operands = make_operands(case.size, device, dtype)
    result = Result(case.name, case.size.tokens, case.size.heads, pattern.density)
    print(f"\n{case.name}: S={case.size.tokens} H={case.size.heads} D={case.size.head_dim}, "
          f"density {pattern.density:.3f}", flush=True)  # fmt: skip
    found = contestants(names, pattern, operands, result)
    runs = {name: contestant.run for name, contestant in found.items()}
    on_gpu = device.type == "cuda"
    # In float32 SDPA on a CPU is no yardstick: it sums in another order.
    result.allowed_error = 1.1 if on_gpu else 10.0
    result.sustained, result.burst = sustained_and_burst(runs, on_gpu=on_gpu, rounds=rounds)
    baseline = [name for name in runs if name in DENSE]
    if not baseline:
        result.notes.append("no dense kernel ran: no efficiency")
    else:
        base = "fa3" if "fa3" in baseline else min(baseline, key=result.sustained.__getitem__)
        for name in runs:
            # Of what was asked for: blocks that a cover adds are no merit.
            part = 1.0 if name in DENSE else result.density
            result.efficiency[name] = part * result.sustained[base] / result.sustained[name]
            result.burst_efficiency[name] = part * result.burst[base] / result.burst[name]
    for name, contestant in found.items():
        repairs = contestant.kernel.repairs if contestant.kernel is not None else 0
        if repairs:
            result.notes.append(f"{name}: {repairs} calls repaired")
    return result


def report(result: Result, head_dim: int) -> None:
    """Print one case's times."""
    flops = 4 * result.heads * result.tokens**2 * head_dim
    for name, ms in result.sustained.items():
        rate = flops * result.densities[name] / ms / 1e9
        print(
            f"  {name:16s} sustained {ms:9.3f} ms {rate:5.0f} TFLOP/s "
            f"e {result.efficiency.get(name, math.nan):.3f} | burst {result.burst[name]:9.3f} ms "
            f"e {result.burst_efficiency.get(name, math.nan):.3f}"
        )
    for note in result.notes:
        print(f"  {note}")
    if result.wrong:
        print(f"  WRONG: {', '.join(result.wrong)}")
    sys.stdout.flush()


def save(results: Sequence[Result], device: str, out: Path | None, *, check: bool) -> None:
    """Write what there is so far, and a picture of it."""
    if out is None:
        return
    write_record(out / "attention.json", device, results, check=check)
    picture(results, device, out / "attention.png")


def picture(results: Sequence[Result], device: str, path: Path) -> None:
    """Bars of sustained efficiency by case, dense kernels left out."""
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("  no picture: matplotlib is not installed")
        return
    names = [
        name for name in ALL | OF_ZONES if any(name in result.efficiency for result in results)
    ]
    width = 0.8 / max(1, len(names))
    figure, axes = pyplot.subplots(figsize=(2 + 1.8 * len(results), 4.5), layout="constrained")
    for i, name in enumerate(names):
        heights = [result.efficiency.get(name, 0.0) for result in results]
        positions = [j + (i - len(names) / 2 + 0.5) * width for j in range(len(results))]
        axes.bar(positions, heights, width, label=name)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(results)), [r.case.replace(" ", "\n") for r in results])
    axes.set_ylabel("density x t(dense) / t, sustained")
    axes.set_title(device)
    axes.legend(fontsize="small", ncols=3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def compile_only() -> None:
    """Compile the Hopper kernel without a GPU."""
    from calibatt_compiler.kernels.hopper.launch import hopper_config
    from calibatt_compiler.kernels.hopper.offline import compile_hopper

    pattern = BlockPattern.dense(1, 300, 300)
    config = hopper_config(pattern, dtype=torch.bfloat16, head_dim=128)
    kernel = compile_hopper(config)
    print(f"{config.variant_name(repair=False)}: {len(kernel.asm['cubin'])} bytes")


def cases(options: argparse.Namespace) -> list[Case]:
    """The cases asked for."""
    if options.check and options.masks == [ZONES]:
        triples: tuple[tuple[str, str, float], ...] = (("tiny", ZONES, 0.4),)
    elif options.check or options.quick:
        triples = CHECK if options.check else QUICK
    else:
        triples = tuple(
            (size, mask, 1.0 if mask == "dense" else density)
            for size in options.sizes
            for mask in options.masks
            for density in ((1.0,) if mask == "dense" else options.densities or densities(mask))
            if mask == "dense" or density < 1
        )
    heads = {} if options.heads is None else {"heads": options.heads}
    return [Case(replace(SIZES[size], **heads), mask, part) for size, mask, part in triples]


def densities(mask: str) -> Sequence[float]:
    """Those of a kind of mask, if none are asked for."""
    return ZONE_DENSITIES if mask == ZONES else DENSITIES


def kernels(options: argparse.Namespace, mask: str) -> Sequence[str]:
    """Those of a kind of mask, if none are asked for."""
    if mask == ZONES:
        return CHECK_ZONES if options.check else ZONE_KERNELS
    return CHECK_KERNELS if options.check else QUICK_KERNELS if options.quick else KERNELS


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few cases, few kernels")
    parser.add_argument("--check", action="store_true", help="tiny cases on the CPU")
    parser.add_argument("--sizes", nargs="+", choices=[*SIZES], default=["480p", "720p"])
    parser.add_argument("--masks", nargs="+", choices=[*MASKS, ZONES], default=[*MASKS])
    parser.add_argument("--densities", nargs="+", type=float)
    parser.add_argument("--kernels", nargs="+", choices=[*ALL, *OF_ZONES], metavar="KERNEL")
    parser.add_argument("--heads", type=int, help="instead of 40")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--limit", type=float, default=math.inf, help="start no case after so many "
                        "seconds")  # fmt: skip
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> int:
    """Measure; exit status 1 if a kernel of ours is wrong."""
    options = parse()
    start = time.monotonic()
    device = torch.device("cpu") if options.check else torch.device("cuda", 0)
    dtype = torch.float32 if options.check else torch.bfloat16
    name = "CPU" if options.check else torch.cuda.get_device_name(device)
    print(f"{name}, torch {torch.__version__}, {dtype}", flush=True)
    results = []
    for case in cases(options):
        if time.monotonic() - start > options.limit:
            print(f"\n{case.name}: not started, the time is up")
            continue
        rounds = 1 if options.check else options.rounds
        names = options.kernels or kernels(options, case.mask)
        result = measure(case, names, device, dtype, rounds)
        report(result, case.size.head_dim)
        results.append(result)
        save(results, name, options.out, check=options.check)
    if options.check:
        compile_only()
    wrong = [f"{result.case}: {kernel}" for result in results for kernel in result.wrong]
    print("\nWRONG: " + "; ".join(wrong) if wrong else "\nall right")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
