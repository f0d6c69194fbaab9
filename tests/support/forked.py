"""Calibrations in processes of their own, forked from one that has imported what they need.

A fresh process spends five seconds on imports, longer than such a calibration takes.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["diffusers.pipelines.wan.pipeline_wan", "calibatt_compiler.calibration"]
)


class Calibration:
    """`calibrate` with the pipeline of a folder, under way in another process.

    It prints the digest and the share of row-shared heads. With `meeting`, a file to meet at, it is
    rank `rank` of two. Its `fault` comes to rank 1 in its second input: "raise" or "hang".
    """

    def __init__(self, folder: Path, *, rank: int = 0, meeting: Path | None = None,
                 fault: str = "none", **arguments: Any) -> None:  # fmt: skip
        self._logs = tempfile.TemporaryDirectory()
        self._process = CONTEXT.Process(
            target=_calibrate, args=(self._logs.name, folder, rank, meeting, fault, arguments)
        )
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def result(self, timeout: float = 240) -> tuple[int | None, str, str]:
        """Wait for its end; return its exit code and what it wrote to stdout and stderr."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        written = [Path(self._logs.name, name).read_text() for name in ("out", "err")]
        return self._process.exitcode, written[0], written[1]


def _calibrate(
    logs: str,
    folder: Path,
    rank: int,
    meeting: Path | None,
    fault: str,
    arguments: dict[str, Any],
) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(logs, name), os.O_WRONLY | os.O_CREAT), descriptor)
    import torch
    from diffusers import WanPipeline

    from calibatt_compiler.calibration import calibrate

    torch.set_num_threads(1)
    pipe = WanPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if meeting is not None:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2
        )
    calls = 0

    def hook(*_: object) -> None:
        nonlocal calls
        calls += 1
        if fault == "none" or calls <= 6:  # its first input
            return
        if rank == 0:
            time.sleep(0.05)
        elif fault == "raise":
            raise ValueError("no such luck")
        else:
            time.sleep(600)

    pipe.transformer.register_forward_pre_hook(hook)
    plan = calibrate(pipe, **arguments)
    print(plan.metadata.quality.get("repetitive_heads", 0.0), plan.digest, flush=True)
