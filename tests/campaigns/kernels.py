"""Draws patterns, zones and operands, and holds every kernel that serves them against float64.

Without a GPU: the reference and the CPU kernels. With one: the Triton kernels too, and on a Hopper
GPU those for it, by tables or, for a share of the cases, by generated source. Operands lie between
NaN and infinity, as do the keys of blocks that no query keeps; outputs lie between fences. A
kernel's error may be twice that of SDPA, or of rounding as FlashAttention rounds (the largest error
of a value four times); two calls give the same bits.

python tests/campaigns/kernels.py --minutes 5 --seed 7 --workers 2
python tests/campaigns/kernels.py --case 7-0-35
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import numpy as np
import torch
from campaign import parser_of, run
from fenced import Fences, draw_layout
from torch import Tensor

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.common.pooling import part_bias, pool
from calibatt_compiler.kernels.cpu.attention import NativeCpuAttention
from calibatt_compiler.kernels.cpu.zones import CpuZones
from calibatt_compiler.kernels.reference.attention import (
    ReferenceAttention,
    masked_dense_attention,
)
from calibatt_compiler.kernels.reference.zones import ReferenceZones
from calibatt_compiler.kernels.request import KernelRequest
from calibatt_compiler.plan import AnchorRows, BlockPattern
from calibatt_compiler.plan.zones import ZonePattern

Operands = tuple[Tensor, Tensor, Tensor]
FORMS = ("masks", "masks", "weights", "pooled", "copies", "zones", "zones")
CPU_DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
GPU_DTYPES = (torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)
CPU_BLOCKS = ((16, 16), (32, 32), (64, 64), (48, 80), (128, 64), (128, 128), (16, 48))
GPU_BLOCKS = ((128, 128), (128, 128), (128, 64), (64, 64), (32, 32))
FACTORS = {"rms": 2.0, "largest": 4.0}
"""Times the yardstick's error that a kernel's may be: the largest of a few values varies more."""


@dataclass
class Problem:
    """A case.

    Attributes:
        form: of the pattern.
        pattern: what is attended; of zones what `step` draws.
        zones: None for other forms.
        step: of zones.
        operands: between fences.
        clean: the same values, contiguous, without NaN in blocks that no query keeps.
        scale: of the scores; None: the default.
        about: what it is, in words.
    """

    form: str
    pattern: BlockPattern
    zones: ZonePattern | None
    step: int
    operands: Operands
    clean: Operands
    scale: float | None
    about: str


def draw_pattern(
    draw: random.Random, form: str, *, on_gpu: bool
) -> tuple[BlockPattern, ZonePattern | None, int]:
    """Draw a pattern of a form; zones with a step and what it draws."""
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    block = draw.choice(GPU_BLOCKS if on_gpu else CPU_BLOCKS)
    heads = draw.randint(1, 4)
    longest = 2500 if on_gpu else 400
    keys = draw.choice(
        (draw.randint(1, longest), block[1] * draw.randint(1, 5), draw.randint(1, 99))
    )
    queries = draw.choice((keys, draw.randint(1, longest)))
    if form == "copies":
        grid = draw.randint(1, 6), draw.randint(1, 12), draw.randint(1, 12)
        text = draw.choice((0, draw.randint(1, 40)))
        first = draw.choice((0, text))
        queries = keys = math.prod(grid) + text
    rows, columns = -(-queries // block[0]), -(-keys // block[1])
    if form == "zones":
        runs = draw.choice((1, 2, 5))
        octaves = torch.randint(
            0, draw.choice((1, 3, 8)), (heads, rows, columns), generator=generator
        )
        octaves = octaves[..., torch.arange(columns) // runs * runs % columns]
        lead = torch.randint(0, columns, (heads, rows, 1), generator=generator)
        octaves.scatter_(2, lead, 0)
        if draw.random() < 0.5:  # groups of rows alike
            octaves = octaves[:, torch.arange(rows) // 3 * 3]
        zones = ZonePattern.from_octaves(
            octaves, query_length=queries, key_length=keys, block=block, seed=draw.randrange(100)
        )
        step = draw.randrange(300)
        return zones.draw(step), zones, step
    kept = torch.rand(heads, rows, columns, generator=generator) < draw.choice((0, 0.1, 0.4, 0.9))
    kept.scatter_(2, torch.randint(0, columns, (heads, rows, 1), generator=generator), True)
    if draw.random() < 0.3:  # a column that nobody keeps, unless some row has nothing else
        kept[..., draw.randrange(columns)] = False
        kept[..., 0] |= ~kept.any(-1)
    weight = None
    if form == "weights":
        weight = 1 + 60 * torch.rand(kept.shape, generator=generator)
        weight = weight.where(torch.rand(kept.shape, generator=generator) < 0.7, 1.0)
    flags = [True, *(draw.random() < 0.5 for _ in range(heads - 1))]
    pattern = BlockPattern.from_mask(
        kept,
        query_length=queries,
        key_length=keys,
        block=block,
        weight=weight,
        pooled=draw.choice((1, 2, 4)) if form == "pooled" else 0,
        repetitive=np.array(flags) if form == "copies" else None,
        copies=AnchorRows(grid, draw.randint(1, 4), first) if form == "copies" else None,
    )
    return pattern, None, 0


def draw_problem(draw: random.Random, device: torch.device, fences: Fences) -> Problem:
    """Draw a case."""
    on_gpu = device.type == "cuda"
    form = draw.choice(FORMS)
    pattern, zones, step = draw_pattern(draw, form, on_gpu=on_gpu)
    dtype = draw.choice(GPU_DTYPES if on_gpu else CPU_DTYPES)
    width = draw.choice((64, 128, 128, 96, 32) if on_gpu else (16, 40, 64, 96, 128))
    batch = draw.choice((1, 1, 2))
    size = draw.choice((0.1, 1.0, 1.0, 2.5))
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    clean = []
    for length, times in zip(
        (pattern.query_length, pattern.key_length, pattern.key_length),
        (size, 1.0, 1.0),
        strict=True,
    ):
        values = times * torch.randn(batch, pattern.heads, length, width, generator=generator)
        clean.append(values.to(dtype).to(device))
    if draw.random() < 0.2:  # a key that outweighs all, in the last block
        clean[1][..., -1, :] *= 4
    layouts = [draw_layout(draw) for _ in range(3)]
    dirty = [clean[0], *(poisoned(x, pattern, draw) for x in clean[1:])]
    operands = [
        fences.operand(name, values, layout)
        for name, values, layout in zip("qkv", dirty, layouts, strict=True)
    ]
    scale = draw.choice((None, None, 0.05, -0.1))
    about = (
        f"{form} {(batch, pattern.heads, pattern.query_length, pattern.key_length, width)} "
        f"{dtype} block {(pattern.block_m, pattern.block_n)} {layouts} size {size} scale {scale}"
    )
    three, same = tuple(operands), tuple(clean)
    return Problem(form, pattern, zones, step, three, same, scale, about)  # type: ignore[arg-type]


def poisoned(x: Tensor, pattern: BlockPattern, draw: random.Random) -> Tensor:
    """Keys or values with NaN where no query of a head looks."""
    if pattern.pooled:
        return x
    unused = ~pattern.mask().any(1).repeat_interleave(pattern.block_n, 1)[:, : pattern.key_length]
    return x.masked_fill(unused[None, ..., None].to(x.device), draw.choice((math.nan, math.inf)))


def expanded(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities, not yet divided by their sum, values, and the output; all in float64."""
    q, k, v = (x.double() for x in problem.clean)
    pattern = problem.pattern
    weights = torch.from_numpy(pattern.log_weights()).double()
    if problem.zones is not None:
        weights = (weights / math.log(2)).round() * math.log(2)
    bias = torch.where(pattern.mask(), weights, -math.inf)
    bias = bias.repeat_interleave(pattern.block_n, -1)[..., : pattern.key_length]
    if pattern.pooled:
        bias = torch.cat([bias, part_bias(pattern)], -1)
        k, v = (torch.cat([x, pool(x, pattern)], 2) for x in (k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if problem.scale is None else problem.scale
    scores = scale * q @ k.mT + pattern.rows_to_tokens(bias).to(q)
    p = (scores - scores.amax(-1, keepdim=True)).exp()
    return p, v, copied(p @ v / p.sum(-1, keepdim=True), pattern)


def copied(out: Tensor, pattern: BlockPattern) -> Tensor:
    """Give rows of row-shared heads the output of the row that they copy."""
    if pattern.repetitive is not None:
        assert pattern.copies is not None
        heads = torch.from_numpy(np.flatnonzero(pattern.repetitive))
        source = pattern.copies.sources(pattern.query_length).astype(np.int64)
        out[:, heads] = out[:, heads][:, :, torch.from_numpy(source)]
    return out


def kernels_of(
    problem: Problem, draw: random.Random, baked: float
) -> Iterator[tuple[str, Callable[[Operands], Tensor]]]:
    """Make every kernel that serves a case."""
    q = problem.operands[0]
    pattern, zones, scale, step = problem.pattern, problem.zones, problem.scale, problem.step
    where: dict[str, Any] = {"device": q.device, "dtype": q.dtype, "head_dim": q.shape[-1]}

    def of_zones(kernel: Any) -> Callable[[Operands], Tensor]:
        return lambda given: kernel(*given, step=step, scale=scale)  # type: ignore[no-any-return]

    def of_pattern(kernel: Any) -> Callable[[Operands], Tensor]:
        return lambda given: kernel(*given, scale=scale)  # type: ignore[no-any-return]

    of, some = (of_pattern, pattern) if zones is None else (of_zones, zones)
    yield "reference", of(ReferenceAttention(pattern) if zones is None else ReferenceZones(zones))
    if q.device.type == "cpu":
        made: Any = NativeCpuAttention if zones is None else CpuZones
        yield made.kind, of(made(some, dtype=q.dtype, head_dim=q.shape[-1]))
        return
    from calibatt_compiler.kernels.baked.attention import BakedTier
    from calibatt_compiler.kernels.baked.cover import EXACT
    from calibatt_compiler.kernels.baked.zones import ZoneTier
    from calibatt_compiler.kernels.dispatch import DeviceFacts, choose
    from calibatt_compiler.kernels.hopper.attention import HopperAttention
    from calibatt_compiler.kernels.hopper.zones import HopperZones
    from calibatt_compiler.kernels.portable.attention import TableAttention
    from calibatt_compiler.kernels.portable.zones import ZoneAttention

    softmaxes = ["exact", *(["fixed"] if q.dtype == torch.bfloat16 else [])]
    facts = DeviceFacts.of(q.device)
    for softmax in softmaxes:
        asked: Any = KernelRequest(some, softmax=softmax, **where)
        portable: Any = TableAttention if zones is None else ZoneAttention
        yield f"{portable.__name__}, {softmax}", of(portable(asked))
        served = choose(KernelRequest(some, lowering="table", **where), facts).kernel  # type: ignore[arg-type]
        if served.startswith("hopper"):
            hopper: Any = HopperAttention if zones is None else HopperZones
            yield f"{hopper.__name__}, {softmax}", of(hopper(asked))
        generated = zones is not None or not (pattern.weighted or pattern.pooled)
        if generated and draw.random() < baked:
            for target in ("portable", *(["hopper"] if served.startswith("hopper") else [])):
                tier: Any = (
                    BakedTier(asked, target, limits=EXACT)
                    if zones is None
                    else ZoneTier(asked, target)
                )
                if tier.wait(240) and (kernel := tier.kernel()) is not None:
                    yield f"{target} baked, {softmax}", of(kernel)


def wrong(
    name: str, out: Tensor, problem: Problem, exact: Tensor, yardsticks: list[Tensor]
) -> str | None:
    """Say what is wrong with an output."""
    q = problem.operands[0]
    if out.shape != q.shape or out.dtype != q.dtype or not out.transpose(1, 2).is_contiguous():
        return f"{tuple(out.shape)} {out.dtype}, strides {out.stride()}"
    if not out.isfinite().all():
        return f"{int((~out.isfinite()).sum())} values are not finite"
    rounding = torch.finfo(q.dtype).eps
    if q.dtype == torch.float64:
        # The reference takes what zones draw, whose weights are of float32.
        rounding = 1e-7 if name == "reference" and problem.zones is not None else 1e-14
    measures = {"largest": torch.amax, "rms": lambda x: x.square().mean().sqrt()}
    for which, of in measures.items():
        error = float(of((out.double() - exact).abs()))
        own = max(float(of((one.double() - exact).abs())) for one in yardsticks)
        # The values of a row share the error of its scores: few rows are few samples.
        factor = FACTORS["largest" if q.shape[:3].numel() < 64 else which]
        allowed = factor * own + rounding * float(of(exact.abs()))
        if error > allowed:
            return f"{which} error {error:.2e}, allowed {allowed:.2e}"
    return None


def case(draw: random.Random, counts: Counter[str], options: argparse.Namespace) -> str | None:
    """Run one case by all kernels that serve it."""
    device = torch.device(options.device)
    fences = Fences()
    problem = draw_problem(draw, device, fences)
    pattern, scale = problem.pattern, problem.scale
    p, v, exact = expanded(problem)
    dtype = problem.clean[0].dtype
    rounded = (p.to(dtype).double() @ v / p.sum(-1, keepdim=True)).to(dtype)
    plain = masked_dense_attention(*problem.clean, pattern, scale=scale)
    yardsticks = [plain, copied(rounded, pattern)]
    del p, v
    name = "making the kernel"
    try:
        for name, kernel in kernels_of(problem, draw, options.baked):
            with fences.around_outputs():
                outs = [kernel(problem.operands) for _ in range(2)]
            if device.type == "cuda":
                torch.cuda.synchronize()
            said = wrong(name, outs[0], problem, exact, yardsticks) or fences.broken()
            if said is None and not torch.equal(*outs):
                said = "another call gives other bits"
            if said is not None:
                return f"wrong: {name}: {said}; {problem.about}"
            counts[f"calls of {name}"] += 2
            fences.outputs.clear()
    except KernelError as error:
        return f"refused: {name}: {error}; {problem.about}"
    except Exception as error:
        return f"crash: {name}: {type(error).__name__}: {str(error)[:400]}; {problem.about}"
    counts[f"cases of {problem.form}"] += 1
    return None


def main() -> int:
    parser = parser_of(__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--baked", type=float, default=0.03, help="share by generated source")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="calibatt-kernels-") as folder:
        for name in ("TORCHINDUCTOR_CACHE_DIR", "CALIBATT_CACHE_DIR"):
            os.environ.setdefault(name, f"{folder}/{name}")
        name = torch.cuda.get_device_name() if default == "cuda" and "cpu" not in sys.argv else None
        return run(__doc__, case, parser, device=name)


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())
