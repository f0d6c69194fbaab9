"""The output error of a plan of zones on held-out inputs: figures, flags, and raised plans."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from zone_patterns import CASES, zone_pattern

import calibatt_compiler
from calibatt_compiler import Plan
from calibatt_compiler.calibration import (
    CalibrationConfig,
    calibrate,
    validate_run,
    zone_plan_from_run,
)
from calibatt_compiler.calibration.store.run_folder import RunStore
from calibatt_compiler.calibration.validation.measures import measure_of
from calibatt_compiler.calibration.validation.output_error import (
    OutputError,
    SiteZoneValidation,
    ZoneValidation,
    row_variance,
)
from calibatt_compiler.cli.app import run
from calibatt_compiler.errors import CalibrationError, OptionError
from calibatt_compiler.plan.zones.drawing import UNIT

Floats = npt.NDArray[np.float64]
TIMESTEPS = (900.0, 700.0, 500.0, 300.0, 100.0)
CONFIG = CalibrationConfig(
    block=(16, 16), form="zones", density=0.2, step_groups=2, num_steps=len(TIMESTEPS)
)


class Model(nn.Module):
    """Two attention layers whose tokens attend to those near them, or to others by a shift."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return sum((layer(x) for layer in self.layers), x) * (1 + timestep.view(-1, 1, 1) / 1000)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(32, 96)
        self.shift = 0

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        split = self.project(x).view(batch, length, 3, 2, 16).permute(2, 0, 3, 1, 4)
        place = torch.linspace(0, 6, length)[:, None] * torch.linspace(1, 2, 8)
        near = 2 * torch.cat([place.cos(), place.sin()], -1)
        to = near.roll(self.shift, 0)
        out = scaled_dot_product_attention(split[0] + near, split[1] + to, split[2])
        return out.transpose(1, 2).reshape(batch, length, 32)


def observed(folder: Path, seeds: range, *, shift: int = 0, **settings: Any) -> Plan:
    """Plan of a run over inputs; `shift` moves what the second layer attends to."""
    torch.manual_seed(0)
    model = Model().eval()
    model.layers[1].shift = shift
    config = replace(CONFIG, run_folder=folder, **settings)
    with calibatt_compiler.calibration(model, config) as under_way:
        for seed in seeds:
            with under_way.input(f"{seed:05d}"):
                x = torch.randn(1, 250, 32, generator=torch.Generator().manual_seed(seed))
                for timestep in TIMESTEPS:
                    x = 0.9 * x + 0.1 * model(x, timestep=torch.tensor([timestep]))
        return under_way.plan()


ENERGIES = {"form": None, "density": None, "step_groups": 5, "keep_energies": True}
"""Settings of a run that keeps energies instead of sums."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs for zones, on other inputs, with energies of those, and on other attention."""
    folder = tmp_path_factory.mktemp("zones")
    observed(folder / "plan.calibatt.calibration", range(3)).save(folder / "plan.calibatt")
    observed(folder / "other", range(10, 12))
    observed(folder / "energies", range(10, 12), **ENERGIES)
    observed(folder / "shifted", range(10, 12), shift=2)
    return folder


@pytest.fixture
def plan(runs: Path) -> Plan:
    return Plan.load(runs / "plan.calibatt")


def reference_variance(energy: Floats, octaves: npt.NDArray[Any]) -> float:
    """Relative variance of one row."""
    total = math.fsum(energy.tolist())
    if not total:
        return 0.0
    pairs = zip(energy.tolist(), octaves.tolist(), strict=True)
    return math.fsum((e / total) ** 2 * (2**k - 1) for e, k in pairs)


@pytest.mark.parametrize("text", ["none", "dense_first", "dense_last"])
def test_figures_are_those_of_the_definition(text: str) -> None:
    generator = np.random.default_rng(len(text))
    grid, length = (2, 5, 10), 137 if text != "none" else 100
    blocks = -(-length // 16)
    octaves = generator.integers(0, 8, (2, 3, blocks, blocks))
    octaves[..., range(blocks), generator.integers(0, blocks, blocks)] = 0
    edge = {"none": slice(0, 0), "dense_first": slice(0, 3), "dense_last": slice(6, blocks)}[text]
    octaves[..., edge, :] = octaves[..., edge] = 0
    for row in range(blocks):
        octaves[..., row, 4] = 0
    plan = Plan.from_zones(
        {"a": torch.from_numpy(octaves)}, grid, (9.0, 5.0, 1.0), (16, 16), groups=(0, 1, 1),
        lengths={"a": (length, length)}, text=text,  # type: ignore[arg-type]
    )  # fmt: skip
    zones = plan.sites["a"].zones
    assert zones is not None
    lengths = (length, 100 + 45 if text != "none" else length)
    lengths = (lengths[1], lengths[1])
    inputs, shape = 4, (3, -(-lengths[0] // 16), -(-lengths[1] // 16))
    measure, sums = measure_of(plan), measure_of(plan)
    assert isinstance(measure, OutputError)
    assert isinstance(sums, OutputError)
    rows = np.empty((3, inputs, *shape[:2]))
    for step, timestep in enumerate(plan.timesteps):
        pattern = zones.zones[zones.groups[step]]
        known = (pattern if text == "none" else pattern.with_lengths(*lengths)).map_octaves()
        energy = generator.random((inputs, *shape)) ** 8
        energy[0, 0, 0] = 0
        for index in np.ndindex(inputs, *shape[:2]):
            rows[(step, *index)] = reference_variance(energy[index], known[index[1:]])
        share = energy / energy.sum(-1, keepdims=True).clip(1e-300)
        inner = pattern if text == "none" else pattern.with_lengths(*lengths)
        squares = (share**2).mean(0)[:, slice(*inner.rows), slice(*inner.columns)]
        sums.add_squares("a", (timestep,), squares, lengths)
        # Two calls, the second of them with the votes of three inputs.
        for part in (slice(0, 1), slice(1, 4)):
            measure.add("a", timestep, torch.from_numpy(energy[part]), step, 3, lengths)
    found = measure.result(inputs=inputs, digest="others", margin=0.25)
    (site,) = found.sites
    assert site.errors == pytest.approx(np.sqrt(rows.mean((1, 2, 3))), rel=1e-12)
    assert site.error == pytest.approx(math.sqrt(rows.mean()), rel=1e-12)
    assert site.worst_input == pytest.approx(math.sqrt(rows.mean((2, 3)).max()), rel=1e-12)
    assert site.worst_head == pytest.approx(math.sqrt(rows.mean((1, 3)).max()), rel=1e-12)
    assert site.worst_row == pytest.approx(math.sqrt(rows.max()), rel=1e-12)
    assert site.worst_step == rows.mean((1, 2, 3)).argmax()
    assert found.error == site.error
    (summed,) = sums.result(inputs=inputs, digest="others", margin=0.25).sites
    assert summed.errors == pytest.approx(site.errors, rel=1e-12)
    assert summed.worst_head == pytest.approx(site.worst_head, rel=1e-12)
    # Zones of the user's own expect nothing.
    assert site.expected is None
    assert not found.flagged
    assert found.held_out


@pytest.mark.parametrize("name", [*CASES])
def test_the_draw_has_the_variance_that_is_said_of_it(name: str) -> None:
    zones = zone_pattern(name)
    shape = (zones.heads, zones.query_blocks, zones.key_blocks)
    energy = torch.rand(1, *shape, generator=torch.Generator().manual_seed(1)).double() ** 6
    share = energy[0] / energy[0].sum(-1, keepdim=True)
    total, mean = torch.zeros(shape[:2]).double(), torch.zeros(shape).double()
    for step in range(UNIT):
        drawn = zones.draw(step)
        weight = torch.from_numpy(np.exp(drawn.log_weights())).round() * drawn.mask()
        total += (share * (weight - 1)).square().sum(-1)
        mean += weight
    octaves = torch.from_numpy(zones.map_octaves())
    assert torch.allclose(total / UNIT, row_variance(energy, octaves)[0], rtol=1e-12, atol=0)
    assert (mean == UNIT).all()


def test_a_plan_has_the_error_that_it_expected_on_its_own_inputs(runs: Path, plan: Plan) -> None:
    own = validate_run(runs / "plan.calibatt.calibration", plan, margin=0)
    assert isinstance(own, ZoneValidation)
    assert not own.held_out
    assert own.inputs == 3
    for site in own.sites:
        assert site.expected == pytest.approx(site.error, abs=1e-6)
        assert site.worst_input is site.worst_row is None
    assert own.error == pytest.approx(plan.metadata.quality["expected_error"], abs=1e-6)


def test_sums_say_what_energies_say_of_each_step_group(runs: Path, plan: Plan) -> None:
    sums, energies = (validate_run(runs / name, plan) for name in ("other", "energies"))
    assert isinstance(sums, ZoneValidation)
    assert isinstance(energies, ZoneValidation)
    store = RunStore(runs / "energies")
    for one, two in zip(sums.sites, energies.sites, strict=True):
        zones = plan.sites[one.site].zones
        assert zones is not None
        rows = np.array(
            [
                row_variance(
                    torch.from_numpy(store.energy(store.record(name), one.site, step)),
                    torch.from_numpy(zones.zones[group].map_octaves()),
                )[0].numpy()
                for step, group in enumerate(zones.groups)
                for name in store.names()
            ]
        ).reshape(5, 2, 2, -1)
        assert two.errors == pytest.approx(np.sqrt(rows.mean((1, 2, 3))), rel=1e-9)
        assert two.worst_row == pytest.approx(math.sqrt(rows.max()), rel=1e-9)
        assert two.error == pytest.approx(one.error, rel=1e-5)
        by_group = [rows[:3].mean((0, 1, 3)), rows[3:].mean((0, 1, 3))]
        said = [*[math.sqrt(by_group[0].mean())] * 3, *[math.sqrt(by_group[1].mean())] * 2]
        assert one.errors == pytest.approx(said, rel=1e-5)
        assert one.worst_head == pytest.approx(math.sqrt(np.max(by_group)), rel=1e-5)
        assert one.expected == two.expected == plan.metadata.quality[f"expected_error:{one.site}"]
    assert not sums.flagged
    assert not energies.flagged


def test_other_attention_is_flagged_and_raising_mends_it(runs: Path, plan: Plan) -> None:
    own = runs / "plan.calibatt.calibration"
    first = validate_run(runs / "shifted", plan)
    assert [site.site for site in first.flagged] == ["layers.1"]
    factors = first.raised()
    assert first.sites[1].expected is not None
    ratio = first.sites[1].error / first.sites[1].expected
    assert factors == {"layers.1": round(ratio**2, 6)}
    price = plan.metadata.thresholds["price"]
    raised = zone_plan_from_run(own, price=price, raised=factors)
    assert raised.digest == zone_plan_from_run(own, density=0.2, raised=factors).digest
    assert raised.metadata.thresholds == {
        "price": price, "numbers": 2048.0, "step_groups": 2.0,
        "raised:layers.1": factors["layers.1"],
    }  # fmt: skip
    assert raised.density("layers.1") > plan.density("layers.1")
    assert raised.sites["layers.0"].digests == plan.sites["layers.0"].digests
    # It is held to what the plan before promised; of its own inputs it expects less.
    assert [site.expected for site in validate_run(own, raised).sites] == [
        site.expected for site in first.sites
    ]
    error = raised.metadata.quality["expected_error"]
    assert error == pytest.approx(validate_run(own, raised).error, abs=1e-6)
    assert error < plan.metadata.quality["expected_error"]
    second = validate_run(runs / "shifted", raised)
    assert second.sites[0] == first.sites[0]
    assert second.sites[1].error < first.sites[1].error
    assert not second.flagged


def test_the_budget_of_one_site_does_not_change_with_the_error_of_another(runs: Path) -> None:
    own = runs / "plan.calibatt.calibration"
    for numbers in (8, 16, 40):
        plan = zone_plan_from_run(own, density=0.3, numbers=numbers)
        for factor in (1.0, 1.3, 4.0, 50.0):
            raised = zone_plan_from_run(
                own, density=0.3, numbers=numbers, raised={"layers.1": factor}
            )
            assert raised.sites["layers.0"].digests == plan.sites["layers.0"].digests
            assert raised.density("layers.1") >= plan.density("layers.1")
            if factor == 1:
                assert raised.sites["layers.1"].digests == plan.sites["layers.1"].digests


def test_a_run_under_way_raises_errors_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Model().eval()
    with calibatt_compiler.calibration(model, replace(CONFIG, run_folder=tmp_path)) as under_way:
        with under_way.input():
            for timestep in TIMESTEPS:
                model(torch.ones(1, 250, 32), timestep=torch.tensor([timestep]))
        raised = under_way.plan(raised={"layers.0": 3.0})
        assert raised == zone_plan_from_run(tmp_path, density=0.2, raised={"layers.0": 3.0})
        assert raised.density("layers.0") > under_way.plan().density("layers.0")


def test_the_pipeline_and_its_stored_energies_say_the_same(
    tiny_wan_pipeline: Any, tiny_wan_arguments: dict[str, int], tmp_path: Path
) -> None:
    pipe, held_out = tiny_wan_pipeline, ["the bird flies", "a tree"]
    config = CalibrationConfig(block=(16, 16), form="zones")
    plan = calibrate(pipe, ["a rabbit"], 1, config=config, **tiny_wan_arguments)
    folder = tmp_path / "run"
    config = CalibrationConfig(block=(16, 16), keep_energies=True, run_folder=folder)
    calibrate(pipe, held_out, 50, config=config, **tiny_wan_arguments)
    live = calibatt_compiler.validate(pipe, plan, held_out, 50, **tiny_wan_arguments)
    assert isinstance(live, ZoneValidation)
    assert live == validate_run(folder, plan)
    assert live.margin == 0.25
    assert live.held_out
    assert all(site.expected for site in live.sites)
    own = calibatt_compiler.validate(pipe, plan, ["a rabbit"], 1, **tiny_wan_arguments)
    assert not own.held_out
    assert not own.flagged


def test_inspect_validates_zones_and_raises_them(
    runs: Path, plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    file, shifted, out = runs / "plan.calibatt", runs / "shifted", runs / "raised.calibatt"
    expected = validate_run(shifted, plan)
    arguments = ["inspect", str(file), "--validate", str(shifted)]
    assert run([*arguments, "--json", "--raise", str(out)]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["validation"] == json.loads(json.dumps(expected.to_dict()))
    assert "energies of 1 sites raised" in printed.err
    own = runs / "plan.calibatt.calibration"
    assert Plan.load(out) == zone_plan_from_run(own, density=0.2, raised=expected.raised())
    assert run(arguments) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "1 of 2 sites do not generalise" in words
    assert "measured on sums" in words
    assert "error expected" in words
    assert "expected_error:" not in words
    # Raised again, the factors multiply.
    (runs / "raised.calibatt.calibration").symlink_to(own)
    twice = runs / "twice.calibatt"
    again = ["inspect", str(out), "--validate", str(runs / "shifted"), "--margin", "0"]
    found = validate_run(shifted, out, margin=0)
    assert run([*again, "--raise", str(twice)]) == 0
    if found.flagged:
        before = Plan.load(out).metadata.thresholds
        for name, factor in found.raised().items():
            both = factor * before.get(f"raised:{name}", 1.0)
            assert Plan.load(twice).metadata.thresholds[f"raised:{name}"] == both
    energies = ["inspect", str(file), "--validate", str(runs / "energies")]
    assert run(energies) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "every site has the error expected of it within 0.25 of it" in words
    assert run([*energies, "--margin", "-1"]) == 2


def test_the_margin_is_a_share_of_the_expected_error(runs: Path, plan: Plan) -> None:
    ratio = validate_run(runs / "shifted", plan).sites[1].ratio
    assert not validate_run(runs / "shifted", plan, margin=ratio - 1 + 1e-9).flagged
    assert validate_run(runs / "shifted", plan, margin=ratio - 1 - 1e-9).flagged
    for wrong in (-0.1, math.inf, math.nan, True, "0.1"):
        with pytest.raises(OptionError, match="margin"):
            validate_run(runs / "shifted", plan, margin=wrong)  # type: ignore[arg-type]
    none = SiteZoneValidation("a", (0,), (0.0,), 0.0, None, 0.0, None)
    assert none.ratio == 1
    assert replace(none, errors=(1e-3,)).ratio == pytest.approx(1e3)


def mixed(runs: Path) -> Iterator[Any]:
    """Two plans of one form, and their sites in one."""
    zones = Plan.load(runs / "plan.calibatt")
    mask = torch.ones(5, 2, 16, 16, dtype=torch.bool)
    masks = Plan.from_masks(
        dict.fromkeys(zones.sites, mask), zones.grid, zones.timesteps, (16, 16),
        lengths=dict.fromkeys(zones.sites, (250, 250)),
    )  # fmt: skip
    yield masks
    sites = {"layers.0": zones.sites["layers.0"], "layers.1": masks.sites["layers.1"]}
    yield Plan.create(sites, grid=zones.grid, sampler=zones.metadata.sampler)


def test_what_can_not_be_judged_is_refused(runs: Path) -> None:
    masks, both = mixed(runs)
    with pytest.raises(CalibrationError, match="can't judge masks"):
        validate_run(runs / "other", masks)
    with pytest.raises(CalibrationError, match="can't be judged together"):
        validate_run(runs / "energies", both)
    own = runs / "plan.calibatt.calibration"
    wrong = ({"elsewhere": 2.0}, {"layers.0": 0.5}, {"layers.0": math.inf}, {"layers.0": math.nan})
    for raised, asked in itertools.product(wrong, ({"density": 0.2}, {"price": 1e-3})):
        with pytest.raises(OptionError, match="raised"):
            zone_plan_from_run(own, raised=raised, **asked)
    for price in (0.0, -1.0, math.inf):
        with pytest.raises(OptionError, match="price"):
            zone_plan_from_run(own, price=price)
    with pytest.raises(OptionError, match="what a plan is to be"):
        zone_plan_from_run(own, price=1e-3, density=0.2)
