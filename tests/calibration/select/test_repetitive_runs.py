"""Calibrations of models with row-shared heads, from the recording to the plan."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import Calibration
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import calibatt_compiler
from calibatt_compiler.calibration import CalibrationConfig, calibrate, plan_from_run, validate_run
from calibatt_compiler.calibration.store.run_folder import RunStore
from calibatt_compiler.errors import CalibrationError, OptionError
from calibatt_compiler.plan import BlockPattern, Plan, SitePatterns
from calibatt_compiler.plan.copies import AnchorRows
from calibatt_compiler.plan.order import TokenOrder

GRID = (2, 12, 7)
TOKENS = 168
TIMESTEPS = (900.0, 500.0, 100.0)
CONFIG = CalibrationConfig(
    block=(16, 16), A=0.7, C=0.9, k=2.0, grid=GRID, gamma=0.87, anchor_rows=3
)
EVERY = [True, False, False]
"""Of the three heads of `Attention`, those that are row-shared."""


class Attention(nn.Module):
    """Rows of head 0 attend alike, those of head 1 to themselves; head 2 is the same, diffuse."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(24, 72)
        self.mix = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Attend from tokens (B, S, 24), of which the last are the video's."""
        batch, length, _ = x.shape
        q, k, v = self.project(x).view(batch, length, 3, 3, 8).permute(2, 0, 3, 1, 4)
        rows = q[:, 0, -TOKENS:].reshape(batch, *GRID, 8)
        alike = torch.lerp(rows, rows.mean(2, keepdim=True).expand_as(rows), self.mix)
        alike = torch.cat([q[:, 0, :-TOKENS], alike.reshape(batch, TOKENS, 8)], 1)
        q = torch.cat([alike[:, None], 6 * k[:, 1:2], 1.5 * k[:, 2:]], 1)
        out = scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).reshape(batch, length, 24)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x) * (1 + timestep.view(-1, 1, 1) / 1000)
        return x


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def sample(model: nn.Module, seed: int, text: int = 0) -> Tensor:
    x = torch.randn(1, text + TOKENS, 24, generator=torch.Generator().manual_seed(seed))
    for timestep in TIMESTEPS:
        x = x + 0.1 * model(x, timestep=torch.tensor([timestep]))
    return x


def observe(model: nn.Module, config: CalibrationConfig, inputs: int = 3, text: int = 0) -> Plan:
    with calibatt_compiler.calibration(model, config) as run:
        for seed in range(inputs):
            name = f"{seed:05d}"
            if not run.has(name):
                with run.input(name):
                    sample(model, seed, text + seed if text else 0)
        return run.plan()


def flags(plan: Plan) -> list[list[bool]]:
    patterns = [site.at(step) for site in plan.sites.values() for step in range(plan.steps)]
    return [[] if p.repetitive is None else p.repetitive.tolist() for p in patterns]


@pytest.mark.parametrize("order", ["raster", "1x4x4"])
def test_heads_whose_rows_attend_alike_copy_them(model: Model, order: str, tmp_path: Path) -> None:
    config = replace(CONFIG, token_order=order)
    plan = observe(model, config)
    assert flags(plan) == [EVERY] * 6
    pattern = plan.sites["layers.0"].at(0)
    assert pattern.copies == AnchorRows(GRID, 3, 0, TokenOrder.parse(order))
    assert pattern.numpy_mask()[0].sum() == 3 * 11  # 2 x 3 x 7 tokens over all 11 key blocks
    without = observe(model, replace(config, gamma=None))
    assert flags(without) == [[]] * 6
    for site in plan.sites:
        for step in range(3):
            kept, others = plan.block_mask(site, step), without.block_mask(site, step)
            assert torch.equal(kept[1:], others[1:])
    assert plan.density() < without.density()
    assert plan.metadata.thresholds == {
        "A": 0.7,
        "C": 0.9,
        "k": 2.0,
        "rho": 0.5,
        "share_steps": 0.97,
        "gamma": 0.87,
        "anchor_rows": 3.0,
    }
    assert plan.metadata.quality["repetitive_heads"] == pytest.approx(1 / 3)
    assert "repetitive_heads" not in without.metadata.quality
    plan.save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan") == plan


@pytest.mark.slow
@pytest.mark.parametrize("order", ["raster", "1x4x4"])
def test_the_compiled_model_copies_them(model: Model, order: str) -> None:
    """All blocks are kept, so that nothing but copies can differ from dense attention."""
    plan = observe(model, replace(CONFIG, A=1.0, C=1.0, token_order=order), 1)
    assert flags(plan) == [EVERY] * 6
    assert plan.density() == pytest.approx((2 + 3 / 11) / 3)
    dense = sample(model, 5)
    compiled = copy.deepcopy(model)
    compiled.compile(backend="calibatt", fullgraph=True, options={"plan": plan})
    with torch.no_grad():
        torch.testing.assert_close(sample(compiled, 5), dense, rtol=1e-4, atol=1e-4)
    found = calibatt_compiler.summary(compiled)
    assert [row.sparse_calls for row in found.rows] == [3, 3]
    with torch.no_grad():  # rows that differ tell copies from dense attention
        for layer, other in zip(compiled.layers, model.layers, strict=True):
            assert isinstance(layer, Attention)
            assert isinstance(other, Attention)
            layer.mix = other.mix = 0.0
        assert not torch.allclose(sample(compiled, 5), sample(model, 5), atol=1e-2)


@pytest.mark.slow
def test_text_before_the_video_is_always_computed(model: Model) -> None:
    """With prompts of 21, 22 and 23 tokens; the plan is for the first."""
    config = replace(CONFIG, text="first", A=1.0, C=1.0)
    plan = observe(model, config, 3, text=21)
    assert flags(plan) == [EVERY] * 6
    pattern = plan.sites["layers.0"].at(0)
    assert pattern.copies == AnchorRows(GRID, 3, 21)
    assert pattern.numpy_mask()[0].sum() == 4 * 12  # 21 + 2 x 3 x 7 tokens
    dense = sample(model, 5, 21)
    compiled = copy.deepcopy(model)
    compiled.compile(backend="calibatt", fullgraph=True, options={"plan": plan})
    with torch.no_grad():
        torch.testing.assert_close(sample(compiled, 5, 21), dense, rtol=1e-4, atol=1e-4)
    assert [row.sparse_calls for row in calibatt_compiler.summary(compiled).rows] == [3, 3]


def test_the_first_inputs_are_scored_whatever_happens(model: Model, tmp_path: Path) -> None:
    config = replace(CONFIG, run_folder=tmp_path / "run", similarity_inputs=2)
    plan = observe(model, replace(CONFIG, similarity_inputs=2))
    observe(model, config, 1)
    assert observe(model, config, 3) == plan  # goes on with what is there
    store = RunStore(tmp_path / "run")
    assert [store.record(name).anchor_rows for name in store.names()] == [3, 3, 0]
    (tmp_path / "run" / "input-00001.safetensors").unlink()
    assert observe(model, config, 3) == plan
    assert RunStore(tmp_path / "run").record("00001").anchor_rows == 3
    assert plan.metadata.thresholds["anchor_rows"] == 3

    with pytest.raises(CalibrationError, match="something else"):
        observe(model, replace(config, anchor_rows=4))
    # Another gamma goes by the same scores.
    assert flags(observe(model, replace(config, gamma=1.0))) == [EVERY] * 6


def test_a_plan_is_made_again_with_or_without_repetition(model: Model, tmp_path: Path) -> None:
    config = replace(CONFIG, run_folder=tmp_path / "run", keep_energies=True)
    plan = observe(model, config)
    assert plan_from_run(tmp_path / "run", gamma=0.87) == plan
    assert flags(plan_from_run(tmp_path / "run")) == [[]] * 6
    assert flags(plan_from_run(tmp_path / "run", gamma=0.87, A=0.99, C=0.99)) == [EVERY] * 6
    # At a threshold where the mask of head 0 is sparser than its anchor rows, blocks are cheaper.
    sparse = plan_from_run(tmp_path / "run", gamma=0.87, A=0.05, C=0.05)
    assert flags(sparse) == [[]] * 6
    raised = plan_from_run(tmp_path / "run", gamma=0.87, A=0.05, C=0.05, raised={"layers.1": 0.9})
    assert flags(raised) == [[]] * 3 + [EVERY] * 3
    with pytest.raises(OptionError, match="gamma"):
        plan_from_run(tmp_path / "run", gamma=0.3)
    observe(model, replace(config, gamma=None, run_folder=tmp_path / "plain"), 1)
    with pytest.raises(CalibrationError, match="was scored"):
        plan_from_run(tmp_path / "plain", gamma=0.87)


def test_scores_do_not_wait_for_the_number_of_steps(model: Model, tmp_path: Path) -> None:
    """T is known only when the first input ends: its error follows from another mask's."""
    found = []
    for name, steps in (("known", 3), ("unknown", None)):
        config = replace(CONFIG, num_steps=steps, run_folder=tmp_path / name)
        assert flags(observe(model, config, 1)) == [EVERY] * 6
        store = RunStore(tmp_path / name)
        keys = [f"layers.{site}@{step}/repetition" for site in range(2) for step in range(3)]
        found.append(np.stack([store.tensor("00000", key) for key in keys]))
    known, unknown = found
    np.testing.assert_array_equal(known[:, :2], unknown[:, :2])
    np.testing.assert_allclose(known[:, 3], unknown[:, 3], rtol=1e-6)
    sparse = known[:, 2] > 0
    assert sparse[..., 0].all()
    ratio = unknown[:, 2][sparse] / known[:, 2][sparse]
    assert (ratio > 0.3).all()
    assert (ratio < 3).all()


def test_rows_that_differ_are_not_copied(model: Model) -> None:
    config = replace(CONFIG, gamma=0.5, anchor_rows=11)
    # 11 of 12 rows cost 10 of 11 rows of blocks: head 0 is still less dense than that.
    assert flags(observe(model, config, 1)) == [[]] * 6
    # No rows are left to copy; nothing is scored, and that is no error.
    assert flags(observe(model, replace(CONFIG, anchor_rows=12), 1)) == [[]] * 6


def test_validation_leaves_repetitive_heads_out(model: Model, tmp_path: Path) -> None:
    config = replace(CONFIG, run_folder=tmp_path / "run", keep_energies=True)
    plan = observe(model, config, 1)
    blocks = plan_from_run(tmp_path / "run")
    found, plain = (validate_run(tmp_path / "run", each) for each in (plan, blocks))
    assert (plain.repetitive, found.repetitive) == (0, 6)
    store = RunStore(tmp_path / "run")
    for site in found.sites:
        assert site.repetitive == 3
        for step, kept in zip(site.steps, site.kept, strict=True):
            energy = store.tensor("00000", f"{site.site}@{step}/energy")[0].astype(np.float64)
            mask = plan.block_mask(site.site, step).numpy()
            shares = (energy * mask).sum(-1) / energy.sum(-1)
            assert kept == pytest.approx(shares[1:].mean())
        assert site.worst_row > 0
    patterns = {
        name: [all_repetitive(site.at(step)) for step in range(3)]
        for name, site in plan.sites.items()
    }
    sites = {name: SitePatterns.share(p) for name, p in patterns.items()}
    about = plan.metadata
    whole = plan.with_sites(sites, thresholds=about.thresholds, quality=about.quality)
    nothing = validate_run(tmp_path / "run", whole)
    assert (nothing.sites, nothing.repetitive, nothing.mean) == ((), 18, 1.0)
    assert not nothing.flagged


def all_repetitive(pattern: BlockPattern) -> BlockPattern:
    """The same pattern with all its heads row-shared."""
    return BlockPattern.from_mask(
        torch.ones_like(pattern.mask()),
        query_length=TOKENS,
        key_length=TOKENS,
        block=(16, 16),
        repetitive=np.ones(3, np.bool_),
        copies=pattern.copies,
    )


@pytest.mark.slow
def test_one_digest_from_one_and_two_processes(
    tiny_wan_folder: Path, tiny_wan_arguments: dict[str, int], tmp_path: Path
) -> None:
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(tiny_wan_folder)
    with torch.no_grad():  # uniform attention: all rows attend alike
        pipe.transformer.blocks[1].attn1.norm_q.weight.zero_()
    pipe.save_pretrained(folder := tmp_path / "model")
    work = {
        "prompts": ["a big rabbit runs", "the bird flies", "a small bird"],
        "seeds": 1,
        "config": CalibrationConfig(block=(16, 16), gamma=0.6, anchor_rows=2, similarity_inputs=2),
        **tiny_wan_arguments,
        "num_inference_steps": 2,
    }
    both = {"out": tmp_path / "both", "meeting": tmp_path / "meeting", **work}
    ranks = [Calibration(folder, out=tmp_path / "alone", **work)]
    ranks += [Calibration(folder, rank=rank, **both) for rank in range(2)]
    printed = []
    for rank in ranks:
        code, written, said = rank.result()
        assert code == 0, said
        printed.append(written.split()[-2:])
    assert printed[0] == printed[1] == printed[2]
    assert float(printed[0][0]) >= 0.5
    store = RunStore(tmp_path / "both.calibration")
    assert [store.record(name).anchor_rows for name in store.names()] == [2, 2, 0]


def test_a_pipeline_is_scored_in_the_same_pass(
    tiny_wan_pipeline: Any, tiny_wan_arguments: dict[str, int]
) -> None:
    config = CalibrationConfig(block=(16, 16), gamma=0.87, anchor_rows=2)
    weight = tiny_wan_pipeline.transformer.blocks[1].attn1.norm_q.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.zero_()
        plan = calibrate(tiny_wan_pipeline, ["a tree"], config=config, **tiny_wan_arguments)
    finally:
        with torch.no_grad():
            weight.copy_(before)
    for step in range(plan.steps):
        local, uniform = (site.at(step).repetitive for site in plan.sites.values())
        assert local is None
        assert uniform is not None
        assert uniform.all()
