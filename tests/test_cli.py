"""The `calibatt` command: help, exit codes, messages, what is left on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from calibatt_compiler.cli.app import run
from calibatt_compiler.evaluation.compare import Comparer
from calibatt_compiler.plan import Plan

ROOT = Path(__file__).parent.parent
COMMANDS = ("demo", "calibrate", "inspect", "compare", "build")


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    """A small plan on disk."""
    masks = {"blocks.0.attn1": torch.eye(4, dtype=torch.bool).expand(2, 2, 4, 4).clone()}
    path = tmp_path / "small.calibatt"
    Plan.from_masks(masks, (1, 8, 8), [900.0, 100.0], (16, 16)).save(path)
    return path


def test_help_names_every_command_and_imports_nothing_heavy():
    code = (
        "import sys\nfrom calibatt_compiler.cli.app import run\ncode = run(['--help'])\n"
        "print([m for m in ('torch', 'triton', 'diffusers', 'matplotlib') if m in sys.modules])\n"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0
    *text, loaded = done.stdout.splitlines()
    assert loaded == "[]"
    assert all(any(f" {name} " in line for line in text) for name in COMMANDS)
    assert "Exit codes" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command_has_an_example(name: str, capsys: pytest.CaptureFixture[str]):
    assert run([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"Example: calibatt {name}" in text


def test_version(capsys: pytest.CaptureFixture[str]):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("calibatt 0.")


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["inspect"],
        ["inspect", "x", "--frobnicate"],
        ["compare", "m", "p", "--rounds", "2"],
    ],
    ids=["command", "missing argument", "option", "range"],
)
def test_wrong_usage_is_2(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    assert run(arguments) == 2
    assert capsys.readouterr().err


def test_inspect(plan_file: Path, capsys: pytest.CaptureFixture[str]):
    page = plan_file.parent / "page.html"
    assert run(["inspect", str(plan_file), "--html", str(page)]) == 0
    captured = capsys.readouterr()
    assert "blocks.0.attn1" in captured.out
    assert "0.250" in captured.out
    assert page.read_text("utf-8").startswith("<!DOCTYPE html>")


def test_inspect_json(plan_file: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["inspect", str(plan_file), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["density"] == 0.25
    assert data["digest"] == Plan.load(plan_file).digest
    assert data["sites"][0]["density"] == [0.25, 0.25]


def test_our_errors_are_messages_and_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    damaged = tmp_path / "x.calibatt"
    damaged.write_bytes(b"no plan [red]at all")
    assert run(["inspect", str(damaged)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "calibatt: " in captured.err
    assert "expected:" in captured.err
    assert "remedy:" in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["calibrate", "nowhere", "--out", "p"], "no prompts"),
        (["calibrate", ".", "--out", "p", "--prompt", "a"], "can't be loaded"),
        (["calibrate", "m", "--out", "p", "--prompt", "a", "--A", "1.5"], "'A' is out of range"),
        (["calibrate", "m", "--out", "p", "--prompt", "a", "--device", "abacus"], "--device"),
        (["calibrate", "m", "--out", "p", "--prompt", "a", "--dtype", "int8"], "--dtype"),
        (["calibrate", "m", "--out", "p", "--prompts", "none.txt"], "can't be read"),
        (["demo", "--model", "nowhere", "--settings", "none.json"], "settings can't be read"),
        (["compare", "m", "none.calibatt", "--prompt", "a"], "no plan file"),
        (["compare", "m", "PLAN", "--prompt", "a", "--dense", "perhaps"], "--dense"),
        (["compare", "m", "PLAN", "--prompt", "a", "--lowering", "perhaps"], "lowering"),
    ],
)
def test_unusable_input_is_2_and_explained(
    arguments: list[str],
    said: str,
    plan_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(plan_file.parent)
    assert run([str(plan_file) if a == "PLAN" else a for a in arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "remedy:" in error
    assert sorted(p.name for p in plan_file.parent.iterdir()) == [plan_file.name]


def test_interrupted_page_is_130_and_leaves_nothing(
    plan_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    page = plan_file.parent / "page.html"
    page.write_text("old")

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    assert run(["inspect", str(plan_file), "--html", str(page)]) == 130
    assert page.read_text() == "old"
    assert sorted(p.name for p in plan_file.parent.iterdir()) == ["page.html", plan_file.name]
    assert "interrupted" in capsys.readouterr().err


@pytest.fixture
def demo_settings(tmp_path: Path, tiny_wan_arguments: dict[str, int]) -> Path:
    """Settings of a demo on the tiny pipeline."""
    path = tmp_path / "demo.json"
    content = {
        **tiny_wan_arguments,
        "calibration": [{"prompt": "a big rabbit runs", "seed": 1}],
        "held_out": [{"prompt": "the small bird flies", "seed": 2}],
    }
    path.write_text(json.dumps(content))
    return path


@pytest.mark.slow
def test_demo_then_compare(
    demo_settings: Path, tiny_wan_folder: Path, capsys: pytest.CaptureFixture[str]
):
    folder = demo_settings.parent / "out"
    arguments = ["--quick", "--device", "cpu", "--out", str(folder)]
    arguments += ["--model", str(tiny_wan_folder), "--settings", str(demo_settings)]
    with (
        mock.patch("calibatt_compiler.backend._inductor", lambda gm, *_: gm.forward),
        mock.patch.object(Comparer, "dense", lambda self: self._model),
    ):
        code = run(["demo", *arguments])
        assert code == 0
        written = {path.name for path in folder.iterdir() if path.is_file()}
        assert written == {
            "compare.json",
            "curve.png",
            "index.html",
            "inspect.html",
            "plan.calibatt",
            "summary.txt",
            "video-00.mp4",
            "video-00.png",
        }
        printed = capsys.readouterr().out
        data = json.loads((folder / "compare.json").read_text("utf-8"))
        assert f"{data['plans'][0]['sparsity']:.1%}" in printed
        main, *curve, _ = (plan["density"] for plan in data["plans"])
        assert main == pytest.approx(0.25, rel=0.02)
        assert curve[0] < main < curve[1]
        assert data["plans"][-1]["label"].startswith("the paper's masks")
        plan = Plan.load(folder / "plan.calibatt")
        assert plan.digest == data["plans"][0]["digest"]
        assert plan.steps == 4

        again = demo_settings.parent / "again"
        arguments = ["--prompt", "the small bird flies", "--out", str(again), "--device", "cpu"]
        arguments += ["--min-psnr", "999", "--set", "max_sequence_length=16", "--dense", "eager"]
        plan_file = str(folder / "plan.calibatt")
        code = run(["compare", str(tiny_wan_folder), plan_file, *arguments])
    assert code == 1, capsys.readouterr().err
    assert json.loads((again / "compare.json").read_text("utf-8"))["plans"][0]["label"] == "plan"


def test_plans_of_one_name_are_told_apart(tmp_path: Path):
    from calibatt_compiler.cli.compare import labels

    def named(*files: str) -> list[str]:
        found = labels([tmp_path / file for file in files])
        assert list(found.values()) == [tmp_path / file for file in files]
        return list(found)

    assert named("a/p.calibatt", "b/q.calibatt") == ["p", "q"]
    assert named("a/p.calibatt", "b/p.calibatt", "q") == ["a/p", "b/p", "q"]
    assert named("x/a/p", "y/a/p", "b/p") == ["x/a/p", "y/a/p", "b/p"]
    assert named("p.one", "p.two", "p.one") == ["p", "p (2)", "p (3)"]
    assert named("dense.calibatt", "p") == ["dense (2)", "p"]


def random_plan(path: Path) -> Path:
    """A plan of two sites that share a pattern, one dense step, and no recorded head_dim."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(2, 1, 3, 3, generator=generator) < 0.4
    mask[0] |= torch.eye(3, dtype=torch.bool)
    mask[1] = True
    masks = {"blocks.0.attn1": mask, "blocks.1.attn1": mask.clone()}
    Plan.from_masks(masks, (1, 16, 12), [900.0, 100.0], (64, 64)).save(path)
    return path


@pytest.mark.slow
def test_build_compiles_each_pattern_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("CALIBATT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    arguments = ["build", str(random_plan(tmp_path / "p")), "--head-dim", "64", "--arch", "sm_90"]
    assert run(arguments) == 0
    assert "1 of 1 kernels are ready" in capsys.readouterr().out
    assert list((tmp_path / "cache").rglob("*"))
    assert run(arguments) == 0
    assert "1 were there before" in capsys.readouterr().out
    assert run([*arguments, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    # Of two sites one step each; the other keeps every block.
    assert (said["generated"], said["table"], said["dense"]) == (2, 0, 2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--arch", "sm_90"], "--head-dim"),
        (["--arch", "sm_75", "--head-dim", "64"], "sm_80 or newer"),
        (["--arch", "hopper", "--head-dim", "64"], "--arch"),
    ],
)
def test_build_refuses(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(["build", str(random_plan(tmp_path / "p")), *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to build for")
def test_build_without_a_gpu_asks_for_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["build", str(random_plan(tmp_path / "p")), "--head-dim", "64"]) == 2
    assert "give --arch" in capsys.readouterr().err
