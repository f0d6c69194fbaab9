"""Masks over keys by the portable kernels: interpreted, and compiled for several GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.slow
def test_masks_over_keys_equal_the_reference(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "CALIBATT_CACHE_DIR": str(tmp_path),
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parents[2] / "support" / "interpreted_padding.py")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == 31
    for result in results:
        assert result["error"] <= 5e-6, result
        # The shift of a row is that of keys that count.
        assert not result["repairs"] or "none" not in result["case"], result
