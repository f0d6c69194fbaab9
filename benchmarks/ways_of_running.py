"""Ways of running a model that does not fit, or compiles slowly: what a plan gains in each.

    python benchmarks/ways_of_running.py --out results            2 layers of Wan 14B at 480p
    python benchmarks/ways_of_running.py --size 720p --ways plain blocks
    python benchmarks/ways_of_running.py --tiny                   no GPU, no Inductor: seconds

Ways: `plain`, torch.compile of the whole model; `model offload`, a pipeline's
`enable_model_cpu_offload`; `group offload` of blocks and of leaves, with streams; `blocks`,
`compile_repeated_blocks`; and the last two together. In each way the model runs by stock
torch.compile and by a plan of octave zones (density .25), timed in turns: milliseconds a forward
pass, median of rounds, and the seconds of the first call, with empty caches. A way has a process
of its own, so that neither finds what another has compiled.

Errors are relative to the eager model in float32: stock's to dense attention, the plan's to its
blocks and weights expanded to tokens. `distance` is what the plan changes in that: much more than
an error, or the comparison shows nothing. Weights are random, with peaked attention. The record is
OUT/ways_of_running.json; exit status 1 if a planned site ran dense or a result is wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch
from dit_layer import SCALES
from record import write_record
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._inductor.utils import clear_caches
from ways_cases import CALLED, WAYS, inputs, make_plan, peaked_model, references

import calibatt_compiler
from calibatt_compiler.plan import Plan

WORST = 2.0
"""Times stock's own error that the plan's may be, and parts of the distance that it must be of."""


@dataclass
class Row:
    """One way; by `stock` and by `plan`.

    Attributes:
        way: of running.
        size: of the video.
        tokens: of the video.
        layers: of the model.
        density: of the plan.
        ms: milliseconds a forward pass, median of rounds.
        compile_s: seconds of the first call.
        error: to the float32 model, dense or by the plan's blocks, the largest of the steps.
        distance: between these two, the least of the steps.
        sparse: share of the planned sites that ran sparse in all calls.
        kernels: that served them.
        why: what is said of calls of planned sites that ran dense.
    """

    way: str
    size: str
    tokens: int
    layers: int
    density: float
    ms: dict[str, float]
    compile_s: dict[str, float]
    error: dict[str, float]
    distance: float
    sparse: float
    kernels: list[str]
    why: dict[str, int]

    @property
    def right(self) -> bool:
        """Whether all planned sites were served, with the plan's result."""
        most = min(WORST * self.error["stock"] + 1e-5, self.distance / WORST)
        return self.sparse == 1 and self.error["plan"] <= most


def relative(got: Tensor, expected: Tensor) -> float:
    """RMS of the difference over that of what is expected."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def finish(on_gpu: bool) -> None:
    """Wait for the device."""
    if on_gpu:
        torch.cuda.synchronize()


def seconds(run: Callable[[], Any], on_gpu: bool) -> float:
    """Time of a call, with all that the host does."""
    finish(on_gpu)
    start = time.perf_counter()
    run()
    finish(on_gpu)
    return time.perf_counter() - start


def without_inductor() -> AbstractContextManager[Any]:
    """Run calibatt's graphs as they are rewritten."""
    return mock.patch("calibatt_compiler.backend._inductor", lambda gm, given, settings: gm.forward)


def measure(way: str, plan: Plan, found: Mapping[str, Tensor], options: argparse.Namespace) -> Row:
    """Compile and time one way, by stock and by the plan."""
    on_gpu = not options.tiny
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    scale = SCALES[options.size]
    stock = {} if on_gpu else {"backend": "eager"}
    hows: dict[str, dict[str, Any]] = {
        "stock": stock,
        "plan": {"backend": "calibatt", "options": {"plan": plan, "on_mismatch": "error"}},
    }
    given = {timestep: inputs(scale, timestep, device, dtype) for timestep in CALLED}
    if on_gpu:  # what every process pays once is of neither
        torch.compile(lambda x: (x @ x).softmax(-1).sum())(torch.ones(64, 64, device=device))
    # Each leaf under a hook is a size of one code object: of eight, stock would run the rest
    # eagerly, and Dynamo would keep off that code for the plan too.
    torch._dynamo.config.recompile_limit = 256
    models: dict[str, Any] = {}
    ends: dict[str, Callable[[], None]] = {}
    compile_s: dict[str, float] = {}
    error = dict.fromkeys(hows, 0.0)

    def compare(name: str) -> None:
        for timestep in CALLED:
            out = models[name](**given[timestep])[0].cpu()
            error[name] = max(error[name], relative(out, found[f"{name} {timestep:.0f}"]))

    with nullcontext() if on_gpu else without_inductor():
        for name, how in hows.items():
            if on_gpu:
                empty_caches(name)
            model = peaked_model(scale, options.layers, device, dtype).to("cpu")
            ends[name] = WAYS[way](model, on_gpu, dynamic=False, **how)
            models[name] = model
            compile_s[name] = seconds(lambda model=model: model(**given[CALLED[0]]), on_gpu)
            compare(name)
        for name, end in ends.items():
            end()
            compare(name)  # in the next video
        wait_for_baked(models["plan"], lambda: models["plan"](**given[CALLED[0]]), on_gpu)
        times: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(options.rounds + 1):
            for name, model in models.items():
                taken = [
                    seconds(lambda model=model, at=at: model(**given[at]), on_gpu) for at in CALLED
                ]
                if turn:  # the first call of a turn finds the other's weights in the caches
                    times[name].append(1e3 * taken[-1])
        compare("plan")
    rows = [row for row in calibatt_compiler.summary(models["plan"]).rows if row.name in plan.sites]
    dense: Counter[str] = sum((Counter(row.dense_calls) for row in rows), Counter())
    sparse = {row.name for row in rows if row.sparse_calls}
    sparse -= {row.name for row in rows if sum(row.dense_calls.values())}
    return Row(
        way=way,
        size=options.size,
        tokens=math.prod(scale.grid),
        layers=options.layers,
        density=plan.density(),
        ms={name: statistics.median(values) for name, values in times.items()},
        compile_s=compile_s,
        error=error,
        distance=min(relative(found[f"plan {at:.0f}"], found[f"stock {at:.0f}"]) for at in CALLED),
        sparse=len(sparse) / len(plan.sites),
        kernels=sorted({row.kernel for row in rows}),
        why=dict(dense),
    )


def empty_caches(name: str) -> None:
    """Let nothing be found that was compiled before; folders stay until the process has ended."""
    folder = Path(os.environ["CALIBATT_CACHE_DIR"]).parent / name
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    clear_caches()


def wait_for_baked(model: Any, run: Callable[[], Any], on_gpu: bool) -> None:
    """Call until generated kernels serve, or a minute has passed."""
    end = time.monotonic() + (60 if on_gpu else 0)
    while time.monotonic() < end:
        run()
        rows = [row for row in calibatt_compiler.summary(model).rows if row.sparse_calls]
        if all("baked" in row.kernel or row.reasons for row in rows):
            break
        time.sleep(0.5)


def report(row: Row) -> None:
    """Print one row."""
    print(f"\n{row.way}, {row.size}, {row.layers} layers" + ("" if row.right else ": WRONG"))
    for name, ms in row.ms.items():
        print(
            f"  {name:6s} {ms:9.2f} ms a forward pass, first call {row.compile_s[name]:6.1f} s, "
            f"error {row.error[name]:.2e}"
        )
    print(
        f"  x{row.ms['stock'] / row.ms['plan']:.2f}; {row.sparse:.0%} of the sites sparse, by "
        f"{', '.join(row.kernels)}; distance {row.distance:.2e}"
        + "".join(f"\n  {count} x {why}" for why, count in row.why.items()),
        flush=True,
    )


def in_process(way: str, folder: Path, options: argparse.Namespace) -> Row:
    """Measure a way in a process of its own, with empty caches.

    Raises:
        RuntimeError: it failed; what it says has been printed.
    """
    command = [sys.executable, __file__, "--child", str(folder), "--ways", way]
    for name in ("size", "layers", "density", "rounds"):
        command += [f"--{name}", str(getattr(options, name))]
    with tempfile.TemporaryDirectory(prefix="calibatt-ways-") as cache:
        environment = {**os.environ, "CALIBATT_CACHE_DIR": f"{cache}/calibatt"}
        done = subprocess.run(command, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{way}: ended with status {done.returncode}")
    return Row(**json.loads((folder / "row.json").read_text(encoding="utf-8")))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(SCALES), default="480p")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="on a CPU, without Inductor")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny:
        options.size, options.rounds = "tiny", 1
    return options


def main() -> int:
    """Measure, print, write."""
    options = parse()
    diffusers.utils.logging.set_verbosity_error()  # all of the model is cast, as is said
    device = torch.device("cpu" if options.tiny else "cuda")
    plan = make_plan(options.size, options.layers, options.density, 32 if options.tiny else 128)
    if options.child is not None:
        found = load_file(options.child / "references.safetensors")
        row = measure(options.ways[0], plan, found, options)
        (options.child / "row.json").write_text(json.dumps(asdict(row)), encoding="utf-8")
        return 0
    rows: list[Row] = []
    failed = []
    with tempfile.TemporaryDirectory(prefix="calibatt-ways-") as name:
        folder = Path(name)
        found = references(plan, options.size, options.layers, device)
        save_file(found, folder / "references.safetensors")
        if not options.tiny:
            torch.cuda.empty_cache()
        for way in options.ways:
            try:
                measured = (
                    measure(way, plan, found, options)
                    if options.tiny
                    else in_process(way, folder, options)
                )
            except Exception as error:
                failed.append(way)
                print(f"\n{way}: FAILED: {type(error).__name__}: {error}", flush=True)
                continue
            rows.append(measured)
            report(measured)
            if options.out is not None:
                path = options.out / "ways_of_running.json"
                write_record(path, device, rows, failed=failed, check=options.tiny)
    return int(bool(failed) or not all(row.right for row in rows))


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())
