"""The synthetic attention of `benchmarks/token_orders.py`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "token_orders.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("token_orders", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_density_of_attention_along_a_line(script):
    """One row of 64 tokens in blocks of 16: the sums can be had by hand."""
    places = torch.tensor([[0.0, 0.0, float(x)] for x in range(64)])
    starts = torch.arange(0, 64, 16)
    weight = np.exp(-np.abs(np.subtract.outer(np.arange(64), np.arange(64))) / 8)
    weight /= weight.sum(1, keepdims=True)
    energy = weight[:16].mean(0).reshape(4, 16).sum(1)
    assert energy[0] < 0.8 < energy[:2].sum()
    rows = torch.tensor([0])
    assert script.density(places, (1, 1, 8), starts, rows, 0.8) == 0.5
    assert script.density(places, (1, 1, 8), starts, rows, float(energy[0]) - 0.01) == 0.25
    # A block of text before it: the first piece is a short one.
    cut = torch.tensor([0, 10, 26, 42, 58])
    assert script.density(places, (1, 1, 8), cut, rows, 0.01) == 0.2


def test_the_table_is_printed(script, monkeypatch, capsys, tmp_path, section_of):
    arguments = [
        "synthetic",
        "--grid",
        "3",
        "6",
        "8",
        "--block",
        "16",
        "--rows",
        "4",
        "--text",
        "5",
    ]
    arguments += ["--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["token_orders.py", *arguments])
    script.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[0] == "raster"
    assert len(lines) > 3
    assert all(0 < float(x) <= 1 for line in lines[1:] for x in line.split()[1:6])
    assert "| synthetic | 5 | 16 | raster | 0." in section_of(tmp_path / "token_orders.json")
