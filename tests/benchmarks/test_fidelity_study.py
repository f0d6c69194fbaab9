"""The comparison of `benchmarks/fidelity.py`: what serves calls, what is measured, resuming."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from calibatt_compiler.calibration.select.selection import covering_mask
from calibatt_compiler.evaluation.cases import Case
from calibatt_compiler.kernels.energy import block_energy
from calibatt_compiler.kernels.reference.attention import masked_dense_attention
from calibatt_compiler.plan import BlockPattern, Plan

FOLDER = Path(__file__).parents[2] / "benchmarks"
GRID = (4, 4, 8)
SITE = "blocks.0.attn1"


@pytest.fixture(autouse=True, scope="module")
def _path():
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))
    for name in [name for name in sys.modules if name.partition(".")[0].endswith("_study")]:
        del sys.modules[name]
    sys.modules.pop("fidelity", None)


def operands(batch: int = 2, heads: int = 2, tokens: int = 128, dim: int = 32):
    generator = torch.Generator().manual_seed(3)
    shape = (batch, heads, tokens, dim)
    return [1.5 * torch.randn(shape, generator=generator) for _ in range(3)]


def plan_of(masks: torch.Tensor) -> Plan:
    return Plan.from_masks({SITE: masks}, GRID, [900.0, 100.0], (16, 16))


@pytest.fixture
def plan() -> Plan:
    generator = torch.Generator().manual_seed(1)
    masks = torch.rand(2, 2, 8, 8, generator=generator) < 0.4
    masks |= torch.eye(8, dtype=torch.bool)
    masks[0] = True  # the first step is dense
    return plan_of(masks)


@pytest.mark.slow
def test_a_plan_is_served_by_the_pattern_of_the_step(plan: Plan):
    from fidelity_study.serve import Planned

    q, k, v = operands()
    method = Planned(plan)
    for step, timestep in enumerate(plan.timesteps):
        found = method.attend(SITE, q, k, v, timestep, 32**-0.5)
        wanted = masked_dense_attention(q, k, v, plan.sites[SITE].at(step))
        assert (found - wanted).abs().max() < 1e-5
    assert method.density() == pytest.approx(plan.density())
    method.attend(SITE, q, k, v, 5000.0, 32**-0.5)
    with pytest.raises(RuntimeError, match="was not served by its plan"):
        method.density()


@pytest.mark.slow
def test_a_plan_gives_the_video_that_the_backend_gives(
    tiny_wan_pipeline, tiny_wan_arguments, tiny_wan_grid, monkeypatch
):
    from fidelity_study.serve import Dense, Planned, Switch

    from calibatt_compiler.calibration.observe.attach import observed

    torch._dynamo.reset()
    pipe, model = tiny_wan_pipeline, tiny_wan_pipeline.transformer
    arguments = {**tiny_wan_arguments, "prompt": "a bird", "output_type": "latent"}
    pipe.scheduler.set_timesteps(arguments["num_inference_steps"])
    timesteps = pipe.scheduler.timesteps.tolist()
    blocks = -(-math.prod(tiny_wan_grid) // 32)
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(2, len(timesteps), 2, blocks, blocks, generator=generator) < 0.4
    masks |= torch.eye(blocks, dtype=torch.bool)
    sites = {f"blocks.{index}.attn1": mask for index, mask in enumerate(masks)}
    plan = Plan.from_masks(sites, tiny_wan_grid, timesteps, (32, 32))

    def latents() -> torch.Tensor:
        return pipe(generator=torch.Generator().manual_seed(5), **arguments).frames

    switch = Switch()
    with observed(model, switch, False):
        dense = latents()
        switch.method = method = Planned(plan)
        sparse = latents()
        switch.method = Dense()
        assert torch.equal(latents(), dense), "one compiled model, methods come and go"
    assert method.density() == pytest.approx(plan.density())
    monkeypatch.setattr(
        "calibatt_compiler.backend._inductor", lambda gm, inputs, settings: gm.forward
    )
    torch._dynamo.reset()
    try:
        pipe.transformer = torch.compile(model, backend="calibatt", options={"plan": plan})
        backend = latents()
    finally:
        pipe.transformer = model
    assert torch.equal(sparse, backend)
    assert not torch.equal(sparse, dense)


def test_pooled_keys_count_in_the_density(plan: Plan):
    from fidelity_study.serve import computed_density

    patterns = [dataclasses.replace(plan.sites[SITE].at(step), pooled=4) for step in (0, 1)]
    site = type(plan.sites[SITE]).share(patterns)
    pooled = Plan.create({SITE: site}, grid=GRID, sampler=plan.metadata.sampler)
    assert computed_density(plan) == pytest.approx(plan.density())
    # The first step keeps everything, so no key is pooled there.
    assert computed_density(pooled) == pytest.approx(plan.density() + 4 / 16 / 2)


def test_the_oracle_covers_each_call_by_its_own_attention(plan: Plan):
    from fidelity_study.patterns import Budget
    from fidelity_study.serve import oracle

    q, k, v = operands()
    method = oracle(Budget.of(plan), plan)
    dense = method.attend(SITE, q, k, v, 900.0, 32**-0.5)
    assert (dense - scaled_dot_product_attention(q, k, v)).abs().max() < 1e-5
    found = method.attend(SITE, q, k, v, 100.0, 32**-0.5)
    kept = plan.sites[SITE].kept_at(1)
    for sample in range(2):
        one = [x[sample : sample + 1] for x in (q, k, v)]
        energy = block_energy(one[0], one[1], block=(16, 16))[0]
        low, high = 0.0, 1.0
        for _ in range(40):  # the threshold whose covering mask keeps as many
            middle = (low + high) / 2
            below = int(covering_mask(energy, middle)[0].sum()) < kept
            low, high = (middle, high) if below else (low, middle)
        mask = covering_mask(energy, high)[0]
        assert int(mask.sum()) == kept
        pattern = BlockPattern.from_mask(mask, block=(16, 16))
        wanted = masked_dense_attention(*one, pattern)
        assert (found[sample] - wanted[0]).abs().max() < 1e-5
    assert method.density() == pytest.approx(plan.density())


def test_the_router_keeps_the_highest_pooled_scores(plan: Plan):
    from fidelity_study.patterns import Budget
    from fidelity_study.serve import router

    q, k, v = operands(batch=1)
    budget = Budget.of(plan)
    method = router(budget, plan)
    found = method.attend(SITE, q, k, v, 100.0, 32**-0.5)
    means = [x[0].unflatten(1, (8, 16)).mean(2) for x in (q, k)]
    scores = means[0] @ means[1].mT
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    for head, row in ((h, r) for h in range(2) for r in range(8)):
        count = int(budget.counts(SITE, 1)[head, row])
        mask[head, row, scores[head, row].topk(count).indices] = True
    wanted = masked_dense_attention(q, k, v, BlockPattern.from_mask(mask, block=(16, 16)))
    assert (found - wanted).abs().max() < 1e-5


def test_each_head_takes_the_variant_of_the_least_error(plan: Plan, monkeypatch):
    from fidelity_study import profile
    from fidelity_study.patterns import Budget, families, peer_plan

    monkeypatch.setattr(profile, "QUERIES", 128)  # all of them: the choice is exact
    q, k, v = operands(batch=1)
    places = torch.cartesian_prod(*(torch.arange(size) for size in GRID))
    for head, kind in enumerate(("frame", "place")):  # one head looks at frames, one at places
        index = places[:, 0] if kind == "frame" else places[:, 1] * 8 + places[:, 2]
        code = torch.nn.functional.one_hot(index, 32).float()
        q[0, head] = k[0, head] = 12 * code
    kinds, budget = families(GRID, 16), Budget.of(plan)
    measured = profile.Profile(kinds, {0.4: budget}, plan)
    for timestep in plan.timesteps:
        out = measured.attend(SITE, q, k, v, timestep, 32**-0.5)
        assert (out - scaled_dot_product_attention(q, k, v)).abs().max() < 1e-5
    chosen = {name: measured.choices(0.4, name) for name in kinds}
    assert chosen["heads"][SITE][1][0].startswith("spatial")
    assert chosen["heads"][SITE][1][1].startswith("temporal")
    from fidelity_study.serve import Planned

    dense = scaled_dot_product_attention(q, k, v)
    for name, family in kinds.items():
        errors = {}
        for variant in family.variants:
            alone = {SITE: [[variant] * 2] * 2}
            method = Planned(peer_plan(family, budget, alone, plan))
            out = method.attend(SITE, q, k, v, 100.0, 32**-0.5)
            errors[variant] = (out - dense).square().sum((0, 2, 3))
        for head, variant in enumerate(chosen[name][SITE][1]):
            least = min(float(error[head]) for error in errors.values())
            assert float(errors[variant][head]) <= least * 1.001 + 1e-9, (name, head)


def test_the_perceptual_distance_is_what_it_says():
    from dino_study.vit import Dino, DinoConfig
    from fidelity_study.perceptual import Perceptual

    torch.manual_seed(0)
    net = Dino(DinoConfig(dim=32, heads=2, depth=2, patch=4, positions=5)).eval()
    generator = np.random.default_rng(0)
    video = generator.integers(0, 256, (2, 16, 24, 3), dtype=np.uint8)
    other = generator.integers(0, 256, (2, 16, 24, 3), dtype=np.uint8)
    slightly = np.clip(video.astype(int) + generator.integers(-9, 10, video.shape), 0, 255)
    metric = Perceptual(net, torch.device("cpu"))
    features = metric.features(video)
    assert features.shape == (2, 24, 32)
    assert abs(metric.distance(features, metric.features(video))) < 1e-6
    near = metric.distance(features, metric.features(slightly.astype(np.uint8)))
    far = metric.distance(features, metric.features(other))
    assert 0 < near < far
    cosines = []
    for a, b in zip(video, other, strict=True):
        x, y = (
            net(torch.from_numpy(frame).permute(2, 0, 1)[None] / 255)[0, 1:] for frame in (a, b)
        )
        cosines.append(torch.nn.functional.cosine_similarity(x, y, dim=-1).mean().item())
    assert far == pytest.approx(1 - sum(cosines) / 2, abs=1e-5)


@pytest.mark.slow
def test_the_study_goes_on_where_it_stopped(
    tiny_wan_pipeline, tiny_wan_arguments, tmp_path, monkeypatch
):
    from fidelity_study import study as module
    from fidelity_study.methods import FLOOR, PEERS, TITLES
    from fidelity_study.report import table, write
    from fidelity_study.setting import Setting

    torch._dynamo.reset()
    setting = Setting(
        arguments={**tiny_wan_arguments, "num_inference_steps": 2},
        calibration=[Case("a big rabbit", 1), Case("the small bird", 2)],
        held_out=[Case("the rabbit runs", 11)],
        densities=[0.6, 0.45],
        block=32,
        C=0.6,
        k=1.0,
        token_order="2x4x4",
        inductor=False,
    )
    generated = []
    original = module.Study._video

    def counted(self, case, method):
        generated.append(type(method).__name__)
        if len(generated) == 8:
            raise KeyboardInterrupt
        return original(self, case, method)

    monkeypatch.setattr(module.Study, "_video", counted)

    def study(folder: Path, deadline: float = math.inf):
        return module.Study(tiny_wan_pipeline, setting, folder, deadline=deadline)

    killed = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        study(killed).run()
    assert not study(killed, deadline=0.0).run(), "nothing is begun when the time is up"
    finished = study(killed)
    assert len(finished.results) == 5
    assert finished.run()
    # A profile and a dense video; of the others the one that was interrupted comes twice.
    assert len(finished.results) == len(TITLES) * 2 - 1, "the floor has no density"
    assert len(generated) == 2 + len(finished.results) + 1
    generated.extend(["none is to be the eighth"] * 8)
    before = len(generated)
    assert study(killed).run()
    assert len(generated) == before, "all is kept"

    one = dataclasses.replace(setting, densities=[0.6])
    straight = module.Study(tiny_wan_pipeline, one, tmp_path / "straight")
    assert straight.run()
    assert len(straight.results) == len(TITLES)
    for key, row in straight.results.items():
        same = {name: value for name, value in row.items() if name != "seconds"}
        assert same == {n: x for n, x in finished.results[key].items() if n != "seconds"}, key

    for case, density, name in (
        (case, density, name)
        for case in setting.held_out
        for density in setting.densities
        for name in TITLES
        if name != FLOOR
    ):
        row = finished.results[setting.key(name, density, case)]
        budget = finished.results[setting.key("ours", density, case)]["density"]
        if name not in ("pooled", "ordered", "zones", "few-zones"):
            assert row["density"] == pytest.approx(budget), name
        assert row["density"] == pytest.approx(density, abs=0.17), name
        assert row["psnr"] > 10
    (floor,) = (row for key, row in finished.results.items() if key.startswith(FLOOR))
    assert floor["density"] == 1
    assert floor["psnr"] is None or floor["psnr"] > 60
    even = module.Study(tiny_wan_pipeline, dataclasses.replace(one, even=True), killed)
    assert {key.split("|")[0] for key in even.missing()} == {f"{name} even" for name in PEERS}
    assert even.run()
    assert len(even.results) == len(finished.results) + len(PEERS)
    write(finished)
    write(even)
    assert "random, steps alike" in (killed / "fidelity-even.md").read_text()
    text = table(finished)
    assert all(setting.title(name) in text for name in TITLES)
    record = json.loads((killed / "fidelity.json").read_text())
    assert record["settings"]["complete"]
    (ours,) = (r for r in record["rows"] if (r["name"], r["density"]) == ("ours", 0.6))
    assert ours["psnr"] > 10
    assert len(ours["by_video"]) == len(setting.held_out)
    assert (killed / "fidelity.png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match="other settings"):
        module.Study(tiny_wan_pipeline, dataclasses.replace(setting, k=2.0), killed)


def test_a_form_without_a_plan_is_left_out(
    tiny_wan_pipeline, tiny_wan_arguments, tmp_path, monkeypatch
):
    from fidelity_study import study as module
    from fidelity_study.methods import POOLED, TITLES
    from fidelity_study.plans import Form, NoPlanError, Recording
    from fidelity_study.report import settings, table
    from fidelity_study.setting import Setting

    torch._dynamo.reset()
    frames = np.zeros((9, 32, 32, 3), dtype=np.uint8)

    def served(self, case, method):  # nothing is generated: only what is asked for counts
        method.density = lambda: 0.3
        method.choices = lambda density, family: {}
        return frames

    monkeypatch.setattr(module.Study, "_video", served)
    monkeypatch.setattr(module, "make", lambda name, inputs: type("Method", (), {})())
    setting = Setting(
        arguments={**tiny_wan_arguments, "num_inference_steps": 2},
        calibration=[Case("a big rabbit", 1)],
        held_out=[Case("the rabbit runs", 11)],
        densities=[0.3],
        block=16,
        C=0.1,
        k=1.0,
        inductor=False,
    )
    monkeypatch.setitem(module.FORMS, POOLED, dataclasses.replace(module.FORMS[POOLED], pooled=8))
    found = module.Study(tiny_wan_pipeline, setting, tmp_path)
    assert found.run()
    assert list(found.absent) == ["pooled|0.3"]  # its pooled keys alone are half of the work
    assert len(found.results) == len(TITLES) - 2
    assert not module.Study(tiny_wan_pipeline, setting, tmp_path).missing()
    assert TITLES[POOLED] not in table(found)
    few = dataclasses.replace(setting, only=["oracle", "random"])
    assert module.Study(tiny_wan_pipeline, few, tmp_path / "few").run()
    assert not (tmp_path / "few" / "choices-0.3.json").exists(), "no head has a choice to make"
    assert len(json.loads((tmp_path / "few" / "results.json").read_text())) == 2
    assert "no plan of density 0.3" in settings(found)["absent"]["pooled|0.3"]
    folder = tmp_path / "calibrated-raster.calibatt.calibration"
    with pytest.raises(NoPlanError, match="no plan of density"):  # the first step takes it all
        Recording(folder, C=0.999, k=1.0, rho=0.5).plan(0.3, Form())
    for density in (0.2, 0.5, 0.9):
        plan = Recording(folder, C=0.1, k=1.0, rho=0.5).plan(density, Form())
        assert plan.density() == pytest.approx(density, abs=0.01)


@pytest.mark.slow
def test_quick_runs_all_methods(tmp_path, monkeypatch, capsys, section_of):
    import fidelity
    from fidelity_study.methods import FEW, ORDERED, TITLES

    torch._dynamo.reset()
    command = ["fidelity.py", "compare", "--quick", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        fidelity.main()
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    titles = [title.format(few=FEW) for name, title in TITLES.items() if name != ORDERED]
    assert [title for title in titles if title not in shown] == []
    import results

    assert results.read_record(tmp_path / "fidelity.json").settings["complete"]
    shown = section_of(tmp_path / "fidelity.json")
    assert [title for title in titles if f"| {title} |" not in shown] == []
    assert shown.count("- Aim, zones: ") == 3
    assert results.add(tmp_path / "fidelity.json") is None, "a check is not kept"
    assert results.add(tmp_path / "run.json") is None, "nor is what is no record"
