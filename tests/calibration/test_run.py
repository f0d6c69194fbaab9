"""Calibration of any module, end to end through the recording backend."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import calibatt_compiler
from calibatt_compiler.calibration import CalibrationConfig, plan_from_run
from calibatt_compiler.calibration.store.run_folder import RunStore
from calibatt_compiler.errors import CalibrationError, OptionError
from calibatt_compiler.plan import Plan, merge_intervals, share_steps
from calibatt_compiler.plan.order import RASTER, TokenOrder

TOKENS = 150
TIMESTEPS = (900.0, 500.0, 100.0)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        split = self.project(x).view(batch, length, 3, 2, 16).permute(2, 0, 3, 1, 4)
        out = scaled_dot_product_attention(3 * split[0], split[1], split[2])
        return out.transpose(1, 2).reshape(batch, length, 32)


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


CONFIG = CalibrationConfig(block=(32, 32), A=0.5, C=0.7, k=2.0)


def sample(model: nn.Module, seed: int, timesteps: tuple[float, ...] = TIMESTEPS) -> Tensor:
    x = torch.randn(1, TOKENS, 32, generator=torch.Generator().manual_seed(seed))
    for timestep in timesteps:
        x = x + 0.1 * model(x, timestep=torch.tensor([timestep]))
    return x


def observe(model: nn.Module, config: CalibrationConfig, inputs: int = 3) -> calibatt_compiler.Plan:
    with calibatt_compiler.calibration(model, config) as run:
        for seed in range(inputs):
            with run.input():
                sample(model, seed)
        return run.plan()


def test_a_module_is_calibrated_and_left_as_it_was(model: Model) -> None:
    before = sample(model, 9)
    plan = observe(model, CONFIG)
    assert list(plan.sites) == ["layers.0", "layers.1"]
    assert plan.timesteps == TIMESTEPS
    assert plan.grid == (1, 1, TOKENS)
    assert 0 < plan.density() < 1
    assert plan.metadata.thresholds == {
        "A": 0.5,
        "C": 0.7,
        "k": 2.0,
        "rho": 0.5,
        "share_steps": 0.97,
    }
    assert plan.metadata.inputs.count == 3
    assert plan.metadata.model is not None
    assert plan.metadata.model.class_name == "Model"
    assert plan.metadata.quality["input_kept_mass"] > 0.5
    assert "_compiled_call_impl" not in model.__dict__
    assert torch.equal(sample(model, 9), before)
    assert observe(model, CONFIG).digest == plan.digest


def test_a_compiled_module_stays_compiled_without_recompiles(model: Model) -> None:
    model.compile(backend="eager")
    compiled = model._compiled_call_impl
    sample(model, 0)
    observe(model, CONFIG, 1)
    assert model._compiled_call_impl is compiled
    with torch._dynamo.config.patch(error_on_recompile=True):
        sample(model, 0)


def test_more_agreement_and_lower_thresholds_are_sparser(model: Model, tmp_path: Path) -> None:
    config = CalibrationConfig(
        block=(32, 32), A=0.5, C=0.7, k=2.0, keep_energies=True, run_folder=tmp_path / "run"
    )
    with calibatt_compiler.calibration(model, config) as run:
        for seed in range(3):
            with run.input():
                sample(model, seed)
        plan, strict, loose = run.plan(), run.plan(rho=1), run.plan(rho=0.1)
        sparse = run.plan(A=0.2, C=0.2)
        assert run.plan(A=0.5).sites["layers.0"].at(1) is not None
    assert strict.density() < plan.density() < loose.density()
    assert sparse.density() < plan.density()
    assert sparse.metadata.thresholds == {
        "A": 0.2,
        "C": 0.2,
        "k": 2.0,
        "rho": 0.5,
        "share_steps": 0.97,
    }
    assert plan_from_run(tmp_path / "run") == plan
    assert plan_from_run(tmp_path / "run", A=0.2, C=0.2) == sparse
    assert plan_from_run(tmp_path / "run", rho=1) == strict
    again = plan_from_run(tmp_path / "run", A=0.5)
    for site in plan.sites:
        for step in range(3):
            assert torch.equal(again.block_mask(site, step), plan.block_mask(site, step))
    with pytest.raises(OptionError):
        plan_from_run(tmp_path / "run", A=2)
    with pytest.raises(CalibrationError, match="no calibration run"):
        plan_from_run(tmp_path / "nothing")


def test_steps_are_shared_and_intervals_merged_on_every_way_to_a_plan(
    model: Model, tmp_path: Path
) -> None:
    settings = {"share_steps": 0.6, "merge_budget": 0.1}
    config = replace(CONFIG, block=(16, 16), run_folder=tmp_path / "run")
    plain = observe(model, config)
    refined = observe(model, replace(config, **settings))
    for site in plain.sites:
        for step in range(plain.steps):
            assert not (plain.block_mask(site, step) & ~refined.block_mask(site, step)).any()
    thresholds, quality = refined.metadata.thresholds, refined.metadata.quality
    assert {name: thresholds[name] for name in settings} == settings
    added = quality["share_steps_added_density"] + quality["merge_added_density"]
    assert added == pytest.approx(refined.density() - plain.density(), abs=1e-12)
    assert quality["share_steps_added_density"] > 0
    assert quality["merge_added_density"] > 0
    assert plan_from_run(tmp_path / "run", **settings) == refined  # type: ignore[arg-type]
    assert merge_intervals(share_steps(plain, 0.6), 0.1) == refined


def test_other_thresholds_need_energies(model: Model) -> None:
    with calibatt_compiler.calibration(model, CONFIG) as run:
        with run.input():
            sample(model, 0)
        with pytest.raises(CalibrationError, match="not kept"):
            run.plan(A=0.3)
        with pytest.raises(OptionError):
            run.plan(rho=7)


def test_an_interrupted_run_goes_on(model: Model, tmp_path: Path) -> None:
    config = CalibrationConfig(block=(32, 32), A=0.5, C=0.7, k=2, run_folder=tmp_path / "run")
    undisturbed = observe(model, CONFIG)

    def interrupted() -> None:
        with calibatt_compiler.calibration(model, config) as run:
            with run.input():
                sample(model, 0)
            with run.input():
                sample(model, 1, TIMESTEPS[:1])
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    calls = 0
    with calibatt_compiler.calibration(model, config) as run:
        assert run.finished == ("00000",)
        for seed in range(3):
            if run.has(f"{seed:05d}"):
                continue
            calls += 1
            with run.input(f"{seed:05d}"):
                sample(model, seed)
        assert run.plan() == undisturbed
    assert calls == 2


def test_trained_weights_are_another_run(model: Model, tmp_path: Path) -> None:
    config = CalibrationConfig(block=(32, 32), run_folder=tmp_path / "run")
    observe(model, config, 1)
    with torch.no_grad():
        model.layers[1].project.bias[5] += 1
    with pytest.raises(CalibrationError, match="weights"):
        observe(model, config, 1)


def test_misuse_is_explained(model: Model) -> None:
    with calibatt_compiler.calibration(model, CONFIG) as run:
        with pytest.raises(CalibrationError, match="at least one finished input"):
            run.plan()
        with run.input():
            with pytest.raises(CalibrationError, match="within another"), run.input():
                pass
            sample(model, 0)
        with pytest.raises(CalibrationError, match="no attention call"), run.input():
            pass
        with pytest.raises(CalibrationError, match="not finite"), run.input():
            model(torch.full((1, TOKENS, 32), torch.nan), timestep=torch.tensor([900.0]))
        with pytest.raises(CalibrationError, match="other timesteps"), run.input():
            sample(model, 1, (800.0,))
        assert run.finished == ("00000",)
        with (
            pytest.raises(CalibrationError, match="was something else"),
            run.input("00000", about={"other": 1}),
        ):
            pass


def test_branches_can_be_told(model: Model) -> None:
    alone = observe(model, CONFIG, 1)
    with calibatt_compiler.calibration(model, CONFIG) as run, run.input():
        x = torch.randn(1, TOKENS, 32, generator=torch.Generator().manual_seed(0))
        for timestep in TIMESTEPS:
            t = torch.tensor([timestep])
            with run.branch("unconditional"):
                model(torch.zeros_like(x), timestep=t)
            with run.branch("conditional"):
                x = x + 0.1 * model(x, timestep=t)
        inside = run
    assert inside.config is CONFIG
    with calibatt_compiler.calibration(model, CONFIG) as run:
        with run.input():
            x = torch.randn(1, TOKENS, 32, generator=torch.Generator().manual_seed(0))
            for timestep in TIMESTEPS:
                with run.branch("batched"):
                    both = torch.cat([torch.zeros_like(x), x])
                    x = x + 0.1 * model(both, timestep=torch.tensor([timestep] * 2))[1:]
        plan = run.plan()
    for site in alone.sites:
        assert torch.equal(plan.block_mask(site, 0), alone.block_mask(site, 0))


class Near(nn.Module):
    """Attends to tokens that are near in a frame, along its height as much as along its width."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = torch.meshgrid(torch.arange(12.0), torch.arange(16.0), indexing="ij")
        place = torch.stack([height, width], -1).reshape(1, 1, 192, 2)
        # exp(-|a - b|^2 / 2) of places, as a product of vectors.
        ones, square = torch.ones_like(place[..., :1]), place.square().sum(-1, keepdim=True) / 2
        q, k = torch.cat([place, ones], -1), torch.cat([place, -square], -1)
        noise = x.view(1, 192, 1, -1).transpose(1, 2)
        zeros = torch.zeros_like(noise[..., :5])
        q, k = (torch.cat([y, zeros], -1) for y in (q, k))
        out = scaled_dot_product_attention(q, k, noise[..., :8], scale=1.0)
        return out.transpose(1, 2).reshape(1, 192, 8)


class Neighbours(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Near()

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.attention(x + 0 * timestep)


def test_tiles_of_tokens_need_fewer_blocks_and_what_is_kept_is_the_same_share() -> None:
    model = Neighbours()
    config = CalibrationConfig(
        block=(16, 16), A=0.9, C=0.9, k=1.0, grid=(1, 12, 16), keep_energies=True
    )
    plans, masses = {}, {}
    for order in ("raster", "1x4x4"):
        with calibatt_compiler.calibration(model, replace(config, token_order=order)) as run:
            with run.input():
                for timestep in TIMESTEPS:
                    x = torch.randn(1, 192, 8, generator=torch.Generator().manual_seed(0))
                    model(x, timestep=torch.tensor([timestep]))
            plans[order] = run.plan()
        masses[order] = plans[order].metadata.quality["input_kept_mass"]
        assert str(plans[order].token_order) == order
    assert plans["1x4x4"].density() < 0.9 * plans["raster"].density()
    assert all(mass >= 0.9 for mass in masses.values())
    # The plan's tokens are those of the recording: compiled, it is close to dense attention.
    x = torch.randn(1, 192, 8, generator=torch.Generator().manual_seed(1))
    timestep = torch.tensor([TIMESTEPS[0]])
    dense = model(x, timestep=timestep)
    errors = []
    for order in (TokenOrder((1, 4, 4)), RASTER):
        plan = plans["1x4x4"]
        made = Plan.create(
            plan.sites,
            grid=plan.grid,
            sampler=plan.metadata.sampler,
            token_order=order,
            fixed_by=plan.metadata.fixed_by,
        )
        options = {"plan": made, "lowering": "reference"}
        sparse = torch.compile(model, backend="calibatt", options=options)(x, timestep=timestep)
        errors.append(((sparse - dense).norm() / dense.norm()).item())
    assert 0 < errors[0] < 0.4
    assert errors[1] > 2 * errors[0]


@pytest.mark.slow
def test_dropped_blocks_are_pooled_where_it_is_asked_for(model: Model, tmp_path: Path) -> None:
    config = replace(CONFIG, pooled=2, run_folder=tmp_path / "run")
    plan = observe(model, config)
    assert all(site.patterns[0].pooled == 2 for site in plan.sites.values())
    assert plan_from_run(tmp_path / "run", pooled=2) == plan
    plain = plan_from_run(tmp_path / "run")
    assert plain.density() == plan.density()
    x = torch.randn(1, TOKENS, 32, generator=torch.Generator().manual_seed(0))
    timestep = torch.tensor([TIMESTEPS[0]])
    errors = []
    with torch.no_grad():
        dense = model(x, timestep=timestep)
        for made in (plan, plain):
            compiled = torch.compile(model, backend="calibatt", options={"plan": made})
            errors.append((compiled(x, timestep=timestep) - dense).norm().item())
    assert errors[0] < errors[1]


def test_energies_of_some_queries_give_much_the_same_masks(model: Model, tmp_path: Path) -> None:
    plans, energies = [], []
    for every in (1, 4):
        folder = tmp_path / f"{every}"
        config = replace(CONFIG, keep_energies=True, queries=every, run_folder=folder)
        plans.append(observe(model, config))
        store = RunStore(folder)
        energies.append(store.energy(store.record(store.names()[0]), "layers.0", 0))
    assert abs(plans[0].density() - plans[1].density()) < 0.05
    assert plans[0] != plans[1]
    # The first layer sees the same operands in both runs: the means differ, but not by much.
    assert 0 < abs(energies[0] - energies[1]).max() < 0.2
    assert abs(energies[1].sum(-1) - 1).max() < 1e-5
    with pytest.raises(CalibrationError, match="something else"):
        observe(model, replace(CONFIG, keep_energies=True, run_folder=tmp_path / "4"))


@pytest.mark.parametrize(
    "settings",
    [
        {"pooled": 3},
        {"pooled": -1},
        {"token_order": "2x2"},
        {"token_order": None},
        {"queries": 0},
        {"queries": 5},
    ],
)
def test_forms_that_can_not_be_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(OptionError, match=next(iter(settings))):
        replace(CONFIG, **settings)  # type: ignore[arg-type]
