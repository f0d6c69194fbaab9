"""Calibration on two GPUs, one a process: over NCCL and by torchrun, the plan of one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from calibatt_compiler import Plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    pytest.mark.timeout(300),
]

WORKER = """
import sys
import torch, torch.distributed as dist
from diffusers import WanPipeline
from calibatt_compiler.calibration import CalibrationConfig, calibrate

folder, out, meeting, rank, size = sys.argv[1:]
device = torch.device("cuda", int(rank))
torch.cuda.set_device(device)
pipe = WanPipeline.from_pretrained(folder).to(device)
if int(size) > 1:
    dist.init_process_group(
        "nccl", init_method=f"file://{meeting}", rank=int(rank), world_size=int(size)
    )
    ones = torch.ones(1, device=device)
    dist.all_reduce(ones)
    assert ones.item() == int(size)
plan = calibrate(
    pipe, ["a big rabbit runs", "the bird flies", "a small bird", "the rabbit"], seeds=1, out=out,
    config=CalibrationConfig(block=(32, 32)), height=112, width=144, num_frames=9,
    num_inference_steps=2, max_sequence_length=16,
)
print(plan.digest)
if int(size) > 1:
    dist.destroy_process_group()
"""


def digests(folder: Path, out: Path, size: int) -> list[str]:
    """Calibrate with so many processes; the digest that each has found."""
    meeting = out.with_suffix(".meeting")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, folder, out, meeting, str(rank), str(size)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        found = [rank.communicate(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (_, errors) in zip(ranks, found, strict=True):
        assert rank.returncode == 0, errors
    return [lines.splitlines()[-1] for lines, _ in found]


def test_two_ranks_over_nccl_make_the_plan_of_one(tiny_wan_folder: Path, tmp_path: Path) -> None:
    (alone,) = digests(tiny_wan_folder, tmp_path / "one.calibatt", 1)
    assert digests(tiny_wan_folder, tmp_path / "two.calibatt", 2) == [alone, alone]


def test_torchrun_makes_the_plan_of_one_process(tiny_wan_folder: Path, tmp_path: Path) -> None:
    command = ["-m", "calibatt_compiler", "calibrate", tiny_wan_folder, "--device", "cuda"]
    command += ["--height", "112", "--width", "144", "--frames", "9", "--steps", "2"]
    command += ["--set", "max_sequence_length=16", "--block", "32", "--seed", "3"]
    command += ["--prompt", "a big rabbit runs", "--prompt", "the bird flies"]
    run = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    plans = []
    for name, before in (("one", []), ("two", run)):
        out = tmp_path / f"{name}.calibatt"
        done = subprocess.run(
            [sys.executable, *before, *command, "--out", out],
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        plans.append(Plan.load(out))
    assert plans[0].digest == plans[1].digest
    assert plans[0].metadata.inputs.count == 2
