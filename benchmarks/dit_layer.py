"""Milliseconds a layer of Wan 2.1 14B, compiled: stock attention, FlashAttention-3, ours, none.

    python benchmarks/dit_layer.py --out results                  480p and 720p, 2 layers
    python benchmarks/dit_layer.py --sizes 720p --layers 4 --density 0.375
    python benchmarks/dit_layer.py --token-order 2x8xall --layers 8    what it adds
    python benchmarks/dit_layer.py --profile --variants fa3 "hopper table" none    where it goes
    python benchmarks/dit_layer.py --check                        no GPU: tiny, times mean nothing

The model has true widths and random weights; all layers share one mask of `attention_cases.py`,
or for the variants with `zones` zones of the same density.
Every variant is the same module under `torch.compile`; what differs is what serves self-attention:
`stock` is Inductor with SDPA as torch picks it, `cudnn` with cuDNN's, `none` returns zeros, which
tells what a layer costs without attention. Times are medians of rounds that interleave all
variants in one process. With `--token-order` our kernels are timed twice more, by a plan of the
same masks in that order: tokens permuted `once` a forward pass, through all layers, and
`around` each site. Results are printed and written to OUT/dit_layer.json; what `--profile` finds to
OUT/layer_profile.json.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from attention_cases import SIZES, Case, make_pattern
from attention_timing import beat, calls
from diffusers import WanTransformer3DModel
from layer_profile import CallProfile, profile_call
from record import write_record
from swapped_attention import swapping
from torch.nn.attention import SDPBackend, sdpa_kernel
from zone_cases import make_zones

import calibatt_compiler
from calibatt_compiler.passes import pipeline
from calibatt_compiler.passes.token_order.permute import permute_tokens
from calibatt_compiler.plan import Plan, Sampler, SitePatterns
from calibatt_compiler.plan.order import RASTER, TokenOrder

TIMESTEP = 500.0
ONCE = "permuted once a forward pass"
VARIANTS = ("stock", "cudnn", "fa3", "table", "baked", "hopper table", "hopper exact",
            "hopper baked", "zones table", "zones baked", "none")  # fmt: skip
CHECK_VARIANTS = ("stock", "table", "zones table", "none")
OURS: dict[str, dict[str, Any]] = {
    "table": {"lowering": "table", "hopper": False},
    "baked": {"lowering": "baked", "hopper": False},
    "hopper table": {"lowering": "table"},
    "hopper exact": {"lowering": "table", "softmax": "exact"},
    "hopper baked": {"lowering": "baked"},
    "zones table": {"lowering": "table"},
    "zones baked": {"lowering": "baked"},
}


@dataclass(frozen=True)
class Scale:
    """A size of video and the width of the model.

    Attributes:
        latent: (frames, height, width) before patching by (1, 2, 2).
        heads: of 128 channels, or of 32 in the check.
        head_dim: channels a head.
        text: text tokens.
    """

    latent: tuple[int, int, int]
    heads: int = 40
    head_dim: int = 128
    text: int = 512

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens after patching."""
        frames, height, width = self.latent
        return frames, height // 2, width // 2


SCALES = {
    "480p": Scale((21, 60, 104)),
    "720p": Scale((21, 90, 160)),
    "tiny": Scale((3, 12, 20), heads=2, head_dim=32, text=16),
}


@dataclass
class Row:
    """One size and density; milliseconds a layer by variant."""

    size: str
    tokens: int
    density: float
    layers: int
    ms: dict[str, float]
    left_out: dict[str, str]
    profiles: dict[str, CallProfile] = field(default_factory=dict)

    def speed_up(self, over: str) -> dict[str, float]:
        """How much faster each variant is than another one, whole layers."""
        base = self.ms.get(over, math.nan)
        return {name: base / ms for name, ms in self.ms.items()}


def make_model(scale: Scale, layers: int, device: torch.device, dtype: torch.dtype) -> Any:
    """Wan 2.1 14B's widths with random weights."""
    torch.manual_seed(0)
    width = scale.heads * scale.head_dim
    with torch.device(device):
        model = WanTransformer3DModel(
            num_attention_heads=scale.heads,
            attention_head_dim=scale.head_dim,
            ffn_dim=13824 if width == 5120 else 4 * width,
            num_layers=layers,
        )
    return model.to(dtype).eval().requires_grad_(False)


@dataclass(frozen=True)
class Variant:
    """What serves self-attention.

    Attributes:
        kind: one of `VARIANTS`.
        order: tokens of the plan's blocks.
        around: let each site permute tokens, whatever the passes could do.
    """

    kind: str
    order: TokenOrder = RASTER
    around: bool = False

    @property
    def form(self) -> str:
        """Form of its plan."""
        return "zones" if self.kind.startswith("zones") else "masks"

    @property
    def name(self) -> str:
        """Shown in results."""
        if self.order == RASTER:
            return self.kind
        return f"{self.kind} {self.order} {'around' if self.around else 'once'}"

    def compiling(self) -> AbstractContextManager[Any]:
        """The passes that its first call is compiled by."""
        others = tuple(each for each in pipeline.PASSES if each is not permute_tokens)
        return mock.patch.object(pipeline, "PASSES", others) if self.around else nullcontext()

    def running(self) -> AbstractContextManager[Any]:
        """The backend of stock attention."""
        return sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if self.kind == "cudnn" else nullcontext()


def variants(kinds: Sequence[str], order: TokenOrder) -> list[Variant]:
    """List all variants to be timed; our kernels in the other order, too, if one is given."""
    found = [Variant(kind) for kind in kinds]
    if order != RASTER:
        ours = [kind for kind in kinds if kind in OURS and not kind.startswith("zones")]
        found += [Variant(kind, order, around) for kind in ours for around in (False, True)]
    return found


def compiled(model: Any, variant: Variant, plan: Plan, tokens: int) -> Any:
    """Compile one variant, apart from the others."""
    name = variant.kind
    # Counted for all of them together.
    torch._dynamo.config.recompile_limit = 64
    settings: dict[str, Any] = {"fullgraph": True, "dynamic": False}
    if name in OURS:
        settings["options"] = {"plan": plan, "on_mismatch": "error", **OURS[name]}
        if variant.around:
            # The default: equal options would share the graph of the other variant.
            settings["options"]["inductor"] = {"max_autotune": False}
        return torch.compile(model, backend="calibatt", **settings)
    operators = {
        "fa3": torch.ops.calibatt_benchmark.fa3.default,
        "none": torch.ops.calibatt_benchmark.none.default,
    }
    if name in operators:
        return torch.compile(model, backend=swapping(operators[name], tokens), **settings)
    return torch.compile(model, **settings)


def measure(size: str, density: float, options: argparse.Namespace) -> Row:
    """Compile and time all variants at one size and density."""
    scale = SCALES[size]
    on_gpu = torch.cuda.is_available() and not options.check
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    tokens = math.prod(scale.grid)
    model = make_model(scale, options.layers, device, dtype)
    shape = replace(
        SIZES["720p" if size == "720p" else "480p"],
        name=size,
        tokens=tokens,
        frame=tokens // scale.grid[0],
        heads=scale.heads,
        head_dim=scale.head_dim,
        block=(128, 128) if on_gpu else (32, 32),
    )
    case = Case(shape, options.mask, density)
    pattern = make_pattern(case)
    chosen = variants(options.variants, options.token_order)
    sites = {"masks": SitePatterns((pattern,), (0,), scale.head_dim)}
    if any(variant.form == "zones" for variant in chosen):
        sites["zones"] = SitePatterns.of_zones([make_zones(case)], (0,), scale.head_dim)
    plans = {
        (form, order): Plan.create(
            {f"blocks.{layer}.attn1": sites[form] for layer in range(options.layers)},
            grid=scale.grid,
            sampler=Sampler(timesteps=(TIMESTEP,)),
            token_order=order,
        )
        for form, order in {(variant.form, variant.order) for variant in chosen}
    }
    arguments = {
        "hidden_states": torch.randn(1, 16, *scale.latent, device=device, dtype=dtype),
        "timestep": torch.tensor([int(TIMESTEP)], device=device),
        "encoder_hidden_states": torch.randn(1, scale.text, 4096, device=device, dtype=dtype),
        "return_dict": False,
    }
    runs: dict[str, Callable[[], Any]] = {}
    left_out: dict[str, str] = {}
    for variant in chosen:
        served = compiled(model, variant, plans[variant.form, variant.order], tokens)

        def run(served: Any = served) -> Any:
            return served(**arguments)

        try:
            with variant.compiling(), variant.running():
                run()
            wait_for_kernels(served, run, variant.kind)
            check_order(served, variant)
            beat()
        except Exception as error:
            left_out[variant.name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        runs[variant.name] = run
    chosen = [variant for variant in chosen if variant.name in runs]
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(options.rounds + 1):
        for variant in chosen:
            name = variant.name
            with variant.running():
                took = calls(runs[name], 2 if on_gpu else 1, on_gpu)[-1]
            if turn:
                times[name].append(took / options.layers)
    ms = {name: statistics.median(values) for name, values in times.items()}
    profiles = {}
    if options.profile:
        for variant in chosen:
            with variant.running():
                found = profile_call(runs[variant.name], on_gpu=on_gpu)
            print(f"  {variant.name}, profiled:\n{found.text(options.layers)}", flush=True)
            profiles[variant.name] = found
            beat()
    return Row(size, tokens, pattern.density, options.layers, ms, left_out, profiles)


def wait_for_kernels(
    variant: Any, run: Callable[[], Any], name: str, seconds: float = 120.0
) -> None:
    """Call until generated kernels serve, so that not their stand-in is timed."""
    if "baked" not in name:
        return
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        run()  # the summary says what served the last call
        beat()
        rows = [row for row in calibatt_compiler.summary(variant).rows if row.status == "sparse"]
        if all("baked" in row.kernel or row.reasons for row in rows):
            break
        time.sleep(0.5)
    served = Counter(row.kernel for row in rows)
    if not all("baked" in kernel for kernel in served):
        reasons = {why for row in rows for why in row.reasons} or {"not compiled in time"}
        raise RuntimeError(f"served by {dict(served)}: {'; '.join(sorted(reasons))}")


def check_order(served: Any, variant: Variant) -> None:
    """Raise where tokens are not permuted as the variant's name says."""
    if variant.order == RASTER:
        return
    orders = calibatt_compiler.summary(served).orders
    if orders != (() if variant.around else (f"token order {variant.order}: {ONCE}",)):
        raise RuntimeError(f"not permuted once a forward pass: {'; '.join(orders)}")


def report(row: Row) -> None:
    """Print one row."""
    print(f"\n{row.size}: {row.tokens} tokens, density {row.density:.3f}, {row.layers} layers")
    over_fa3, over_stock = row.speed_up("fa3"), row.speed_up("stock")
    width = max(map(len, (*row.ms, *row.left_out)))
    for name, ms in row.ms.items():
        print(
            f"  {name:{width}s} {ms:8.2f} ms a layer   x{over_fa3[name]:.2f} over fa3   "
            f"x{over_stock[name]:.2f} over stock{added(row, name)}",
            flush=True,
        )
    for name, why in row.left_out.items():
        print(f"  {name:{width}s} left out: {why}", flush=True)


def added(row: Row, name: str) -> str:
    """Say what a token order adds to the same kernels in raster order."""
    kind, _, way = name.rpartition(" ")
    raster = row.ms.get(kind.rpartition(" ")[0], math.nan)
    if way not in ("once", "around") or math.isnan(raster):
        return ""
    return f"   {row.ms[name] / raster - 1:+.1%} on raster order"


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=list(SCALES), default=["480p", "720p"])
    parser.add_argument("--density", type=float, nargs="+", default=[0.319, 0.375])
    parser.add_argument("--mask", default="ragged")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--token-order", type=TokenOrder.parse, default=RASTER, metavar="ORDER")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="then list the kernels of a call")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--check", action="store_true", help="tiny, on a CPU: shows that it runs")
    options = parser.parse_args()
    if options.check:
        options.sizes, options.density, options.layers, options.rounds = ["tiny"], [0.4], 1, 1
        options.variants = list(CHECK_VARIANTS)
    elif len(options.density) not in (1, len(options.sizes)):
        parser.error("give one density, or one for each size")
    return options


def main() -> int:
    """Measure, print, write."""
    options = parse()
    densities = (
        options.density * len(options.sizes) if len(options.density) == 1 else options.density
    )
    rows = []
    for size, density in zip(options.sizes, densities, strict=True):
        rows.append(measure(size, density, options))
        report(rows[-1])
        if options.out is not None:
            save(rows, options)
    return 0


def save(rows: Sequence[Row], options: argparse.Namespace) -> None:
    """Write what there is so far, profiles into a record of their own."""
    device = torch.device("cuda" if torch.cuda.is_available() and not options.check else "cpu")
    settings: dict[str, Any] = {"mask": options.mask, "token_order": str(options.token_order)}
    settings |= {"check": options.check}
    times = [{key: value for key, value in vars(row).items() if key != "profiles"} for row in rows]
    write_record(options.out / "dit_layer.json", device, times, **settings)
    profiles = [
        {"size": row.size, "density": row.density, "layers": row.layers, "attention": name}
        | {"kinds": found.kinds()}
        | asdict(found)
        for row in rows
        for name, found in row.profiles.items()
    ]
    if profiles:
        write_record(options.out / "layer_profile.json", device, profiles, **settings)


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
