"""`calibatt calibrate` and `calibatt inspect --validate` on the tiny pipeline."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
import typer

from calibatt_compiler.calibration import (
    CalibrationConfig,
    SelectionConfig,
    plan_from_run,
    validate_run,
)
from calibatt_compiler.cli import options
from calibatt_compiler.cli.app import run
from calibatt_compiler.plan import Plan

VIDEO = ["--height", "112", "--width", "144", "--frames", "9", "--steps", "2"]
COMMON = ["--set", "max_sequence_length=16", "--guidance", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def calibrated(tiny_wan_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plan files of two calibrations, `plan.calibatt` and `other.calibatt`, with energies."""
    folder = tmp_path_factory.mktemp("calibrated")
    refined = ["--share-steps", "0.9", "--merge-budget", "0.02", "--rho", "1"]
    refined += ["--gamma", "0.5", "--anchor-rows", "2"]
    two = ["--prompt", "a big rabbit runs", "--prompt", "a tree", *refined]
    for name, arguments in (("plan", two), ("other", ["--prompt", "the bird", "--seed", "50"])):
        out = ["--out", str(folder / f"{name}.calibatt"), "--block", "16", "--keep-energies"]
        assert run(["calibrate", str(tiny_wan_folder), *VIDEO, *COMMON, *out, *arguments]) == 0
    return folder


def test_options_of_calibrate_reach_the_plan(
    calibrated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = Plan.load(calibrated / "plan.calibatt")
    folder = calibrated / "plan.calibatt.calibration"
    assert plan == plan_from_run(folder, rho=1, share_steps=0.9, merge_budget=0.02, gamma=0.5)
    assert plan.metadata.thresholds["gamma"] == 0.5
    assert plan.metadata.thresholds["anchor_rows"] == 2
    assert plan.metadata.quality["merge_added_density"] > 0
    assert run(["inspect", str(calibrated / "plan.calibatt")]) == 0
    assert "by merging intervals" in capsys.readouterr().out


def test_inspect_validates_and_raises(
    calibrated: Path, tiny_wan_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, held_out = calibrated / "plan.calibatt", calibrated / "other.calibatt.calibration"
    expected = validate_run(held_out, file, margin=0.01)
    assert expected.flagged
    raised = calibrated / "raised.calibatt"
    arguments = ["inspect", str(file), "--margin", "0.01", "--json"]
    assert run([*arguments, "--validate", str(held_out), "--raise", str(raised)]) == 0
    stored = json.loads(capsys.readouterr().out)["validation"]
    assert stored == json.loads(json.dumps(expected.to_dict()))

    live = ["--validate", str(tiny_wan_folder), "--prompt", "the bird", "--seed", "50"]
    assert run([*arguments, *live, *COMMON]) == 0
    assert json.loads(capsys.readouterr().out)["validation"] == stored

    plan, new = Plan.load(file), Plan.load(raised)
    settings = {
        **plan.metadata.thresholds,
        **{f"raised:{n}": v for n, v in expected.raised().items()},
    }
    assert new.metadata.thresholds == settings
    assert new.density() > plan.density()
    # Raised again, what was added before stays.
    calibrated_again = calibrated / "raised.calibatt.calibration"
    calibrated_again.symlink_to(calibrated / "plan.calibatt.calibration")
    twice = calibrated / "twice.calibatt"
    arguments = ["inspect", str(raised), "--margin", "0", "--validate", str(held_out)]
    assert run([*arguments, "--raise", str(twice)]) == 0
    printed = capsys.readouterr()
    assert "mean share kept" in printed.out
    if twice.exists():
        again = Plan.load(twice).metadata.thresholds
        assert all(again[name] >= value for name, value in settings.items())
    else:
        assert "no site is flagged" in printed.err


def test_inspect_says_when_it_validates_nothing(
    calibrated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = calibrated / "other.calibatt"
    out = calibrated / "none.calibatt"
    arguments = ["inspect", str(file), "--validate", f"{file}.calibration", "--raise", str(out)]
    assert run(arguments) == 0
    printed = capsys.readouterr()
    assert "this validates nothing" in " ".join(printed.out.split())
    assert "every site keeps its thresholds" in printed.out
    assert "was not written" in printed.err
    assert not out.exists()
    assert run(["inspect", str(file), "--raise", str(out)]) == 2
    assert "--raise goes by a validation" in capsys.readouterr().err


@pytest.mark.slow
def test_dry_run_tells_and_writes_nothing(
    tiny_wan_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "p.calibatt"
    arguments = ["calibrate", str(tiny_wan_folder), *VIDEO, *COMMON, "--out", str(out)]
    assert run([*arguments, "--prompt", "a tree", "--block", "16", "--dry-run"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for word in ("time about", "1 inputs x", "host memory at most", "disk", "of plan"):
        assert word in printed
    assert "scored" not in printed
    more = ["--prompt", "a tree", "--block", "16", "--gamma", "0.87", "--anchor-rows", "3"]
    assert run([*arguments, *more, "--dry-run"]) == 0
    assert "for 1 that are scored for repetition" in " ".join(capsys.readouterr().out.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_token_order_is_chosen_and_said(
    tiny_wan_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "p.calibatt"
    arguments = ["calibrate", str(tiny_wan_folder), *VIDEO, *COMMON, "--block", "16"]
    arguments += ["--out", str(out), "--prompt", "a tree", "--token-order"]
    assert run([*arguments, "spiral"]) == 2
    assert "2x8xall" in capsys.readouterr().err
    assert run([*arguments, "auto", "--dry-run"]) == 0
    assert "to survey token orders" in " ".join(capsys.readouterr().out.split())
    assert not list(tmp_path.iterdir())

    assert run([*arguments, "auto"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    survey = json.loads((tmp_path / "p.calibatt.calibration" / "order.json").read_text())
    assert f"token order {survey['chosen']}; blocks kept" in printed
    for name, density in survey["density"].items():
        assert f"{name} {density:.1%}" in printed
    assert str(Plan.load(out).token_order) == survey["chosen"]
    assert run(["inspect", str(out)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "orders surveyed" in printed
    assert "order_density" not in printed


@pytest.mark.slow
def test_tune_searches_and_says_what_it_costs(
    tiny_wan_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("optuna", reason="the extra `tune`")
    monkeypatch.setattr("calibatt_compiler.backend._inductor", lambda gm, *_: gm.forward)
    out = tmp_path / "search"
    search = ["--trials", "2", "--proxy", "--block", "16", "--out", str(out)]
    arguments = ["tune", str(tiny_wan_folder), *VIDEO, *COMMON, "--prompt", "a tree", *search]
    assert run([*arguments, "--psnr", "30"]) == 2
    assert "generates no video" in capsys.readouterr().err

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", _declined)
    assert run(arguments) == 1
    printed = " ".join(capsys.readouterr().out.split())
    for words in ("1 inputs to run", "2 trials x", "no video", "in all"):
        assert words in printed
    assert not out.exists()

    assert run([*arguments, "--yes", "--speed-up", "1e-3"]) == 0
    printed = capsys.readouterr().out
    assert "chosen" in printed
    found = json.loads((out / "tuning.json").read_text())
    assert len(found["trials"]) == 2
    assert Plan.load(out / "plan.calibatt").digest == found["chosen"]["digest"]

    assert run([*arguments, "--yes", "--speed-up", "1e9"]) == 1
    printed = capsys.readouterr().out
    assert "0 trials x" in " ".join(printed.split())
    assert "no trial reached the goal" in printed


def test_tune_searches_zones_unless_masks_are_asked_for(
    tiny_wan_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("optuna", reason="the extra `tune`")
    monkeypatch.setattr("calibatt_compiler.backend._inductor", lambda gm, *_: gm.forward)
    out = tmp_path / "search"
    search = ["--trials", "2", "--block", "16", "--out", str(out), "--yes"]
    arguments = ["tune", str(tiny_wan_folder), *VIDEO, *COMMON, "--prompt", "a tree", *search]
    for more, message in (
        (["--form", "zones", "--proxy"], "kept mass says nothing of zones"),
        (["--form", "zones", "--pooled", "1,4"], "'pooled'"),
        (["--form", "octaves"], "masks, zones or None"),
    ):
        assert run([*arguments, *more]) == 2
        assert message in capsys.readouterr().err
    assert not out.exists()

    assert run([*arguments, "--psnr", "1"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for words in ("2 trials x", "of sums on disk", "asked", "chosen"):
        assert words in printed
    chosen = Plan.load(out / "plan.calibatt").metadata.thresholds["density"]
    assert chosen in (0.25, 0.1581)  # the second by bisection
    assert run([*arguments, "--form", "masks"]) == 2
    assert "holds another search" in capsys.readouterr().err


def _declined(*_: object, abort: bool) -> None:
    assert abort
    raise typer.Abort


def test_options_have_the_defaults_of_the_library() -> None:
    given = {**vars(options.Selection()), **options.Observation().of_config()}
    given |= {**options.Storage().of_config(), "component": options.Place().component}
    assert CalibrationConfig(**given) == CalibrationConfig()
    known = {each.name for each in fields(SelectionConfig)}
    assert known - vars(options.Selection()).keys() == {"step_groups", "zone_numbers"}


def test_what_most_people_need_fits_a_screen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["calibrate", "--help"]) == 0
    common, advanced = capsys.readouterr().out.split("Advanced")
    assert len(common.splitlines()) <= 50
    assert "--A" in common
    assert "--merge-budget" in advanced
    assert "--dtype" in advanced
