"""Settings and the threshold formula."""

from __future__ import annotations

import copy
import inspect
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import calibatt_compiler.calibration
from calibatt_compiler.calibration import (
    CalibrationConfig,
    ObservationConfig,
    RunConfig,
    SelectionConfig,
    StorageConfig,
    Thresholds,
    plan_from_run,
)
from calibatt_compiler.errors import OptionError

OLD_RUN = Path(__file__).parent / "store" / "old_run"


def test_thresholds_follow_the_formula() -> None:
    thresholds = Thresholds(A=0.84, C=0.99, k=16.0)
    assert thresholds.at(0, 50) == pytest.approx(0.99)
    assert thresholds.at(7, 50) == pytest.approx(0.84 + 0.15 * math.exp(-16 * 7 / 50))
    assert thresholds.at(49, 50) == pytest.approx(0.84, abs=1e-6)


def test_defaults_depend_on_the_number_of_steps() -> None:
    config = CalibrationConfig()
    assert config.thresholds(50) == Thresholds(0.84, 0.99, 16.0)
    assert config.thresholds(9) == Thresholds(0.84, 0.99, 16.0)
    assert config.thresholds(8) == Thresholds(0.763, 0.863, 5.64)
    assert CalibrationConfig(A=0.5).thresholds(4) == Thresholds(0.5, 0.863, 5.64)
    assert CalibrationConfig(C=0.9, k=0).thresholds(50) == Thresholds(0.84, 0.9, 0)


@given(a=st.floats(0.01, 1), c=st.floats(0.01, 1), k=st.floats(0, 100), steps=st.integers(1, 60))
def test_thresholds_stay_between_their_ends(a: float, c: float, k: float, steps: int) -> None:
    values = [Thresholds(a, c, k).at(step, steps) for step in range(steps)]
    assert all(min(a, c) - 1e-12 <= value <= max(a, c) + 1e-12 for value in values)
    assert values == sorted(values, reverse=c >= a)


@pytest.mark.parametrize(
    "wrong",
    [
        {"block": (100, 128)},
        {"block": (128,)},
        {"block": (2048, 128)},
        {"block": (0, 128)},
        {"block": 128},
        {"A": 0},
        {"A": 1.5},
        {"C": math.nan},
        {"A": "0.8"},
        {"k": -1},
        {"k": math.inf},
        {"rho": 2},
        {"rho": None},
        {"share_steps": 0},
        {"share_steps": 1.5},
        {"merge_budget": 1},
        {"merge_budget": -0.1},
        {"num_steps": 0},
        {"num_steps": 2.5},
        {"num_steps": True},
        {"grid": (1, 2)},
        {"grid": (1, 2, -3)},
        {"cfg": "uncond"},
        {"text": "middle"},
        {"component": ""},
        {"inductor": "yes"},
        {"keep_run": None},
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_named(wrong: dict[str, object]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))) as caught:
        CalibrationConfig(**wrong)  # type: ignore[arg-type]
    assert caught.value.expected
    assert caught.value.remedy


def test_lists_are_taken_for_tuples() -> None:
    config = CalibrationConfig(block=[64, 32], grid=[3, 4, 5])  # type: ignore[arg-type]
    assert (config.block, config.grid) == ((64, 32), (3, 4, 5))


def test_settings_are_those_of_four_parts_each_of_one() -> None:
    parts = (ObservationConfig, SelectionConfig, RunConfig, StorageConfig)
    names = [each.name for part in parts for each in fields(part)]
    assert sorted(names) == sorted(each.name for each in fields(CalibrationConfig))
    for part in parts:
        for each in fields(part):
            assert getattr(part(), each.name) == getattr(CalibrationConfig(), each.name)


def test_a_selection_is_taken_from_larger_settings() -> None:
    config = CalibrationConfig(A=0.5, rho=0.7, pooled=1, keep_energies=True)
    selection = SelectionConfig.of(config)
    assert selection == SelectionConfig(A=0.5, rho=0.7, pooled=1, form="masks")
    assert SelectionConfig.of(config, A=None, pooled=0) == SelectionConfig(rho=0.7, form="masks")
    assert SelectionConfig(C=0.9).completed(Thresholds(0.1, 0.2, 3)) == Thresholds(0.1, 0.9, 3)
    with pytest.raises(TypeError, match="block"):  # stored masks can't be given other blocks
        SelectionConfig.of(config, block=(64, 64))
    with pytest.raises(OptionError, match="rho"):
        SelectionConfig.of(config, rho=2)


@pytest.mark.parametrize("power", [None, 1.0])
def test_a_removed_setting_is_refused_by_name(power: float | None) -> None:
    config = CalibrationConfig()
    for make in (
        lambda: SelectionConfig(sample_power=power),
        lambda: CalibrationConfig(sample_power=power, keep_energies=True),
        lambda: SelectionConfig.of(config, sample_power=power),
        lambda: replace(config, sample_power=power),
        lambda: plan_from_run(OLD_RUN, sample_power=power),
    ):
        with pytest.raises(OptionError, match="removed") as caught:
            make()
        assert "zones, the default and better: see docs/decisions/0016" in str(caught.value)
    assert "A" in inspect.signature(SelectionConfig).parameters
    assert copy.deepcopy(config) == config


def test_the_package_is_the_function_of_its_name() -> None:
    import torch

    assert callable(calibatt_compiler.calibration)
    context = calibatt_compiler.calibration(torch.nn.Linear(2, 2))
    assert hasattr(context, "__enter__")
    assert callable(calibatt_compiler.calibration.calibrate)
