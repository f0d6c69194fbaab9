"""Campaigns run, repeat a case, count what fails, and their figures make a table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fenced import FENCE, LAYOUTS, Fences

from calibatt_compiler.kernels.reference.attention import ReferenceAttention
from calibatt_compiler.plan import BlockPattern

FOLDER = Path(__file__).parents[1] / "campaigns"
DYING = """
import os, sys
from campaign import run

def case(draw, counts, options):
    counts["drawn"] += 1
    number = draw.random()
    if os.environ["FAULT"] == "die" and number < 0.1:
        os.kill(os.getpid(), 9)
    return "wrong: too small" if number < 0.1 else None

sys.exit(run(None, case))
"""


def campaign(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / f"{name}.py"), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ways", ["--cases", "2", "--inductor", "0", "--only-family", "wan"]),
        ("kernels", ["--cases", "20", "--workers", "2"]),
        ("kills", ["--cases", "1", "--only", "write"]),
    ],
)
def test_a_campaign_runs_and_makes_a_table(
    name: str, options: list[str], tmp_path: Path, section_of: Callable[[Path], str]
) -> None:
    done = campaign(name, "--minutes", "5", "--seed", "1", "--out", str(tmp_path), *options)
    assert done.returncode == 0, done.stdout + done.stderr
    path = tmp_path / "campaigns.json"
    cases = json.loads(path.read_text())["rows"][0]["cases"]
    assert cases == int(options[1])
    assert f"| {name} | {cases} | 0 | " in section_of(path)


@pytest.mark.parametrize(("fault", "failures"), [("none", 4), ("die", 2)])
def test_what_fails_is_counted_and_can_be_repeated(
    fault: str, failures: int, tmp_path: Path
) -> None:
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    command = [sys.executable, str(script), "--seed", "2"]
    support = str(FOLDER.parent / "support")
    environment = {**os.environ, "FAULT": fault, "PYTHONPATH": support}
    options = ["--cases", "40", "--workers", "2"]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *more], env=environment, capture_output=True, text=True, check=False
        )

    done = run(*options)
    assert done.returncode == 1, done.stderr
    said = [line for line in done.stdout.splitlines() if "--case" in line]
    assert len(said) == failures
    assert ("dead process: status -9" in done.stdout) == (fault == "die")
    name = said[0].split("--case ")[1].split()[0]
    again = run("--case", name)
    assert again.returncode == (1 if fault == "none" else -9)


@pytest.mark.parametrize("layout", sorted(set(LAYOUTS)))
def test_fences_show_what_is_read_or_written_outside(layout: str) -> None:
    values = torch.randn(2, 3, 5, 8)
    fences = Fences()
    x = fences.operand("q", values, layout)
    assert torch.equal(x, values)
    assert fences.broken() is None
    place = x.storage_offset()
    last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    whole = x.as_strided((place + 1 + last,), (1,), 0)
    assert not whole[:place].isfinite().any()
    assert int(whole.isfinite().sum()) == values.numel()
    whole[place - 1] = 0
    assert fences.broken() == "q was written to"


def test_fences_around_outputs() -> None:
    fences = Fences()
    q, k, v = torch.randn(3, 1, 2, 64, 16)
    kernel = ReferenceAttention(BlockPattern.dense(2, 64, 64, (32, 32)))
    with fences.around_outputs():
        out = kernel(q, k, v)
    assert out.isfinite().all()
    assert out.transpose(1, 2).is_contiguous()
    assert out.storage_offset() == FENCE
    assert fences.broken() is None
    out.as_strided((1,), (1,), FENCE + out.numel())[0] = 0
    assert fences.broken() == "something was written behind the output"
