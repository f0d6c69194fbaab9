"""Training of `examples/tiny_wan` by size: checkpoints, resuming, export, and a comparison."""

from __future__ import annotations

import importlib
import io
import itertools
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "tiny_wan"


@pytest.fixture(autouse=True, scope="module")
def _path():
    folders = [str(EXAMPLE), str(ROOT / "benchmarks")]
    names = {path.stem for path in EXAMPLE.glob("*.py")} | {"fidelity"}
    sys.path[:0] = folders
    yield
    for folder in {*folders} & {*sys.path}:
        while folder in sys.path:
            sys.path.remove(folder)
    for name in list(sys.modules):
        if name in names or name.partition(".")[0].endswith("_study"):
            del sys.modules[name]


@pytest.fixture
def work(tmp_path: Path, monkeypatch) -> Path:
    """Where all files of training go, with a clip file of noise for two shots."""
    settings = importlib.import_module("settings")
    prepare = importlib.import_module("prepare_data")
    monkeypatch.setattr(settings, "WORK", tmp_path)
    size = settings.SIZES["test"]
    generator = np.random.default_rng(0)
    images = []
    from PIL import Image

    for _ in range(sum(shot.frames for shot in size.shots())):
        buffer = io.BytesIO()
        coarse = generator.integers(0, 256, (4, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((96, 64)).save(buffer, "WEBP")
        images.append(buffer.getvalue())
    prepare.write_clips(size.clips, size.shots(), images)
    return tmp_path / "test"


def run(monkeypatch, module: str, *arguments: object) -> ModuleType:
    found = importlib.import_module(module)
    monkeypatch.setattr(sys, "argv", [module, "--size", "test", *map(str, arguments)])
    found.main()
    return found


def test_the_sizes_are_what_they_are_to_be():
    from diffusers import WanTransformer3DModel

    settings = importlib.import_module("settings")
    demo, mid = settings.SIZES["demo"], settings.SIZES["mid"]
    assert demo.transformer_config == settings.TRANSFORMER_CONFIG
    assert (demo.clips, demo.vae_dir, demo.dit_dir) == (
        EXAMPLE / "work" / "clips" / "clips.safetensors",
        EXAMPLE / "work" / "vae",
        EXAMPLE / "work" / "dit",
    )
    assert demo.model_dir == EXAMPLE / "model"
    with torch.device("meta"):
        model = WanTransformer3DModel(**mid.transformer_config)
    assert len(model.blocks) >= 12
    assert 2 * sum(p.numel() for p in model.parameters()) < 60_000_000
    video = mid.video
    assert (video.frames // 4 + 1) * (video.height // 16) * (video.width // 16) >= 8000
    shots, prompts = mid.shots(), mid.demo()
    assert len(shots) > len(demo.shots())
    spans = sorted((shot.start, shot.start + shot.frames) for shot in shots)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans)), "shots overlap"
    assert min(shot.frames for shot in shots) >= video.frames
    assert len({shot.name for shot in shots}) == len(shots)
    shot_of = {caption: shot.name for shot in shots for caption in shot.captions}
    used = [[shot_of[e["prompt"]] for e in prompts[k]] for k in ("calibration", "held_out")]
    assert not {*used[0]} & {*used[1]}
    text = importlib.import_module("text")
    tokenizer = text.build_tokenizer(shot_of)
    assert max(len(tokenizer(c).input_ids) for c in shot_of) <= settings.MAX_TOKENS


def test_a_light_checkpoint_holds_the_weights_and_training_goes_on(work, monkeypatch):
    checkpoint = importlib.import_module("checkpoint")
    run(monkeypatch, "train_vae", "--seconds", 0.5, "--log-every", 1)
    train = importlib.import_module("train")
    steps: list[int] = []
    clock = iter(range(10_000))
    monkeypatch.setattr(train.time, "monotonic", lambda: float(next(clock)))  # a second a look
    run(monkeypatch, "train", "--seconds", 12, "--run-seconds", 5, "--log-every", 1)
    groups, meta = checkpoint.load_checkpoint(work / "dit")
    assert set(groups) == {"model"}
    assert 5 <= meta["seconds"] < 12
    steps.append(meta["step"])
    model = groups["model"]

    seen: list[torch.Tensor] = []
    original = train.Run.train

    def look(self):
        seen.append(self.named["transformer.proj_out.weight"].detach().clone())
        assert (self.step, self.before) == (meta["step"], meta["seconds"])
        original(self)

    monkeypatch.setattr(train.Run, "train", look)
    run(monkeypatch, "train", "--seconds", 12, "--log-every", 1)
    assert torch.equal(seen[0], model["transformer.proj_out.weight"])
    groups, meta = checkpoint.load_checkpoint(work / "dit")
    assert set(groups) == {"ema"}
    assert meta["seconds"] >= 12
    assert meta["step"] > steps[0]
    assert not torch.equal(groups["ema"]["transformer.proj_out.weight"], seen[0])
    stored = sum(path.stat().st_size for path in (work / "dit").iterdir())
    values = sum(tensor.numel() for tensor in groups["ema"].values())
    assert stored < 2 * values + 20_000, "two bytes a parameter"


def test_a_whole_checkpoint_still_goes_on_with_its_optimizer(work, monkeypatch):
    """What the demo's model writes: nothing is lost, so no second warm-up."""
    import dataclasses

    settings, checkpoint, train = map(importlib.import_module, ("settings", "checkpoint", "train"))
    heavy = dataclasses.replace(settings.SIZES["test"], light=False)
    monkeypatch.setitem(settings.SIZES, "test", heavy)
    run(monkeypatch, "train_vae", "--seconds", 0.5, "--log-every", 1)
    run(monkeypatch, "train", "--seconds", 60, "--run-seconds", 0.5, "--log-every", 1)
    groups, _ = checkpoint.load_checkpoint(work / "dit")
    assert set(groups) == {"model", "ema", "momentum", "exp_avg", "exp_avg_sq"}
    seen = []

    def look(self):
        seen.append((self.warm_from, self.warm_steps))
        buffers = dict(self.optimizer.state()["momentum"])
        assert all(torch.equal(groups["momentum"][name], x) for name, x in buffers.items())
        assert all(torch.equal(groups["ema"][name], x) for name, x in self.averages.items())

    monkeypatch.setattr(train.Run, "train", look)
    run(monkeypatch, "train", "--seconds", 60)
    assert seen == [(0, train.WARMUP_STEPS)]


@pytest.mark.slow
def test_training_goes_through_its_stages_and_the_result_compares(work, monkeypatch, capsys):
    import fidelity
    from fidelity_study.train import Training

    torch._dynamo.reset()
    called = []

    def script(self, name, *arguments):
        called.append(name)
        run(monkeypatch, name.removesuffix(".py"), *arguments)

    monkeypatch.setattr(Training, "_script", script)
    extra = ("--log-every", "1")
    assert not Training("test", 0.0, extra=extra).run(), "no time for any stage"
    assert not called
    assert not Training("test", 1.0, extra=extra, least=0.5).run()
    assert called[0] == "train_vae.py"
    while not Training("test", 4.0, extra=extra, least=0.5).run():
        assert len(called) < 20
    assert called[-1] == "export.py"
    count = len(called)
    assert Training("test", 4.0).run()
    assert len(called) == count, "nothing is left to do"

    command = ["fidelity.py", "compare", "--quick", "--out", str(work / "results")]
    monkeypatch.setattr(sys, "argv", [*command, "--model", str(work / "model")])
    with pytest.raises(SystemExit) as stopped:
        fidelity.main()
    assert stopped.value.code == 0
    assert "oracle" in capsys.readouterr().out
