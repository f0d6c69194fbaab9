"""Draws models, ways of running them, plans and sizes, and holds each output against the reference.

A case is a family, a way of `tests/ways`, a plan (masks, zones, weights, pooled keys, row-shared
heads, in any token order) and a size. Its model is called a few times: at steps of the plan and
beyond them, with other text, and with another video of as many tokens. The reference is the eager
model in which just those sites attend by the plan that the summary says were served.

wrong: the output is another one, or a site was served that the plan does not fit. silent: a
planned site ran dense, or not at all, and nothing says why. lost: it ran dense in the plan's own
video, for a reason not known of this family. crash: an error, where stock torch.compile has none.

python tests/campaigns/ways.py --minutes 5 --seed 7 --workers 2
python tests/campaigns/ways.py --case 7-0-35
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import logging
import math
import os
import random
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "support"), str(TESTS / "ways")]
import torch  # noqa: E402
from campaign import parser_of, run  # noqa: E402
from drawn_plans import FORMS, draw_plan, served  # noqa: E402
from model_families import FAMILIES, LONGEST, Family, Grid  # noqa: E402
from test_ways import WAYS, context  # noqa: E402

import calibatt_compiler  # noqa: E402
from calibatt_compiler.errors import CaptureError  # noqa: E402
from calibatt_compiler.plan import Plan  # noqa: E402

COMPILE = torch.compile
DENSE: dict[str, tuple[str, ...]] = {
    "any": ("keeps every block", "no timestep so far"),
    "weights": ("not the plan's video with text",),
    "hunyuan": ("pooled keys",),
    "hunyuan 1.5": ("pooled keys", "timestep is not an input"),
    "mochi": ("was captured",),
    # Of two videos among the arguments of a function around it, none is known to be the latents.
    "vace": ("can't be read",),
}
"""Words of known reasons for dense calls of the plan's own video, by family or form of the plan."""
BLOCKS = ("blocks", "vace_blocks", "transformer_blocks", "single_transformer_blocks")


def repeated(model: Any) -> list[torch.nn.ModuleList]:
    """Lists of a model's blocks."""
    return [getattr(model, name) for name in BLOCKS if hasattr(model, name)]


def each_block(model: Any, options: dict[str, Any]) -> Any:
    """`test_ways` has it for Wan alone."""
    for blocks in repeated(model):
        for index, block in enumerate(blocks):
            blocks[index] = torch.compile(block, backend="calibatt", options=options)
    return model


def breaks(model: Any, options: dict[str, Any]) -> Any:
    """Break the graph behind the feed-forward part of each block."""

    @torch._dynamo.disable
    def look(module: Any, *_: Any) -> None:
        return None

    for blocks in repeated(model):
        for block in blocks:
            list(block.children())[-1].register_forward_hook(look)
    return torch.compile(model, backend="calibatt", options=options)


OWN = {"each block by `torch.compile`": each_block, "graph breaks in each block": breaks}


@functools.cache
def eager(family: str) -> Any:
    """The model that references run."""
    return FAMILIES[family].build()


@contextlib.contextmanager
def native() -> Iterator[None]:
    """Undo what a way has changed for the whole process."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    active = registry._active_backend
    registry._active_backend = type(active)("native")
    try:
        yield
    finally:
        registry._active_backend = active


def stock(model: Any = None, *more: Any, **how: Any) -> Any:
    """`torch.compile` without us."""
    how.pop("options", None)
    return COMPILE(model, *more, **{**how, "backend": "eager"})


def other_grid(grid: Grid, draw: random.Random) -> Grid:
    """Another video of as many tokens, or of another number of them."""
    frames, height, width = grid
    turned = [g for g in ((frames, width, height), (height, frames, width)) if g != grid]
    return draw.choice([*turned, *turned, (frames, height + 1, width), (frames + 1, height, width)])


class Calls:
    """Calls a compiled model and compares.

    Args:
        family: name of the family.
        plan: that the model was compiled with.
        model: that was compiled, with its hooks.
        compiled: what is called.
        known: words of reasons for which it may be dense.
        close: largest relative error.
        counts: of the campaign.
    """

    def __init__(
        self, family: str, plan: Plan, model: Any, compiled: Any, known: Sequence[str],
        close: float, counts: Counter[str],
    ) -> None:  # fmt: skip
        self.family, self.plan, self.model, self.compiled = family, plan, model, compiled
        self.known, self.close, self.counts = known, close, counts

    def said(self) -> tuple[Counter[str], Counter[tuple[str, str]], dict[str, str]]:
        """Sparse calls by planned site, dense ones by site and reason, and why a site never is."""
        try:
            rows = calibatt_compiler.summary(self.compiled).rows
        except CaptureError:
            rows = ()
        sparse, dense, status = Counter[str](), Counter[tuple[str, str]](), {}
        for row in rows:
            if row.name in self.plan.sites:
                sparse[row.name] += row.sparse_calls
                for reason, count in row.dense_calls.items():
                    dense[row.name, reason] += count
                if row.status != "sparse":
                    status[row.name] = row.status
        return sparse, dense, status

    def note(self) -> str | None:
        """What the summary says of calls that ran outside of compiled code."""
        try:
            return getattr(calibatt_compiler.summary(self.compiled), "eager", None)
        except CaptureError:
            return None

    def one(self, given: dict[str, Any], *, fits: bool) -> str | None:
        """Call once; return what is wrong."""
        step = self.plan.step_of(float(given["timestep"].flatten()[0]))
        sparse, dense, _ = self.said()
        with context(self.model):
            got = self.compiled(**given)[0]
        sparse_now, dense_now, status = self.said()
        ran = {name for name in self.plan.sites if sparse_now[name] > sparse[name]}
        rose = dense_now - dense
        note = self.note()
        told = {name for name, _ in rose} | set(status)
        if ran and (step is None or not fits):
            return f"wrong: {sorted(ran)} were served at step {step}, fits: {fits}"
        with native():
            plain = eager(self.family)(**given)[0]
            expected = plain
            if ran:
                with served(eager(self.family), self.plan, step or 0, ran):
                    expected = eager(self.family)(**given)[0]
        scale = float(expected.float().norm())
        error = float((got.float() - expected.float()).norm()) / scale
        distance = float((plain.float() - expected.float()).norm()) / scale
        if not error <= self.close:
            return f"wrong: error {error:.1e}, distance {distance:.1e}, sparse {sorted(ran)}"
        untold = set(self.plan.sites) - ran - told
        if untold and note is None:
            size = tuple(given["hidden_states"].shape)
            return f"silent: {sorted(untold)} ran dense, or not at all, with {size} at step {step}"
        if fits and step is not None and ran != set(self.plan.sites):
            reasons = {reason for _, reason in rose} | {note or ""}
            if not any(word in reason for word in self.known for reason in reasons):
                return f"lost: {'; '.join(sorted(reasons))}"
        self.counts["calls"] += 1
        self.counts["calls, sparse" if ran else "calls, dense with reason"] += 1
        if ran and distance < 10 * self.close:
            self.counts["calls, sparse, where the plan hardly matters"] += 1
        return None


def called(
    family: Family, grid: Grid, text: int, batch: int, timestep: float, draw: random.Random
) -> dict[str, Any]:
    """Arguments of a call."""
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    given = family.inputs(grid, text, batch, generator)
    return given | {"timestep": torch.full((batch,), timestep), "return_dict": False}


def draw_grid(draw: random.Random) -> Grid:
    """A grid whose turned ones are other videos."""
    while True:
        grid = draw.randint(1, 4), draw.randint(3, 9), draw.randint(3, 9)
        if len(set(grid)) == 3 and 40 <= math.prod(grid) <= 200:
            return grid


def run_case(draw: random.Random, counts: Counter[str], options: argparse.Namespace) -> str | None:
    """Run one case."""
    name = draw.choice([each for each in FAMILIES if options.only_family in (None, each)])
    way = draw.choice([each for each in WAYS if (options.only_way or "") in each])
    form, grid, text = draw.choice(FORMS), draw_grid(draw), draw.randint(4, 9)
    inductor = draw.random() < options.inductor
    lowering = draw.choice(("baked", "baked", "table", "reference"))
    family, timesteps = FAMILIES[name], (900.0, 500.0, 100.0)
    plan = draw_plan(family, grid, text, timesteps, draw, form)
    settings = {"plan": plan, "lowering": lowering, "monitor": draw.choice((0, 0, 1))}
    mode = draw.choice((torch.no_grad, torch.no_grad, torch.inference_mode, contextlib.nullcontext))
    batch = draw.choice((1, 1, 2))
    sizes: list[tuple[Grid, int, int, float]] = [
        (grid, text, batch, draw.choice(timesteps)) for _ in range(2)
    ]
    if family.text:
        sizes.append((grid, draw.randint(4, LONGEST), batch, draw.choice(timesteps)))
    sizes.append((grid, text, draw.choice((1, 2)), draw.choice((880.0, 520.0, 90.0))))
    sizes.append((grid, text, batch, draw.choice((5000.0, -300.0))))
    sizes.append((other_grid(grid, draw), text, batch, draw.choice(timesteps)))
    draw.shuffle(sizes)
    calls = [(called(family, *size, draw), size[0] == grid) for size in sizes]
    about = (
        f"{name}, {way}, {form} {plan.token_order} {lowering}, grid {grid}, text {text}, "
        f"monitor {settings['monitor']}, {mode.__name__}, "
        + ("Inductor" if inductor else "as rewritten")
    )
    prepare = OWN.get(way, WAYS[way])
    torch._dynamo.reset()
    counts["through Inductor" if inductor else "as rewritten"] += 1
    try:
        with native(), mode(), contextlib.nullcontext() if inductor else without_inductor():
            model = family.build()
            compiled = prepare(model, settings)
            known = [word for key in (name, form, "any") for word in DENSE.get(key, ())]
            known += ["flex"] if "flex" in way else []
            close = 5e-3 if "casting" in way else 1e-4
            checks = Calls(name, plan, model, compiled, known, close, counts)
            for given, fits in calls:
                if wrong := checks.one(given, fits=fits):
                    return f"{wrong}; {about}"
                if hasattr(model, "_reset_stateful_cache"):
                    model._reset_stateful_cache()
            sparse, _, _ = checks.said()
    except Exception as error:
        if stock_fails(family, prepare, settings, calls, mode):
            counts["skipped: stock torch.compile fails too"] += 1
            return None
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        return f"crash: {type(error).__name__}: {str(error)[:400]} at {where}; {about}"
    counts["combinations of family, way, plan and size"] += len({size[:3] for size in sizes})
    served = sum(sparse[site] > 0 for site in plan.sites)
    kind = "sparse" if served == len(plan.sites) else "partly sparse" if served else "dense"
    counts[f"models, {kind}"] += 1
    return None


def stock_fails(
    family: Family, prepare: Any, settings: Any, calls: list[tuple[dict[str, Any], bool]], mode: Any
) -> bool:
    """Whether these calls fail without us, too."""
    torch._dynamo.reset()
    try:
        with native(), mode(), mock.patch("torch.compile", stock):
            model = family.build()
            compiled = prepare(model, settings)
            for given, _ in calls:
                with context(model):
                    compiled(**given)
                if hasattr(model, "_reset_stateful_cache"):
                    model._reset_stateful_cache()
    except Exception:
        return True
    return False


def without_inductor() -> Any:
    """Run graphs as they are rewritten."""
    return mock.patch(
        "calibatt_compiler.backend._inductor", lambda gm, inputs, settings: gm.forward
    )


def case(draw: random.Random, counts: Counter[str], options: argparse.Namespace) -> str | None:
    """Run one case, and leave nothing behind."""
    try:
        return run_case(draw, counts, options)
    finally:
        gc.collect()


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--inductor", type=float, default=0.03, help="share of the cases")
    parser.add_argument("--only-family", choices=list(FAMILIES))
    parser.add_argument("--only-way", help="ways whose name holds this")
    logging.getLogger("calibatt").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="calibatt-ways-") as folder:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{folder}/inductor")
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        os.environ.setdefault("CALIBATT_CACHE_DIR", f"{folder}/calibatt")
        return run(__doc__, case, parser)


if __name__ == "__main__":
    sys.exit(main())
