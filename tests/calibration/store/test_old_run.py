"""A run folder that an earlier version wrote (commit f727573): it opens, goes on, gives its plans.

`old_run` holds one input of the model below, recorded with the settings of `CONFIG`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import calibatt_compiler
from calibatt_compiler.calibration import CalibrationConfig, SelectionConfig, plan_from_run
from calibatt_compiler.calibration.store import identity
from calibatt_compiler.errors import CalibrationError

OLD = Path(__file__).parent / "old_run"
CONFIG = CalibrationConfig(
    block=(16, 16),
    A=0.6,
    C=0.8,
    k=2.0,
    rho=0.4,
    gamma=0.5,
    anchor_rows=2,
    queries=2,
    grid=(2, 4, 8),
    num_steps=3,
    keep_energies="coarse",
    inductor=False,
    share_steps=0.9,
)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.arange(16.0).remainder(5).reshape(1, 1, 1, 16) - 2)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return scaled_dot_product_attention(x * self.q * (1 + timestep / 1000), x, x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.attention(x, timestep)


def test_it_goes_on_and_gives_its_plan(tmp_path: Path) -> None:
    config = replace(CONFIG, run_folder=shutil.copytree(OLD, tmp_path / "run"))
    with calibatt_compiler.calibration(Model(), config) as run:
        assert run.finished == ("00000",)
        with run.input("00000"):
            pass  # finished: not observed again
        plan = run.plan()
    assert patterns(plan) == ["fc120443"] * 3
    assert plan.metadata.quality == {
        "best_20_percent_share": 0.29753,
        "input_kept_mass": 0.824083,
        "share_steps_added_density": 0.041666666666666664,
        "repetitive_heads": 0.0,
    }
    other = replace(config, queries=4)
    with (
        pytest.raises(CalibrationError, match="something else"),
        calibatt_compiler.calibration(Model(), other),
    ):
        pass


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["fc120443", "9e4601f7", "9e4601f7"]),
        ({"rho": 1.0, "gamma": 0.5, "share_steps": None}, ["fc120443", "9e4601f7", "9e4601f7"]),
        ({"A": 0.3, "C": 0.3}, ["c6bbfc9d", "9f21e17b", "9f21e17b"]),
        ({"raised": {"attention": 0.1}}, ["d3f29bcc", "fc120443", "fc120443"]),
    ],
    ids=str,
)
def test_other_plans_are_made_from_it(settings: dict[str, object], expected: list[str]) -> None:
    assert patterns(plan_from_run(OLD, **settings)) == expected  # type: ignore[arg-type]


def patterns(plan: calibatt_compiler.Plan) -> list[str]:
    """Beginnings of the digests of the site's patterns, by step."""
    return [plan.sites["attention"].at(step).digest[:8] for step in range(plan.steps)]


def test_thresholds_that_were_recorded_need_no_energies() -> None:
    """As settings they are the same as none."""
    recorded = SelectionConfig(A=0.6, C=0.8, k=2.0, rho=0.4)
    assert plan_from_run(OLD, recorded) == plan_from_run(OLD, rho=0.4)


def test_what_a_run_depends_on_is_written_as_before() -> None:
    stored = json.loads((OLD / "run.json").read_text(encoding="utf-8"))
    assert identity.settings(CONFIG) == stored["settings"]
    assert identity.settings(CalibrationConfig(form="masks")) == {
        "block": [128, 128],
        "token_order": "raster",
        "A": None,
        "C": None,
        "k": None,
        "cfg": "conditional",
        "num_steps": None,
        "grid": None,
        "text": None,
        "component": "transformer",
        "keep_energies": False,
    }
