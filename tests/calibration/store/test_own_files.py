"""A run folder holds what the run wrote, and what is not the run's is left alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import calibatt_compiler
from calibatt_compiler.calibration import CalibrationConfig, calibrate
from calibatt_compiler.calibration.store.run_folder import RunStore
from calibatt_compiler.errors import CalibrationError, OptionError, PipelineError

OWN = ("thesis.txt", "rank-table.csv", ".notes.tmp", ".input-a.tmp", "spool-of-thread/a", "spool/b")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Attention()

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.layer(x) * (1 + timestep.view(-1, 1, 1) / 1000)
        return out


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def sample(model: nn.Module, seed: int) -> None:
    x = torch.randn(1, 48, 32, generator=torch.Generator().manual_seed(seed))
    for timestep in (900.0, 100.0):
        x = model(x, timestep=torch.tensor([timestep]))


@pytest.fixture
def config(tmp_path: Path) -> CalibrationConfig:
    return CalibrationConfig(
        grid=(1, 6, 8), block=(16, 16), form="masks", run_folder=tmp_path / "run", progress=False
    )


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("energies", [False, True])
def test_files_of_the_users_own_stay(
    model: Model, config: CalibrationConfig, tmp_path: Path, restart: bool, energies: bool
) -> None:
    folder = tmp_path / "run"
    for name in OWN:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    config = replace(config, restart=restart, keep_energies=energies)
    for _ in range(2):
        with calibatt_compiler.calibration(model, config) as run:
            with run.input():
                sample(model, 0)
            run.plan().save(folder / "plan.calibatt")
    # What a killed process leaves is swept all the same.
    for name in ("rank-00001", ".run-abcdefgh.tmp.json"):
        (folder / name).touch()
    (folder / "spool" / "000001.npy").touch()
    with calibatt_compiler.calibration(model, config) as run:
        assert not (folder / "spool" / "000001.npy").exists()
        assert not (folder / "rank-00001").exists()
        run.discard()
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {*OWN, "plan.calibatt"}
    assert all((folder / name).read_text() == name for name in OWN)


@pytest.mark.parametrize("name", ["lock", "run.json"])
def test_files_in_the_way_are_refused(
    name: str, model: Model, config: CalibrationConfig, tmp_path: Path
) -> None:
    path = tmp_path / "run" / name
    path.parent.mkdir()
    path.write_text('{"mine": 1}')
    for restart in (False, True):
        with (
            pytest.raises(CalibrationError, match=r"no lock of|something else"),
            calibatt_compiler.calibration(model, replace(config, restart=restart)),
        ):
            pass
        assert path.read_text() == '{"mine": 1}'


def test_a_folder_deleted_or_joined_in_mid_run(
    model: Model, config: CalibrationConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with calibatt_compiler.calibration(model, config) as run:
        with run.input("a"):
            sample(model, 0)
        plan = run.plan()
        shutil.copy(folder / "input-a.safetensors", folder / "input-b.safetensors")
        shutil.copy(folder / "input-a.safetensors", folder / "input-not ours.safetensors")
        assert run.finished == ("a",)
        assert not run.has("b")
        assert run.plan() == plan
        with pytest.raises(CalibrationError, match="came into the run folder"), run.input("b"):
            sample(model, 1)
        (folder / "input-b.safetensors").unlink()
        shutil.rmtree(folder)
        with pytest.raises(CalibrationError, match="deleted or replaced"), run.input("b"):
            sample(model, 1)
        with pytest.raises(CalibrationError, match="damaged"):
            run.plan()


def test_a_folder_without_a_finished_input_is_nobodys(
    model: Model, config: CalibrationConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(KeyError), calibatt_compiler.calibration(model, config) as run, run.input():
        raise KeyError
    other = replace(config, A=0.5, C=0.6)
    with calibatt_compiler.calibration(model, other) as run, run.input():
        sample(model, 0)
    assert json.loads((folder / "run.json").read_text())["settings"]["A"] == 0.5
    assert RunStore(folder).names() == ["00000"]
    with (
        pytest.raises(CalibrationError, match="something else"),
        calibatt_compiler.calibration(model, config),
    ):
        pass


def test_a_mistake_in_the_arguments_is_an_error_of_ours_and_locks_nothing(
    tiny_wan_pipeline: Any, tiny_wan_arguments: dict[str, int], tmp_path: Path
) -> None:
    out = tmp_path / "p.calibatt"
    config = CalibrationConfig(block=(32, 32))
    arguments = {**tiny_wan_arguments, "num_inference_steps": 1}
    with pytest.raises(PipelineError, match="divisible") as caught:
        calibrate(tiny_wan_pipeline, ["a"], out=out, config=config, **{**arguments, "height": 115})
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(OptionError, match="sets generator itself"):
        calibrate(tiny_wan_pipeline, [{"prompt": "a", "generator": 3}], config=config, **arguments)
    assert calibrate(tiny_wan_pipeline, ["a"], out=out, config=config, **arguments).steps == 1
