"""What the benchmarks write down."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from calibatt_compiler.files import write_text


def write_record(path: Path, device: str, results: Sequence[Any]) -> None:
    """Write results, which are dataclasses, as JSON with device and versions."""
    import triton

    path.parent.mkdir(parents=True, exist_ok=True)
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    record = {"device": device, **versions, "results": [asdict(result) for result in results]}
    write_text(path, json.dumps(record, indent=1))
