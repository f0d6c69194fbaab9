"""Energies kept in a byte each, and where kept energies lie while their input runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import calibatt_compiler
from calibatt_compiler.calibration import CalibrationConfig, plan_from_run
from calibatt_compiler.calibration.store.energies import EnergyBuffer
from calibatt_compiler.calibration.store.run_folder import RunStore
from calibatt_compiler.calibration.store.uint8_energies import NOTHING, decode, encode
from calibatt_compiler.errors import OptionError

STEPS = (900.0, 500.0, 100.0)


class Attention(nn.Module):
    """One attention call of 2 heads over 150 tokens."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        heads = x.view(x.shape[0], 150, 2, 16).transpose(1, 2) * (1 + timestep.view(-1, 1, 1, 1))
        return scaled_dot_product_attention(heads, heads, heads)


class Model(nn.Module):
    """Holds the call, which is named after its module."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.attention(x, timestep)


def config(folder: Path, **settings: object) -> CalibrationConfig:
    common = CalibrationConfig(block=(16, 16), A=0.6, C=0.6, run_folder=folder, keep_energies=True)
    return replace(common, **settings)  # type: ignore[arg-type]


def calibrate(settings: CalibrationConfig, batch: int = 1) -> calibatt_compiler.Plan:
    model = Model()
    with calibatt_compiler.calibration(model, settings) as run:
        for seed in range(2):
            x = 0.05 * torch.randn(batch, 150, 32, generator=torch.Generator().manual_seed(seed))
            with run.input():
                for timestep in STEPS:
                    model(x, timestep=torch.tensor([timestep / 1000]))
        return run.plan()


def test_a_code_is_within_its_error_and_keeps_the_order() -> None:
    generator = np.random.default_rng(0)
    energy = np.sort(np.exp2(-31 * generator.random(10_000))).astype(np.float32)
    codes = encode(energy)
    assert np.abs(decode(codes) / energy - 1).max() <= 2 ** (1 / 16) - 1 + 1e-6
    assert (np.diff(codes.astype(int)) <= 0).all()
    assert encode(np.array([0, 1e-12, 1.0], np.float32)).tolist() == [NOTHING, NOTHING, 0]
    assert decode(np.array([NOTHING, 0], np.uint8)).tolist() == [0, 1]
    assert (encode(decode(np.arange(256, dtype=np.uint8))) == np.arange(256)).all()


@pytest.mark.parametrize("batch", [1, 2])
def test_coarse_energies_are_those_of_a_full_run(tmp_path: Path, batch: int) -> None:
    runs = {}
    for kind in (True, "coarse"):
        plan = calibrate(config(tmp_path / str(kind), keep_energies=kind), batch)
        store = RunStore(tmp_path / str(kind))
        record = store.record(store.names()[0])
        runs[kind] = plan, store.energy(record, record.sites[0].name, 1)
    full, coarse = runs[True], runs["coarse"]
    assert full[0] == coarse[0], "masks are selected before energies are rounded"
    assert full[1].shape == coarse[1].shape == (batch, 2, 10, 10)
    assert np.abs(coarse[1] / full[1].clip(1e-9) - 1)[full[1] > 1e-8].max() < 0.045


def test_masks_are_selected_again_by_coarse_energies(tmp_path: Path) -> None:
    calibrate(config(tmp_path / "run", keep_energies="coarse"))
    exact = calibrate(config(tmp_path / "exact", A=0.9, C=0.9))
    again = plan_from_run(tmp_path / "run", A=0.9, C=0.9)
    assert again.density() == pytest.approx(exact.density(), rel=0.05)


def test_kept_energies_wait_on_disk_and_are_gone_when_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting: list[int] = []
    keep = EnergyBuffer.keep

    def counting(self: EnergyBuffer, *arguments: object) -> object:
        mapped = keep(self, *arguments)  # type: ignore[arg-type]
        assert isinstance(mapped, np.memmap)
        waiting.append(len(list(tmp_path.rglob("kept-*.npy"))))
        return mapped

    monkeypatch.setattr(EnergyBuffer, "keep", counting)
    calibrate(config(tmp_path / "run", cfg="both"))
    assert waiting == [1, 2, 3] * 2
    assert not list(tmp_path.rglob("kept-*.npy"))


def test_votes_of_one_call_are_kept_behind_one_another(tmp_path: Path) -> None:
    buffer = EnergyBuffer(tmp_path / "energies")
    parts = [np.full((votes, 1, 2, 3), votes, np.float32) for votes in (1, 2, 3)]
    mapped = None
    for part in parts:
        mapped = buffer.keep(part, mapped)
    assert mapped is not None
    assert (np.asarray(mapped) == np.concatenate(parts)).all()
    assert len(list((tmp_path / "energies").iterdir())) == 1


def test_another_word_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="keep_energies"):
        config(tmp_path, keep_energies="fine")
