"""What block energies add to the time of dense attention, side by side in one process.

    python benchmarks/energy.py --out results                 at most two minutes on an H100
    python benchmarks/energy.py --sweep --sizes 480p --heads 12
    python benchmarks/energy.py --check                       no GPU: tiny, times mean nothing

"added" is t / t(dense) - 1 for what gives output and energies, t / t(dense) for energies alone, by
each dense kernel; the aim is 0.45. Energies are compared with float64. Results are printed and
written to OUT/energy.json after each case. The exit status is 1 if a result is wrong.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from attention_cases import SIZES, Size, make_operands
from attention_kernels import Contestant, Operands
from attention_timing import beat, calls_a_block, relative_error, sustained
from energy_kernels import ALL, DENSE, SWEEP, Measured
from record import write_record
from torch import Tensor

AIM = 0.45
CHECK_KERNELS = ("math", "cpu", "energies alone", "energies alone 1/4")
KERNELS = tuple(name for name in ALL if name not in ("math", "cpu"))
SLOW = ("two passes",)
"""Known to be far off: measured at the small sizes only."""

ENERGY_ERROR = 1e-4
"""Allowed error of energies, as a share of the largest energy of the query block."""


@dataclass
class Result:
    """What was found for one size; times in milliseconds, by kernel; partial: energies alone."""

    size: str
    tokens: int
    heads: int
    ms: dict[str, float] = field(default_factory=dict)
    added: dict[str, dict[str, float]] = field(default_factory=dict)
    output_errors: dict[str, float] = field(default_factory=dict)
    energy_errors: dict[str, float] = field(default_factory=dict)
    partial: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    allowed_output_error: float = 1.1

    @property
    def wrong(self) -> list[str]:
        """Kernels whose error is too large, NaN included."""
        wrong = [n for n, e in self.output_errors.items() if not e <= self.allowed_output_error]
        return wrong + [n for n, e in self.energy_errors.items() if not e <= ENERGY_ERROR]


def energy_error(energy: Tensor, operands: Operands, block: tuple[int, int], every: int) -> float:
    """Largest error of some query blocks against float64, over the block's largest energy."""
    q, k, _ = operands
    heads, rows = q.shape[1], energy.shape[2]
    largest = 0.0
    for i, r in enumerate((0, rows // 2, rows - 1)):
        head = (5 * i) % heads
        queries = q[0, head, r * block[0] : (r + 1) * block[0] : every].double()
        p = torch.softmax(queries @ k[0, head].double().mT / math.sqrt(q.shape[-1]), -1).mean(0)
        exact = torch.stack([part.sum() for part in p.split(block[1])])
        error = (energy[0, head, r].double() - exact).abs().max() / exact.max()
        largest = max(largest, error.item()) if error.isfinite() else math.inf
    return largest


def contestants(
    makers: Mapping[str, Callable[[Operands, Size], Measured]], operands: Operands, size: Size,
    result: Result,
) -> dict[str, Measured]:  # fmt: skip
    """Make each kernel, call it once and look at its errors."""
    found = {}
    for name, make in makers.items():
        beat()
        try:
            measured = make(operands, size)
            out, energy = measured.run()
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            result.notes.append(f"{name} left out: {reason[:300]}")
            continue
        if out is not None and name not in DENSE:
            dense = Contestant(lambda: operands[0], 1.0, None)
            result.output_errors[name] = relative_error(dense, out, operands)
        if energy is not None:
            error = energy_error(energy, operands, size.block, measured.every)
            result.energy_errors[name] = error
        found[name] = measured
    return found


def measure(
    size: Size, names: Sequence[str], device: torch.device, rounds: int, *, sweep: bool
) -> Result:
    """Check and time all kernels at one size."""
    on_gpu = device.type == "cuda"
    operands = make_operands(size, device, torch.bfloat16 if on_gpu else torch.float32)
    result = Result(size.name, size.tokens, size.heads)
    # In float32 SDPA on a CPU is no yardstick: it sums in another order.
    result.allowed_output_error = 1.1 if on_gpu else 10.0
    print(f"\n{size.name}: S={size.tokens} H={size.heads} D={size.head_dim}", flush=True)
    makers = {name: ALL[name] for name in names} | (SWEEP if sweep else {})
    found = contestants(makers, operands, size, result)
    runs = {name: measured.timed for name, measured in found.items()}
    number = calls_a_block(runs, on_gpu=on_gpu, block_ms=40.0)
    result.ms = sustained(runs, number, on_gpu=on_gpu, rounds=rounds)
    result.partial = [name for name, measured in found.items() if measured.partial]
    for base in (name for name in DENSE if name in runs):
        others = [name for name in runs if name not in DENSE]
        result.added[base] = {
            name: result.ms[name] / result.ms[base] - (name not in result.partial)
            for name in others
        }
    return result


def report(result: Result) -> None:
    """Print one size's times."""
    for name, ms in result.ms.items():
        shares = ", ".join(
            f"{added[name]:+.2f} of {base}" for base, added in result.added.items() if name in added
        )
        errors = "".join(
            f", {kind} {found[name]:.1e}"
            for kind, found in (
                ("error of energies", result.energy_errors),
                ("of output, over SDPA's", result.output_errors),
            )
            if name in found
        )
        print(f"  {name:28s} {ms:9.3f} ms  {shares}{errors}")
    for note in result.notes:
        print(f"  {note}")
    for base, added in result.added.items():
        whole = {name: share for name, share in added.items() if name not in result.partial}
        if whole and base != "math":
            best = min(whole, key=whole.__getitem__)
            verdict = "met" if whole[best] <= AIM else "missed"
            print(f"  least added to {base}: {best}, {whole[best]:+.2f}; aim {AIM} {verdict}")
    if result.wrong:
        print(f"  WRONG: {', '.join(result.wrong)}")
    sys.stdout.flush()


def save(results: Sequence[Result], device: str, out: Path | None, *, check: bool) -> None:
    """Write what there is so far."""
    if out is None:
        return
    write_record(out / "energy.json", device, results, check=check)


def compile_only() -> None:
    """Compile the kernels for a Hopper GPU without one."""
    from calibatt_compiler.kernels.portable.energy_offline import compile_energy

    for kernel in ("one pass", "fused"):
        made = compile_energy(kernel, arch=90, dtype=torch.bfloat16, head_dim=128)  # type: ignore[arg-type]
        print(f"{kernel}, sm_90: {len(made.asm['cubin'])} bytes, {made.metadata.shared} shared")


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="a tiny size on the CPU")
    parser.add_argument("--sweep", action="store_true", help="also other tiles of our kernels")
    parser.add_argument("--sizes", nargs="+", choices=[*SIZES], default=["480p", "720p"])
    parser.add_argument("--heads", nargs="+", type=int, default=[12, 40])
    parser.add_argument("--kernels", nargs="+", choices=[*ALL], metavar="KERNEL")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=100.0, help="start no size after so many "
                        "seconds")  # fmt: skip
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> int:
    """Measure; exit status 1 if a result is wrong."""
    options = parse()
    start = time.monotonic()
    device = torch.device("cpu") if options.check else torch.device("cuda", 0)
    name = "CPU" if options.check else torch.cuda.get_device_name(device)
    print(f"{name}, torch {torch.__version__}", flush=True)
    sizes = [SIZES["tiny"]] if options.check else [
        replace(SIZES[size], heads=heads) for heads in options.heads for size in options.sizes
    ]  # fmt: skip
    results: list[Result] = []
    for size in sizes:
        if time.monotonic() - start > options.limit:
            print(f"\n{size.name}, {size.heads} heads: not started, the time is up")
            continue
        names = options.kernels or (CHECK_KERNELS if options.check else KERNELS)
        if size is not sizes[0] and not options.kernels:
            names = [kernel for kernel in names if kernel not in SLOW]
        rounds = 1 if options.check else options.rounds
        results.append(measure(size, names, device, rounds, sweep=options.sweep))
        report(results[-1])
        save(results, name, options.out, check=options.check)
    if options.check:
        compile_only()
    wrong = [f"{result.size}: {kernel}" for result in results for kernel in result.wrong]
    print("\nWRONG: " + "; ".join(wrong) if wrong else "\nall right")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
