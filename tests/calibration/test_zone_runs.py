"""Plans of zones from calibration: recorded, killed, resumed, by several ranks."""

from __future__ import annotations

import math
import tracemalloc
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import Calibration
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import calibatt_compiler
from calibatt_compiler.calibration import (
    CalibrationConfig,
    calibrate,
    estimate,
    plan_from_run,
    zone_plan_from_run,
)
from calibatt_compiler.calibration.cost import zones
from calibatt_compiler.calibration.select.zones.price import ZonePricing, ZoneSource
from calibatt_compiler.calibration.select.zones.site import group_of
from calibatt_compiler.calibration.store.run_folder import RunStore
from calibatt_compiler.calibration.store.zone_sums import (
    SQUARE_UNITS,
    GroupSums,
    ZoneSums,
    bytes_of_sums,
    units,
)
from calibatt_compiler.calibration.zone_target import ZoneTarget
from calibatt_compiler.errors import CalibrationError, OptionError
from calibatt_compiler.plan import Plan
from calibatt_compiler.plan.zones.drawing import seed_of

TIMESTEPS = (900.0, 700.0, 500.0, 300.0, 100.0)
CONFIG = CalibrationConfig(
    block=(16, 16), form="zones", density=0.4, step_groups=2, num_steps=len(TIMESTEPS)
)


class Model(nn.Module):
    """Two attention layers; tokens attend to those near them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x) * (1 + timestep.view(-1, 1, 1) / 1000)
        return x


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        split = self.project(x).view(batch, length, 3, 2, 16).permute(2, 0, 3, 1, 4)
        place = torch.linspace(0, 6, length)[:, None] * torch.linspace(1, 2, 8)
        near = 2 * torch.cat([place.cos(), place.sin()], -1)
        out = scaled_dot_product_attention(split[0] + near, split[1] + near, split[2])
        return out.transpose(1, 2).reshape(batch, length, 32)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def sample(model: nn.Module, seed: int) -> None:
    x = torch.randn(1, 250, 32, generator=torch.Generator().manual_seed(seed))
    for timestep in TIMESTEPS:
        x = x + 0.1 * model(x, timestep=torch.tensor([timestep]))


def observe(model: nn.Module, config: CalibrationConfig, seeds: Any = range(3)) -> Plan:
    with calibatt_compiler.calibration(model, config) as run:
        for seed in seeds:
            with run.input(f"{seed:05d}"):
                sample(model, seed)
        return run.plan()


def test_a_run_for_zones_makes_a_plan_of_zones(model: Model, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    plan = observe(model, replace(CONFIG, run_folder=folder))
    assert plan.metadata.requires == ("zones",)
    assert plan.density() == pytest.approx(0.4, abs=0.03)
    assert plan.metadata.thresholds["density"] == 0.4
    assert plan.metadata.quality["expected_error"] > 0
    assert plan.metadata.inputs.count == 3
    for index, site in enumerate(plan.sites.values()):
        zones = site.zones
        assert zones is not None
        assert zones.groups == (0, 0, 0, 1, 1)
        assert zones.common.seed == seed_of(index)
        assert site.steps == (0, 1, 2, 3, 4)
        masks = [plan.block_mask("layers.0", step) for step in range(3)]
        assert not torch.equal(masks[0], masks[1]), "steps of a group draw their own"
    denser = zone_plan_from_run(folder, density=0.7)
    assert denser.density() == pytest.approx(0.7, abs=0.03)
    exact = zone_plan_from_run(folder, error=0.05)
    assert exact.metadata.quality["expected_error"] == pytest.approx(0.05, rel=0.02)
    faster = zone_plan_from_run(folder, speed_up=1.5, attention_share=0.8)
    assert faster.density() == pytest.approx(1 - (1 - 1 / 1.5) / 0.8, abs=0.03)
    few = zone_plan_from_run(folder, density=0.4, numbers=16)
    assert all(
        zones.numbers.sum() <= 16
        for site in few.sites.values()
        if site.zones is not None
        for zones in site.zones.zones
    )
    with pytest.raises(CalibrationError, match="no masks"):
        plan_from_run(folder)


def test_sums_are_the_energies_that_a_run_for_masks_keeps(model: Model, tmp_path: Path) -> None:
    zones, masks = tmp_path / "zones", tmp_path / "masks"
    plan = observe(model, replace(CONFIG, run_folder=zones))
    kept = CalibrationConfig(
        block=(16, 16), keep_energies=True, num_steps=len(TIMESTEPS), run_folder=masks
    )
    observe(model, kept)
    store = RunStore(masks)
    records = [store.record(name) for name in store.names()]
    groups = [group_of(position, 5, 2) for position in records[0].positions]
    for site in plan.sites:
        for group in (0, 1):
            squares = [
                store.energy(record, site, step).astype(np.float64) ** 2
                for record in records
                for step in range(5)
                if groups[step] == group
            ]
            found = ZoneSums(zones).mean_squares(site, group, store.names())
            assert np.abs(found - np.concatenate(squares).mean(0)).max() <= 1 / SQUARE_UNITS
    again = zone_plan_from_run(masks, density=0.4, step_groups=2)
    for name, site in plan.sites.items():
        other = again.sites[name].zones
        assert site.zones is not None
        assert other is not None
        for one, two in zip(site.zones.zones, other.zones, strict=True):
            assert (one.map_octaves() != two.map_octaves()).mean() < 0.01


def observe_second(model: nn.Module, config: CalibrationConfig, *, fail: bool) -> None:
    with calibatt_compiler.calibration(model, config) as run:
        with run.input("00000"):
            pass
        with run.input("00001"):
            sample(model, 1)
            if fail:
                raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["within an input", "between two sites", "before the record"])
def test_a_killed_run_goes_on_to_the_same_plan(
    model: Model, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = observe(model, replace(CONFIG, run_folder=tmp_path / "whole"))
    config = replace(CONFIG, run_folder=tmp_path / "killed")
    observe(model, config, [0])
    add, write = ZoneSums.add, RunStore.write

    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def dies_at_the_second(self: ZoneSums, name: str, site: str, groups: Any) -> None:
        if site == "layers.1":
            raise KeyboardInterrupt
        add(self, name, site, groups)

    with monkeypatch.context() as patch:
        if where == "between two sites":
            patch.setattr(ZoneSums, "add", dies_at_the_second)
        elif where == "before the record":
            patch.setattr(RunStore, "write", dies)
        with pytest.raises(KeyboardInterrupt):
            observe_second(model, config, fail=where == "within an input")
    assert RunStore.write is write
    if where != "within an input":
        with pytest.raises(CalibrationError, match="of other inputs") as caught:
            zone_plan_from_run(tmp_path / "killed", density=0.4)
        assert "run the same calibration again" in str(caught.value)
    assert observe(model, config).digest == plan.digest


def test_the_share_of_ranks_changes_nothing(tmp_path: Path) -> None:
    energy = torch.rand(6, 2, 5, 7, generator=torch.Generator().manual_seed(0)) ** 4
    energy[..., 3] *= 1e-5

    def sums(vote: int) -> dict[int, GroupSums]:
        return {3: GroupSums(units(energy[vote : vote + 1]).numpy(), 1)}

    alone, one, two = ZoneSums(tmp_path / "a"), *(ZoneSums(tmp_path / "b", rank) for rank in (0, 1))
    names = [f"{vote:05d}" for vote in range(6)]
    for vote, name in enumerate(names):
        alone.add(name, "blocks.0", sums(vote))
    for vote in (5, 1, 3):
        two.add(names[vote], "blocks.0", sums(vote))
    for vote in (4, 0, 2):
        one.add(names[vote], "blocks.0", sums(vote))
    one.add(names[3], "blocks.0", sums(3))  # it was added by another rank
    found = [some.mean_squares("blocks.0", 3, names) for some in (alone, one)]
    assert np.array_equal(*found)
    exact = (energy.double() ** 2).mean(0).numpy()
    assert np.abs(found[0] - exact).max() <= 1 / SQUARE_UNITS
    with pytest.raises(CalibrationError, match="of other inputs"):
        one.mean_squares("blocks.0", 3, names[:5])


def test_large_sums_are_kept_whole_and_small_ones_take_little(tmp_path: Path) -> None:
    """Of all widths that the upper bytes of a sum can have, each in a file of its own."""
    for bits, size in ((32, 4), (33, 5), (40, 5), (41, 6), (48, 6), (49, 8), (62, 8)):
        squares = np.arange(6000, dtype=np.int64).reshape(2, 50, 60)
        squares[1, 49, 59] = (1 << bits) - 1
        sums = ZoneSums(tmp_path / str(bits))
        sums.add("a", "site", {0: GroupSums(squares, 7)})
        found = sums.mean_squares("site", 0, ["a"])
        assert np.array_equal(found, squares / (7.0 * SQUARE_UNITS))
        (path,) = sums.folder.iterdir()
        assert size * 6000 < path.stat().st_size < size * 6000 + 1000
    assert [bytes_of_sums(votes) for votes in (1, 15, 16, 4095, 4096)] == [5, 5, 6, 6, 8]


def test_the_cost_of_sums_is_known_before(model: Model, tmp_path: Path) -> None:
    """Files are as large as was said; adding and fitting take no more memory than was said."""
    observe(model, replace(CONFIG, run_folder=tmp_path / "run"))
    store = RunStore(tmp_path / "run")
    record = store.record(store.names()[0])
    written = sum(path.stat().st_size for path in (tmp_path / "run" / "sums").iterdir())
    assert written <= zones.sums_bytes(record, 2, 1, 3) <= 1.5 * written
    wide = record.model_copy(
        update={
            "sites": tuple(
                site.model_copy(update={"query_length": 2048, "key_length": 2048})
                for site in record.sites
            )
        }
    )
    shape = (2, 128, 128)
    sums = ZoneSums(tmp_path / "wide")

    def add(name: str) -> None:
        groups = {group: GroupSums(np.ones(shape, np.int64), 1) for group in range(2)}
        for site in wide.sites:
            sums.add(name, site.name, groups)

    def fit() -> None:
        sources = [
            ZoneSource(
                partial(sums.mean_squares, site.name, group, ["a", "b"]), 1, 256, math.prod(shape)
            )
            for site in wide.sites
            for group in range(2)
        ]
        ZonePricing(sources).search(ZoneTarget(price=1e-3))

    add("a")
    tracemalloc.start()
    try:
        for work in (partial(add, "b"), fit):
            tracemalloc.reset_peak()
            work()
            assert tracemalloc.get_traced_memory()[1] <= zones.host_bytes(wide, 2)
    finally:
        tracemalloc.stop()


def test_damaged_sums_are_noticed(tmp_path: Path) -> None:
    ones = np.ones((1, 4, 4), np.int64)
    sums = ZoneSums(tmp_path)
    sums.add("a", "site", {0: GroupSums(ones, 1)})
    (path,) = sums.folder.iterdir()
    whole = path.read_bytes()
    for place in (20, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CalibrationError, match="damaged") as caught:
            sums.mean_squares("site", 0, ["a"])
        assert "restart" in str(caught.value)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CalibrationError, match="damaged"):
        sums.add("b", "site", {0: GroupSums(ones, 1)})


def test_a_restart_forgets_the_sums(model: Model, tmp_path: Path) -> None:
    config = replace(CONFIG, run_folder=tmp_path / "run")
    observe(model, config)
    plan = observe(model, replace(config, restart=True), [7])
    assert plan.metadata.inputs.count == 1


def test_settings_of_the_other_form_are_refused(model: Model) -> None:
    for settings in (
        {"form": "zones", "A": 0.5},
        {"form": "zones", "rho": 0.4},
        {"form": "zones", "pooled": 4},
        {"form": "zones", "gamma": 0.9},
        {"form": "zones", "keep_energies": True},
        {"form": "zones", "density": 0.2, "error": 0.1},
        {"form": "zones", "speed_up": 2.0},
        {"form": "zones", "density": "a lot"},
        {"form": "zones", "step_groups": 0},
        {"form": "zones", "zone_numbers": 1},
        {"form": "octaves"},
        {"form": "masks", "density": 0.2},
        {"A": 0.9, "density": 0.2},
        {"keep_energies": True, "speed_up": 2.0},
    ):
        with pytest.raises(OptionError) as caught:
            CalibrationConfig(**settings)  # type: ignore[arg-type]
        assert caught.value.expected is not None
    assert CalibrationConfig(form="zones").zones().target.density == 0.25
    with calibatt_compiler.calibration(model, CONFIG) as run:
        with run.input():
            sample(model, 0)
        with pytest.raises(OptionError, match="form='zones'"):
            run.plan(A=0.5)


@pytest.mark.slow
def test_a_pipeline_is_calibrated_for_zones_and_served(
    tiny_wan_pipeline: Any,
    tiny_wan_arguments: dict[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe, out = tiny_wan_pipeline, tmp_path / "zones.calibatt"
    config = CalibrationConfig(block=(16, 16), form="zones", density=0.5)
    prompts = ["a big rabbit runs", "the bird flies"]
    plan = calibrate(pipe, prompts, [3, 4], out=out, config=config, **tiny_wan_arguments)
    assert Plan.load(out) == plan
    assert plan.density() == pytest.approx(0.5, abs=0.05)
    forbidden = pipe.transformer.register_forward_pre_hook(_forbidden)
    try:
        again = calibrate(pipe, prompts, [3, 4], out=out, config=config, **tiny_wan_arguments)
    finally:
        forbidden.remove()
    assert again == plan

    model = pipe.transformer

    def latents(lowering: str, kernel: str) -> Tensor:
        torch._dynamo.reset()
        options = {"plan": plan, "lowering": lowering}
        pipe.transformer = torch.compile(model, backend="calibatt", options=options)
        generator = torch.Generator().manual_seed(5)
        try:
            made: Tensor = pipe(
                prompt="a bird", generator=generator, output_type="latent", **tiny_wan_arguments
            ).frames
            said = calibatt_compiler.summary(pipe.transformer)
        finally:
            pipe.transformer = model
        rows = [row for row in said.rows if row.name in plan.sites]
        assert [row.kernel for row in rows] == [kernel] * len(plan.sites)
        assert all(row.sparse_calls and not row.dense_calls for row in rows)
        return made

    fast = latents("table", "native-cpu-zones")
    # What is around attention was compiled once; here it need not be.
    monkeypatch.setattr(
        "calibatt_compiler.backend._inductor", lambda gm, inputs, settings: gm.forward
    )
    plain = latents("reference", "reference")
    assert (fast - plain).abs().max() < 1e-4 * plain.abs().max()


def _forbidden(*_: object) -> None:
    raise AssertionError("the model must not be called")


@pytest.mark.slow
def test_one_process_and_two_make_the_same_plan(
    tiny_wan_folder: Path, tiny_wan_arguments: dict[str, int], tmp_path: Path
) -> None:
    work = {
        "prompts": ["a big rabbit runs", "the bird flies", "a small bird"],
        "seeds": 1,
        "config": CalibrationConfig(block=(16, 16), form="zones"),
        **tiny_wan_arguments,
        "num_inference_steps": 2,
    }
    both = {"out": tmp_path / "together", "meeting": tmp_path / "meeting", **work}
    ranks = [Calibration(tiny_wan_folder, out=tmp_path / "alone", **work)]
    ranks += [Calibration(tiny_wan_folder, rank=rank, **both) for rank in range(2)]
    digests = set()
    for rank in ranks:
        code, printed, said = rank.result()
        assert code == 0, said
        digests.add(printed.split()[-1])
    assert len(digests) == 1
    files = list((tmp_path / "together.calibration" / "sums").iterdir())
    assert {path.name.split("-")[0] for path in files} == {"00000", "00001"}


@pytest.mark.slow
def test_costs_are_told_beforehand(
    tiny_wan_pipeline: Any, tiny_wan_arguments: dict[str, int], tmp_path: Path
) -> None:
    pipe, out = tiny_wan_pipeline, tmp_path / "zones.calibatt"
    config = CalibrationConfig(block=(16, 16), form="zones", step_groups=2)
    prompts = ["a big rabbit runs", "the bird flies"]
    told = estimate(pipe, prompts, [3, 4], out=out, config=config, **tiny_wan_arguments)
    assert not list(tmp_path.iterdir())
    calibrate(pipe, prompts, [3, 4], out=out, config=config, **tiny_wan_arguments)
    folder = tmp_path / "zones.calibatt.calibration"
    found = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert found <= told.run_bytes <= 1.5 * found
    assert out.stat().st_size <= told.plan_bytes <= 20 * out.stat().st_size
    assert told.host_bytes > 0
