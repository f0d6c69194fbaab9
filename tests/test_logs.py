"""The one switch for logs, and what a bug report needs."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from calibatt_compiler import logs
from calibatt_compiler.cli.app import run


@pytest.fixture(autouse=True)
def _quiet_again() -> Iterator[None]:
    top = logging.getLogger("calibatt")
    before = (list(top.handlers), top.propagate, [logs.logger(area).level for area in logs.AREAS])
    yield
    top.handlers, top.propagate = before[0], before[1]
    for area, level in zip(logs.AREAS, before[2], strict=True):
        logs.logger(area).setLevel(level)


def test_areas_are_told_apart(capsys: pytest.CaptureFixture[str]):
    logs.start("kernels")
    logs.logger("kernels").debug("a kernel")
    logs.logger("passes").debug("a pass")
    told = capsys.readouterr().err
    assert "calibatt.kernels: a kernel" in told
    assert "a pass" not in told


def test_all_is_every_area_once(capsys: pytest.CaptureFixture[str]):
    logs.start("all")
    logs.start("passes,kernels")
    logs.logger("calibration").debug("a run")
    assert capsys.readouterr().err.count("a run") == 1


def test_a_wrong_name_is_warned_of(capsys: pytest.CaptureFixture[str]):
    logs.start("kernel")
    told = capsys.readouterr().err
    assert "'kernel'" in told
    assert "did you mean 'kernels'" in told


def test_nothing_is_told_unasked(capsys: pytest.CaptureFixture[str]):
    logs.start("")
    logs.logger("passes").debug("a pass")
    assert not capsys.readouterr().err


@pytest.mark.slow
def test_passes_tell_times_and_counts():
    code = """
import torch, torch.nn.functional as F
import calibatt_compiler
class Attention(torch.nn.Module):
    def forward(self, x):
        q = x.unflatten(-1, (2, 16)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention()
    def forward(self, hidden_states, timestep):
        return self.attn(hidden_states) * timestep
mask = torch.ones(1, 2, 2, 2, dtype=torch.bool)
plan = calibatt_compiler.Plan.from_masks({"attn": mask}, (1, 1, 32), [500.0], (16, 16))
model = torch.compile(Model(), backend="calibatt", options={"plan": plan})
with torch.no_grad():
    model(hidden_states=torch.randn(1, 32, 32), timestep=torch.tensor([500.0]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "CALIBATT_LOGS": "passes"},
    )
    lines = [line for line in done.stderr.splitlines() if "calibatt.passes" in line]
    assert any("find_sites:" in line and "1 attention calls" in line for line in lines)
    assert any("bind_sites:" in line and "1 bound" in line and " ms" in line for line in lines)


def test_env_says_what_a_report_needs(capsys: pytest.CaptureFixture[str]):
    assert run(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {"python", "platform", "torch", "calibatt", "cpu", "kernel cache"} <= facts.keys()
    assert run(["env"]) == 0
    assert f"torch: {facts['torch']}" in capsys.readouterr().out
