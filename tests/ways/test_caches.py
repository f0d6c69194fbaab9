"""Caches that leave out blocks: sparse in the steps in which a block runs, as docs/ways.md says.

Each is compared with the model that is not compiled, under the plan's masks and the same cache.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import hooks
from way_models import Table, error, model, plan_of, under_masks

import calibatt_compiler
from calibatt_compiler.errors import CalibrationError

STEPS = 4
TIMES = tuple(950.0 - 150.0 * step for step in range(STEPS))
PLAN = plan_of(times=TIMES)
ATTENTION = [r"blocks\.\d+\.attn1"]


@dataclass
class Clock:
    """The sampler's timestep, which some caches ask for."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Cache:
    """One cache.

    Attributes:
        enable: puts it on a model.
        branches: how many calls a step has.
        batch: samples in a call.
    """

    enable: Callable[[Any, Clock], None]
    branches: int = 2
    batch: int = 1


def of(kind: str, **settings: Any) -> Callable[[Any, Clock], None]:
    def enable(m: Any, clock: Clock) -> None:
        asks = (
            {"current_timestep_callback": clock} if kind[0] in "PF" and "Block" not in kind else {}
        )
        m.enable_cache(getattr(hooks, f"{kind}Config")(**asks, **settings))

    return enable


class StandInBlocks(torch.nn.Module):
    """What cache-dit puts in the place of a model's blocks while it runs: it holds the model.

    After the source of cache-dit 1.5.3: the first block always runs, the others every second time.
    """

    def __init__(self, blocks: torch.nn.ModuleList, transformer: torch.nn.Module) -> None:
        super().__init__()
        self.transformer = transformer
        self.transformer_blocks = blocks
        self.calls = 0
        self.kept: list[torch.Tensor] = []

    def forward(self, hidden_states: torch.Tensor, *rest: Any) -> torch.Tensor:
        first = self.transformer_blocks[0](hidden_states, *rest)
        if self._reuses():
            return first + self.kept[0]
        out = first
        for block in self.transformer_blocks[1:]:
            out = block(out, *rest)
        self.keep(out - first)
        return out

    @torch.compiler.disable
    def _reuses(self) -> bool:
        self.calls += 1
        return self.calls % 2 == 0

    @torch.compiler.disable
    def keep(self, residual: torch.Tensor) -> None:
        self.kept[:] = [residual]


def stand_in(m: Any, clock: Clock) -> None:
    original, blocks = m.forward, torch.nn.ModuleList([StandInBlocks(m.blocks, m)])

    def forward(self: Any, *args: Any, **given: Any) -> Any:
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(self, "blocks", blocks))
            return original(*args, **given)

    m.forward = functools.update_wrapper(functools.partial(forward, m), forward)
    m._is_cached = True


MAG = of("MagCache", mag_ratios=[1.0] * STEPS, num_inference_steps=STEPS, max_skip_steps=1)
CACHES = {
    "MagCache": Cache(MAG),
    "SeaCache": Cache(of("SeaCache", threshold=0.6)),
    "TaylorSeerCache": Cache(
        of(
            "TaylorSeerCache",
            cache_interval=2,
            disable_cache_before_step=2,
            cache_identifiers=ATTENTION,
            taylor_factors_dtype=torch.float32,
        )
    ),
    "PyramidAttentionBroadcast": Cache(
        of("PyramidAttentionBroadcast", spatial_attention_block_skip_range=2), branches=1
    ),
    "FasterCache": Cache(
        of("FasterCache", spatial_attention_block_identifiers=ATTENTION), branches=1, batch=2
    ),
    "cache-dit": Cache(stand_in, branches=1),
}


def whole(m: Any, options: dict[str, Any]) -> Any:
    return torch.compile(m, backend="calibatt", options=options)


def blocks(m: Any, options: dict[str, Any]) -> Any:
    m.compile_repeated_blocks(backend="calibatt", options=options)
    return m


HOW = {"`torch.compile(transformer)`": whole, "`compile_repeated_blocks`": blocks}
# Those whose hooks hide blocks, or rename them, are compiled both ways.
BOTH = ("MagCache", "SeaCache", "cache-dit")
PAIRS = [(cache, how) for cache in CACHES for how in list(HOW)[0 if cache in BOTH else 1 :]]
ROWS = [f"{cache}, {how}" for cache, how in PAIRS]
TABLE = Table("| cache", ROWS)
QUICK = ("MagCache", "TaylorSeerCache")
WAYS = [pytest.param(*p, marks=() if p[0] in QUICK else pytest.mark.slow) for p in PAIRS]


@pytest.fixture(autouse=True)
def _without_inductor(request: pytest.FixtureRequest, monkeypatch: Any) -> None:
    torch._dynamo.reset()
    if "inductor" not in request.keywords:
        monkeypatch.setattr(
            "calibatt_compiler.backend._inductor", lambda gm, example, settings: gm.forward
        )


def sample(call: Any, m: Any, cache: Cache, clock: Clock, steps: int = STEPS) -> list[torch.Tensor]:
    """Return what a small sampler's steps give, with guidance where there are two branches."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 4, 3, 14, 18, generator=generator)
    text = torch.randn(2, 6, 16, generator=generator)
    outs = []
    for step, clock.now in enumerate(TIMES[:steps]):
        found = []
        for branch in range(cache.branches):
            where = {"step_index": step, "num_inference_steps": STEPS, "sigma": clock.now / 1000}
            with m.cache_context(("cond", "uncond")[branch], **where):
                out = call(
                    hidden_states=x.expand(cache.batch, -1, -1, -1, -1),
                    encoder_hidden_states=text[branch : branch + cache.batch],
                    timestep=torch.full((cache.batch,), clock.now),
                    return_dict=False,
                )[0]
            found += out.chunk(cache.batch)
        outs.append(2.0 * found[0] - found[-1])
        x = x - 0.1 * outs[-1]
    return outs


def outcome(name: str, how: str, said: Any, *, running: bool = False) -> str:
    """Run a cached model, compiled; say what served the blocks that run.

    Args:
        name: of the cache.
        how: the model is compiled.
        said: what was logged, as pytest's `caplog`.
        running: put the cache on when the model is compiled and has run.
    """
    cache, clock = CACHES[name], Clock()
    cached = model()
    cache.enable(cached, clock)
    with under_masks(cached, PLAN) as ran:
        sparse = sample(cached, cached, cache, clock)
    assert 0 < len(ran) < 2 * STEPS * cache.branches, "nothing was reused"
    m, before = model(), 0
    if running:
        compiled = HOW[how](m, {"plan": PLAN})
        sample(compiled, m, cache, clock, steps=1)
        before = calibatt_compiler.summary(compiled).sparse_calls
        cache.enable(m, clock)
    else:
        cache.enable(m, clock)
        compiled = HOW[how](m, {"plan": PLAN})
    got = sample(compiled, m, cache, clock)
    found = calibatt_compiler.summary(compiled)
    if all(error(x, expected) < 1e-5 for x, expected in zip(got, sparse, strict=True)):
        assert found.sparse_calls - before == len(ran)
        return "sparse"
    plain = model()
    cache.enable(plain, clock)
    dense = sample(plain, plain, cache, clock)
    assert found.sparse_calls - before < len(ran)
    if found.sparse_calls == before:
        assert all(error(x, expected) < 1e-5 for x, expected in zip(got, dense, strict=True))
        assert found.eager is not None
        return f"dense: {found.eager.rpartition(': ')[2]}"
    assert any("keeps the compiler out" in warning for warning in said.messages)
    return "sparse but for blocks that ran before the first was compiled: a warning says so"


@torch.no_grad()
@pytest.mark.parametrize(("cache", "how"), WAYS)
def test_blocks_that_run_are_served_as_the_table_says(cache, how, caplog):
    found = outcome(cache, how, caplog)
    row = f"{cache}, {how}"
    if os.environ.get("CALIBATT_UPDATE_GOLDEN"):
        TABLE.write(row, found)
    assert TABLE.rows()[row] == found


def test_the_table_has_all_caches():
    assert list(TABLE.rows()) == ROWS


@torch.no_grad()
def test_a_cache_that_is_put_on_a_served_model_and_taken_off():
    assert outcome("MagCache", "`torch.compile(transformer)`", None, running=True) == "sparse"


@pytest.mark.inductor
@pytest.mark.slow
@torch.no_grad()
def test_blocks_that_hooks_hide_are_served_through_inductor():
    assert outcome("MagCache", "`torch.compile(transformer)`", None) == "sparse"


@torch.no_grad()
def test_a_model_called_by_itself_is_as_it_was_beneath_its_hooks():
    """Also with several plans: each compiled model is served its own."""
    cache, clock = CACHES["MagCache"], Clock()
    plain, m = model(), model()
    for each in (plain, m):
        cache.enable(each, clock)
    dense = sample(plain, plain, cache, clock)
    for plan in (PLAN, plan_of(seed=8, times=TIMES), PLAN):
        cached = model()
        cache.enable(cached, clock)
        with under_masks(cached, plan):
            expected = sample(cached, cached, cache, clock)
        got = sample(whole(m, {"plan": plan}), m, cache, clock)
        assert error(got[-1], expected[-1]) < 1e-5
        assert torch.equal(sample(m, m, cache, clock)[-1], dense[-1])
    m.disable_cache()
    assert m.blocks[0].forward == type(m.blocks[0]).forward.__get__(m.blocks[0])


def put_on_directly(m: Any, clock: Clock) -> None:
    hooks.apply_mag_cache(m, hooks.MagCacheConfig(mag_ratios=[1.0]))


@pytest.mark.parametrize(
    ("enable", "named"),
    [
        *((cache.enable, name) for name, cache in CACHES.items() if name != "cache-dit"),
        (of("FirstBlockCache"), "FirstBlockCacheConfig"),
        (put_on_directly, "MagCacheHeadHook"),
        (stand_in, "cache-dit"),
    ],
)
def test_calibration_refuses_each_cache_by_its_name(enable, named):
    m = model(1 if enable is stand_in else 2)
    enable(m, Clock())
    with (
        pytest.raises(CalibrationError, match=named),
        calibatt_compiler.calibration(m) as run,
        run.input(),
    ):
        pass
