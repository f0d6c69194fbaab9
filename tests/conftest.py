"""A whole text-to-video pipeline, tiny and random, that all tests share."""

from __future__ import annotations

import datetime
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import wan_pipeline

GRID = (3, 7, 9)
"""Latent tokens (frames, height, width) of the tiny pipeline at `SIZE`: 189, no round number."""

SIZE = {"height": 112, "width": 144, "num_frames": 9}
"""Pixels and frames that make `GRID`."""


@pytest.fixture(scope="session")
def tiny_wan_grid() -> tuple[int, int, int]:
    """Latent tokens of `tiny_wan_pipeline` called with `tiny_wan_arguments`."""
    return GRID


@pytest.fixture(scope="session")
def tiny_wan_arguments() -> dict[str, int]:
    """Arguments for a fast run of `tiny_wan_pipeline`: `pipe(prompt=..., **arguments)`.

    Three steps with guidance, so two transformer calls a step, 189 tokens each.
    """
    return {**SIZE, "num_inference_steps": 3, "max_sequence_length": 16}


@pytest.fixture(scope="session")
def tiny_wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline in diffusers format, for `WanPipeline.from_pretrained` and commands."""
    folder = tmp_path_factory.mktemp("tiny-wan") / "model"
    wan_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_wan_pipeline() -> Any:
    """One `WanPipeline` for the whole session: leave it as you find it (compile a copy)."""
    return wan_pipeline()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-gpu-run",
        action="store_true",
        help="write counts of this run to tests/gpu-last-run.json; with -m gpu, on a GPU",
    )


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Write down what a run on a GPU has shown, where the next reader finds it."""
    if not config.getoption("--record-gpu-run") or not torch.cuda.is_available():
        return
    counts = {
        name: len(terminalreporter.stats.get(name, ()))
        for name in ("passed", "failed", "error", "skipped")
    }
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True, check=False)
    record = {
        "date": datetime.date.today().isoformat(),
        "commit": head.stdout.strip() or "unknown: not a git checkout",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        **counts,
    }
    path = folder / "gpu-last-run.json"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
