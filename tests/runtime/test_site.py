"""The operators, how they find their sites, and the counters of a site."""

from __future__ import annotations

import math
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.dispatch import Choice
from calibatt_compiler.kernels.request import KernelRequest, KernelSettings
from calibatt_compiler.plan import BlockPattern, Plan, Sampler, SitePatterns
from calibatt_compiler.plan.order import TokenOrder
from calibatt_compiler.runtime import ops
from calibatt_compiler.runtime import site as sites
from calibatt_compiler.runtime import site_kernels as making
from calibatt_compiler.runtime.device_queue import HostQueue
from calibatt_compiler.runtime.invocation import Invocation, Sites, lookup, running
from calibatt_compiler.runtime.kernel_cache import KernelCache


@pytest.mark.parametrize(
    ("timestep", "expected"),
    [
        (torch.tensor(5), 5.0),
        (torch.tensor([999]), 999.0),
        (torch.tensor([7.5]).expand(3), 7.5),
        (torch.tensor([[0.0, 0.0, 250.0], [0.0, 250.0, 250.0]]), 250.0),
        (torch.tensor([933.98], dtype=torch.bfloat16), 932.0),
        (torch.tensor([1.0, 2.0]), math.nan),
    ],
)
def test_host_timestep(timestep, expected):
    got = ops.host_timestep(timestep)
    assert got.dtype == torch.float64
    assert got.shape == (2,)
    assert got[1] == 0, "no graph is running"
    assert got[0] == expected or (math.isnan(got[0]) and math.isnan(expected))


def test_host_timestep_is_a_sound_operator():
    torch.library.opcheck(ops.host_timestep, (torch.tensor([5.0, 5.0]),))


def test_attention_is_a_sound_operator():
    site = make_site(torch.eye(3, dtype=torch.bool).expand(1, 2, 3, 3))
    q, k, v = (torch.randn(1, 40, 2, 8).transpose(1, 2) for _ in range(3))
    timestep = torch.tensor(5.0, dtype=torch.float64)
    with running(Invocation(Sites({"a": site}))):
        torch.library.opcheck(ops.attention, (q, k, v, timestep, "a", 0.5))


def make_site(masks: torch.Tensor) -> sites.SparseSite:
    timesteps = [5.0 - i for i in range(len(masks))]
    plan = Plan.from_masks({"a": masks}, (1, 5, 8), timesteps, (16, 16))
    options = {"device": torch.device("cpu"), "dtype": torch.float32, "head_dim": 8}
    return sites.SparseSite(plan, "a", KernelSettings(lowering="reference", **options))


def test_a_site_is_found_while_its_graph_runs_and_in_its_thread_alone():
    outer, inner = (make_site(torch.eye(3, dtype=torch.bool).expand(1, 2, 3, 3)) for _ in range(2))
    elsewhere = []

    def look():
        with pytest.raises(KernelError, match="no graph"):
            lookup("a")
        elsewhere.append(True)

    with running(Invocation(Sites({"a": outer}))):
        with running(Invocation(Sites({"a": inner}))):
            assert lookup("a") is inner
        assert lookup("a") is outer
        with pytest.raises(KernelError, match="without it"):
            lookup("b")
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert elsewhere
    with pytest.raises(KernelError, match="not loaded"):
        lookup("a")


def test_the_step_decides_the_pattern():
    masks = torch.zeros(2, 2, 3, 3, dtype=torch.bool)
    masks[0] |= torch.eye(3, dtype=torch.bool)
    masks[1] |= torch.ones(3, 3, dtype=torch.bool).tril()
    site = make_site(masks)
    q, k, v = (torch.randn(1, 2, 40, 8) for _ in range(3))
    for timestep, step in ((5.0, 0), (4.6, 0), (4.2, 1), (4.0, 1)):
        token = masks[step].repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :40, :40]
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, token[None])
        got = site.attend(q, k, v, timestep, 8**-0.5)
        assert torch.allclose(got, expected, atol=1e-6)
    assert site.calls == {"reference": 4}
    site.attend(q, k, v, 50.0, 1.0)
    site.attend(q, k, v, math.nan, 1.0)
    assert site.calls[sites.DENSE_OUTSIDE] == 1
    assert site.calls[sites.DENSE_MIXED] == 1


@pytest.mark.parametrize("lowering", ["table", "reference"])
@pytest.mark.parametrize(("text", "policy"), [(0, "none"), (7, "dense_first"), (7, "dense_last")])
@pytest.mark.parametrize("tile", [(1, 2, 3), (1, 3, None), (None, 2, 2)])
def test_a_site_brings_tokens_into_the_plans_order_and_back(tile, text, policy, lowering):
    grid, order = (2, 5, 8), TokenOrder(tile)
    length = 80 + text
    first = text if policy == "dense_first" else 0
    blocks = -(-length // 16)
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(2, blocks, blocks, generator=generator) < 0.4) | torch.eye(blocks).bool()
    pattern = BlockPattern.from_mask(mask, query_length=length, key_length=length, block=(16, 16))
    plan = Plan.create(
        {"a": SitePatterns.share([pattern])},
        grid=grid,
        sampler=Sampler(timesteps=(5.0,)),
        token_order=order,
        text_policy=policy,
    )
    options = {"device": torch.device("cpu"), "dtype": torch.float32, "head_dim": 8}
    site = sites.SparseSite(plan, "a", KernelSettings(lowering=lowering, **options))
    q, k, v = (torch.randn(2, length, 2, 8).transpose(1, 2) for _ in range(3))
    tokens = torch.from_numpy(order.tokens(grid, length=length, first=first))
    token_mask = torch.empty(2, length, length, dtype=torch.bool)
    token_mask[:, tokens[:, None], tokens] = pattern.token_mask()
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, token_mask[None])
    got = site.attend(q, k, v, 5.0, 8**-0.5)
    assert torch.allclose(got, expected, atol=1e-5)
    assert got.transpose(1, 2).is_contiguous()
    laid = [x[:, :, tokens] for x in (q, k, v)]
    ordered = site.attend(*laid, 5.0, 8**-0.5, ordered=True)
    assert torch.allclose(ordered, expected[:, :, tokens], atol=1e-5)
    raster = pattern.token_mask()[None]
    assert not torch.allclose(
        got, torch.nn.functional.scaled_dot_product_attention(q, k, v, raster), atol=1e-2
    )


@pytest.mark.parametrize(("first", "length"), [(0, 80), (7, 87), (0, 87), (3, 90)])
def test_token_order_is_a_sound_operator_with_memory_of_its_own(first: int, length: int) -> None:
    like, grid = torch.empty(0), [2, 5, 8]
    arguments = (like, "1x2x3", grid, length, first)
    for inverse in (False, True):
        torch.library.opcheck(ops.token_order, (*arguments, inverse))
    tokens, places = (ops.token_order(*arguments, inverse) for inverse in (False, True))
    expected = TokenOrder((1, 2, 3)).tokens((2, 5, 8), length=length, first=first)
    assert expected is not None
    assert tokens.tolist() == expected.tolist()
    assert (tokens[places] == torch.arange(length)).all()
    tokens.zero_()  # Inductor may use the memory again
    assert ops.token_order(*arguments, False).tolist() == expected.tolist()


def stepped_masks(steps: int) -> torch.Tensor:
    """Masks of so many steps, all different, the last one dense."""
    masks = torch.eye(6, dtype=torch.bool).repeat(steps, 2, 1, 1)
    for step in range(steps - 1):
        masks[step, 0, 5, step] = True
    masks[-1] = True
    return masks


def test_kernels_are_made_when_their_step_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    original = making.make_attention

    def counted(request: KernelRequest[BlockPattern], choice: Choice) -> Any:
        made.append(request.pattern.digest)
        return original(request, choice)

    monkeypatch.setattr(making, "make_attention", counted)
    masks = stepped_masks(4)
    timesteps = [4.0, 3.0, 2.0, 1.0]
    Plan.from_masks({"a": masks}, (1, 6, 16), timesteps, (16, 16)).save(tmp_path / "p")
    plan = Plan.load(tmp_path / "p")
    options: Any = {"device": torch.device("cpu"), "dtype": torch.float32, "head_dim": 8}
    site = sites.SparseSite(plan, "a", KernelSettings(lowering="table", **options))
    digests = plan.sites["a"].digests
    assert made == [digests[0]]
    assert site.counts.kinds == ("native-cpu", "sdpa")
    assert site.counts.computed_density == pytest.approx(plan.density("a"))
    q, k, v = (torch.randn(1, 2, 96, 8) for _ in range(3))
    for timestep in (4.0, 4.0, 2.0, 1.0, 2.0):
        mask = masks[4 - int(timestep)].repeat_interleave(16, 1).repeat_interleave(16, 2)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask[None])
        got = site.attend(q, k, v, timestep, 8**-0.5)
        assert torch.allclose(got, expected, atol=1e-5)
    assert made == [digests[0], digests[2]]
    assert site.calls == {"native-cpu": 4, sites.DENSE_FULL: 1}


def test_a_kernel_that_is_faster_serves_dense_patterns_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """In whichever order the tokens are: dense attention does not ask."""
    monkeypatch.setattr(making, "choose", lambda request, facts: Choice("native-cpu"))
    asked: list[int] = []
    of = sites.Rearrangements.of
    monkeypatch.setattr(
        sites.Rearrangements, "of", lambda *a, **kw: asked.append(1) or of(*a, **kw)
    )
    patterns = [BlockPattern.from_mask(mask, block=(16, 16)) for mask in stepped_masks(2)]
    plan = Plan.create(
        {"a": SitePatterns.share(patterns, 8)},
        grid=(2, 6, 8),
        sampler=Sampler(timesteps=(2.0, 1.0)),
        token_order=TokenOrder.parse("2x2x2"),
    )
    options: Any = {"device": torch.device("cpu"), "dtype": torch.float32, "head_dim": 8}
    site = sites.SparseSite(plan, "a", KernelSettings(lowering="table", **options))
    q, k, v = (torch.randn(1, 2, 96, 8) for _ in range(3))
    got = site.attend(q, k, v, 1.0, 8**-0.5)
    assert site.calls == {"native-cpu": 1}
    assert not asked
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(got, dense, rtol=1e-5, atol=1e-5)
    site.attend(q, k, v, 2.0, 8**-0.5)
    assert asked


def test_what_has_no_kernel_is_known_at_once() -> None:
    """Also where the first steps are dense, which any device serves."""
    masks = stepped_masks(4).flip(0)
    plan = Plan.from_masks({"a": masks}, (1, 6, 16), [4.0, 3.0, 2.0, 1.0], (16, 16))
    options: Any = {"device": torch.device("cpu"), "head_dim": 8}
    cache = KernelCache(HostQueue())
    with pytest.raises(KernelError, match="floating-point"):
        sites.SparseSite(
            plan, "a", KernelSettings(lowering="table", dtype=torch.int32, **options), kernels=cache
        )
    assert cache.held("a") == []
    sites.SparseSite(
        plan, "a", KernelSettings(lowering="table", dtype=torch.float32, **options), kernels=cache
    )
    assert len(cache.held("a")) == 1


def test_tables_of_a_graph_that_is_gone_are_gone() -> None:
    site = make_site(torch.eye(3, dtype=torch.bool).expand(1, 2, 3, 3))
    (kernel,) = site._kernels.held("a")
    found = weakref.ref(kernel)
    del kernel, site
    assert found() is None
