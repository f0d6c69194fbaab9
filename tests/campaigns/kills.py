"""Kills commands at random moments, as a machine that loses power does, and lets them go on.

A case writes a plan over another, calibrates, compiles a plan's kernels or searches thresholds in a
forked process, which is killed by SIGKILL up to three times and then runs to its end. A plan that
is there is whole after each kill; inputs that were finished stay as they are; the end finds what an
undisturbed run finds; nothing is left over that a whole run does not leave.

python tests/campaigns/kills.py --minutes 5 --seed 7
python tests/campaigns/kills.py --case 7-0-35
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import tiny_models
import torch
from campaign import parser_of, run

from calibatt_compiler import Plan
from calibatt_compiler.build import PlanSpecs
from calibatt_compiler.calibration import (
    CalibrationConfig,
    TuningConfig,
    calibrate,
    tune,
)
from calibatt_compiler.kernels.baked.compiler import KernelCompiler
from calibatt_compiler.plan import BlockPattern, Sampler, SitePatterns

PROMPTS = ["a big rabbit runs", "the bird flies", "a bird"]
SIZE = {"height": 112, "width": 144, "num_frames": 9, "num_inference_steps": 2}
SIZE |= {"max_sequence_length": 16}
CONFIG = CalibrationConfig(block=(32, 32), form="masks", progress=False)
LIMIT = 600
"""Seconds that a run may take."""

OF_SAFETENSORS = re.compile(r"\.tmp\w{6}")
"""What safetensors itself writes to before it renames: a name that does not say whose it is, so
nobody can sweep it."""

Work = Callable[[Path], None]
"""Runs in a folder until it is done, in a process that may be killed."""


@functools.cache
def pipeline() -> Any:
    """The pipeline that is calibrated; forked processes find it made."""
    return tiny_models.wan_pipeline()


def random_plan(seed: int, head_dim: int = 64) -> Plan:
    """A plan of four patterns."""
    generator = torch.Generator().manual_seed(seed)
    sites = {}
    for name in ("a", "b"):
        masks = torch.rand(2, 2, 3, 3, generator=generator) < 0.4
        patterns = [
            BlockPattern.from_mask(mask | torch.eye(3, dtype=torch.bool), block=(64, 64))
            for mask in masks
        ]
        sites[name] = SitePatterns.share(patterns, head_dim)
    return Plan.create(sites, grid=(1, 16, 12), sampler=Sampler(timesteps=(2.0, 1.0)))


def write_plans(folder: Path) -> None:
    """Write two plans over one another."""
    one, other = random_plan(0), random_plan(1)
    for _ in range(400):
        one.save(folder / "p.calibatt")
        other.save(folder / "p.calibatt")


def calibrated(config: CalibrationConfig) -> Work:
    """Calibrate three prompts."""

    def work(folder: Path) -> None:
        calibrate(pipeline(), PROMPTS, 1, out=folder / "p.calibatt", config=config, **SIZE)

    return work


def searched(folder: Path) -> None:
    """Search thresholds by the mass that they keep."""
    tuning = TuningConfig(trials=4, proxy=True, speed_up=1e-3)
    config = replace(CONFIG, inductor=False)
    tune(pipeline(), PROMPTS[:2], 1, out=folder / "search", config=config, tuning=tuning, **SIZE)


def built(folder: Path) -> None:
    """Compile the kernels of a plan into a cache in the folder."""
    os.environ["CALIBATT_CACHE_DIR"] = str(folder / "cache")
    specs = PlanSpecs(random_plan(0), [90], torch.bfloat16)
    with KernelCompiler(1) as compiler:
        report = compiler.build(specs)
    assert not report.failed, report.failed
    assert len(report.compiled) == len(specs)


def check_plan(folder: Path) -> None:
    """A plan that is there is whole."""
    if (folder / "p.calibatt").exists():
        Plan.load(folder / "p.calibatt")


def grow_old(folder: Path) -> int:
    """Let two days pass for what is hidden: a day later the next process removes it."""
    left = [path for path in folder.rglob(".*") if path.is_file()]
    for path in left:
        os.utime(path, (time.time() - 2 * 86400,) * 2)
    return len(left)


def inputs_of(folder: Path) -> dict[str, str]:
    """Digests of all finished inputs, by file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("input-*.safetensors")
    }


def contents(folder: Path) -> dict[str, str]:
    """What an undisturbed run leaves: names, and digests of what is bit for bit the same."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "cache" not in path.parts:
            same = path.suffix in (".calibatt", ".safetensors")
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path.relative_to(folder))] = digest if same else ""
    return found


WORKS: dict[str, Work] = {
    "write": write_plans,
    "calibrate": calibrated(CONFIG),
    "calibrate zones": calibrated(CalibrationConfig(block=(32, 32), progress=False)),
    "tune": searched,
    "build": built,
}
SHARES = {"write": 4, "calibrate": 4, "calibrate zones": 2, "tune": 2, "build": 1}


def start(work: Work, folder: Path) -> int:
    """Run in a forked process; return its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.setpgid(0, 0)
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        work(folder)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def wait(child: int, seconds: float) -> int | None:
    """Return how a process ended; None if it runs on."""
    end = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.002)


def kill(child: int, *, helpers: bool) -> None:
    """Kill a process, with or without those that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    if helpers:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)


@functools.cache
def undisturbed(name: str) -> tuple[float, dict[str, str]]:
    """Seconds that a run takes, and what it leaves."""
    with tempfile.TemporaryDirectory(prefix="calibatt-kills-") as place:
        folder = Path(place) / "whole"
        folder.mkdir()
        began = time.monotonic()
        child = start(WORKS[name], folder)
        status = wait(child, LIMIT)
        if status != 0:
            said = folder.with_suffix(".log").read_text()[-2000:]
            raise RuntimeError(f"an undisturbed {name} ended with {status}: {said}")
        return time.monotonic() - began, contents(folder)


def case(draw: random.Random, counts: Counter[str], options: argparse.Namespace) -> str | None:
    """Run one case."""
    names = [name for name in WORKS if options.only in (None, name)]
    name = draw.choices(names, [SHARES[each] for each in names])[0]
    seconds, expected = undisturbed(name)
    with tempfile.TemporaryDirectory(prefix="calibatt-kills-") as place:
        folder = Path(place) / "cut"
        folder.mkdir()
        kept: dict[str, str] = {}
        for _ in range(draw.randint(1, 3)):
            child = start(WORKS[name], folder)
            moment, helpers = draw.random() * 1.1 * seconds, draw.random() < 0.5
            status = wait(child, moment)
            if status is None:
                kill(child, helpers=helpers)
                counts["kills"] += 1
            elif status:
                return f"failed: {name} ended with {status} after a kill: {_said(folder)}"
            try:
                check_plan(folder)
            except Exception as error:
                return f"damaged: {name}: {type(error).__name__}: {error}"
            counts["left by kills, swept later"] += grow_old(folder)
            now = inputs_of(folder)
            if lost := {file for file, digest in kept.items() if now.get(file) != digest}:
                return f"lost: {name}: {sorted(lost)} were finished, and are gone or others"
            kept = now
        counts["inputs kept"] += len(kept)
        child = start(WORKS[name], folder)
        status = wait(child, LIMIT)
        if status is None:
            kill(child, helpers=True)
            return f"hangs: {name}: {_said(folder)}"
        if status:
            return f"failed: {name} ended with {status} after kills: {_said(folder)}"
        found = contents(folder)
        for file in [file for file in found if OF_SAFETENSORS.fullmatch(Path(file).name)]:
            counts["left by kills within safetensors, for ever"] += 1
            del found[file]
        if found != expected:
            more = {file for file in found if file not in expected}
            less = {file for file in expected if file not in found}
            other = {file for file in found if found[file] != expected.get(file, found[file])}
            return f"different: {name}: more {more}, missing {less}, other content {other}"
    counts[f"cases of {name}"] += 1
    return None


def _said(folder: Path) -> str:
    return folder.with_suffix(".log").read_text()[-1500:]


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--only", choices=list(WORKS))
    torch.set_num_threads(1)  # energies differ in the last bit otherwise, and forks hang
    with tempfile.TemporaryDirectory(prefix="calibatt-kills-") as folder:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{folder}/inductor")
        return run(__doc__, case, parser)


if __name__ == "__main__":
    sys.exit(main())
