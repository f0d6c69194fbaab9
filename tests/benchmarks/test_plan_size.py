"""The benchmark of plan sizes, small, and that its masks are what it says."""

from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def masks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("synthetic_masks", FOLDER / "synthetic_masks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_benchmark_runs_small(tmp_path: Path, section_of: Callable[[Path], str]):
    done = subprocess.run(
        [sys.executable, str(FOLDER / "plan_size.py"), "--small", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    masks, alike, zones = json.loads((tmp_path / "plan_size.json").read_text())["rows"]
    assert [told["form"] for told in (masks, alike, zones)] == ["masks", "zones", "zones"]
    assert [told["patterns"] for told in (masks, alike, zones)] == [18, 15, 15]
    assert alike["density"] == pytest.approx(masks["density"], rel=0.01)
    assert zones["density"] == pytest.approx(0.25, rel=0.01)
    assert "Aim, masks opened, every byte checked, in at most 5 s: **met**" in section_of(
        tmp_path / "plan_size.json"
    )
    assert "Aim, zones opened, every byte checked, in at most 0.1 s: **met**" in section_of(
        tmp_path / "plan_size.json"
    )
    assert 0 < masks["file MB"] < masks["bitmap MB"]
    for told in (masks, alike, zones):
        assert told["load s"] > 0


def test_masks_change_from_step_to_step_as_measured(masks: ModuleType):
    """Density and change within a quarter, or a fiftieth of all blocks, of what they are set to."""
    video = masks.Video(grid=(8, 30, 64), heads=24)
    steps = list(masks.site_masks(video, seed=1))
    again = next(iter(masks.site_masks(video, seed=1)))
    assert np.array_equal(steps[0], again)
    blocks = video.heads * video.blocks**2
    density = np.array([np.unpackbits(bits).sum() for bits in steps]) / blocks
    assert density == pytest.approx(masks.DENSITY, rel=0.25)
    pairs = itertools.pairwise(steps)
    change = np.array([np.unpackbits(a ^ b).sum() for a, b in pairs]) / blocks
    assert change == pytest.approx(masks.CHANGE, rel=0.5, abs=0.02)
    assert change[20:40].mean() == pytest.approx(np.mean(masks.CHANGE[20:40]), rel=0.25)
