"""Calibration by several processes: one plan, and no rank waits for one that is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forked import Calibration

from calibatt_compiler import Plan
from calibatt_compiler.calibration import CalibrationConfig, calibrate
from calibatt_compiler.calibration.store.ranks import Ranks
from calibatt_compiler.errors import CalibrationError

PROMPTS = ["a big rabbit runs", "the bird flies", "a small bird", "the rabbit"]
CONFIG = CalibrationConfig(block=(32, 32))
TWO = {"num_inference_steps": 2}


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums of a CPU may differ in the last bit with the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def start(folder: Path, out: Path, fault: str, **sizes: int) -> list[Calibration]:
    meeting = out.with_suffix(f".{fault}")
    work = {"prompts": PROMPTS, "seeds": 1, "out": out, "config": CONFIG, **sizes}
    return [
        Calibration(folder, rank=rank, meeting=meeting, fault=fault, **work) for rank in range(2)
    ]


@pytest.fixture(scope="module")
def digest(
    tiny_wan_pipeline: Any,
    tiny_wan_arguments: dict[str, int],
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    """Digest of the plan of one process, not disturbed."""
    out = tmp_path_factory.mktemp("alone") / "plan.calibatt"
    arguments = {**tiny_wan_arguments, **TWO}
    with one_thread():
        return calibrate(
            tiny_wan_pipeline, PROMPTS, seeds=1, out=out, config=CONFIG, **arguments
        ).digest


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["raise", "hang"])
def test_a_rank_fails_and_the_run_goes_on_to_the_same_plan(
    fault: str,
    digest: str,
    tiny_wan_folder: Path,
    tiny_wan_pipeline: Any,
    tiny_wan_arguments: dict[str, int],
    tmp_path: Path,
) -> None:
    out = tmp_path / "plan.calibatt"
    folder = Path(f"{out}.calibration")
    arguments = {**tiny_wan_arguments, **TWO}
    ranks = start(tiny_wan_folder, out, fault, **arguments)
    if fault == "hang":
        until = time.monotonic() + 240
        while not (folder / "input-00001.safetensors").exists() and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(1)
        os.kill(ranks[1].pid, signal.SIGKILL)
    killed = time.monotonic()
    (code, _, first), (other, _, second) = (rank.result() for rank in ranks)
    assert (code, other) == (1, -9 if fault == "hang" else 1), first + second
    assert "rank 1 of 2 failed" in first
    if fault == "raise":
        assert "ValueError: no such luck" in first
        assert "no such luck" in second
    else:
        assert "its process was lost" in first
        assert time.monotonic() - killed < 60
    stored = {path.name for path in folder.glob("input-*")}
    assert "input-00001.safetensors" in stored
    assert "input-00003.safetensors" not in stored
    assert not out.exists()

    if fault == "raise":  # go on with two processes, then with one
        for rank in start(tiny_wan_folder, out, "none", **arguments):
            code, printed, said = rank.result()
            assert code == 0, said
            assert printed.split()[-1] == digest
    else:
        with one_thread():
            plan = calibrate(
                tiny_wan_pipeline, PROMPTS, seeds=1, out=out, config=CONFIG, **arguments
            )
        assert plan.digest == digest
    assert Plan.load(out).digest == digest
    assert not list(folder.glob("rank-*"))
    assert not (folder / "lock").exists()


@pytest.mark.slow
def test_torchrun_makes_the_plan_of_one_process(
    digest: str, tiny_wan_folder: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    out = tmp_path / "plan.calibatt"
    run = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    size = ["--height", "112", "--width", "144", "--frames", "9", "--steps", "2"]
    size += ["--set", "max_sequence_length=16"]
    command = ["-m", "calibatt_compiler", "calibrate", tiny_wan_folder, "--prompts", prompts]
    done = subprocess.run(
        [sys.executable, *run, *command, "--out", out, "--block", "32", "--seed", "1", *size],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sparsity") == 1, "rank 0 speaks for all"
    assert Plan.load(out).digest == digest


@contextmanager
def two(folder: Path) -> Iterator[tuple[Ranks, Ranks, ExitStack]]:
    """Two ranks in one process, past their meeting."""
    ranks = Ranks(0, 2), Ranks(1, 2)
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(ranks[0].working_in(folder))
        second.enter_context(ranks[1].working_in(folder))
        yield *ranks, second


def test_shares_are_disjoint_and_whole() -> None:
    shares = [Ranks(rank, 3).share(range(7)) for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]
    assert Ranks().share("abc") == list("abc")
    Ranks().check()
    Ranks().wait_for([])
    assert Ranks().meet(lambda: 3, lambda said: None) == 3


def test_ranks_know_how_the_others_fare(tmp_path: Path) -> None:
    with two(tmp_path) as (first, second, leave):
        first.check()
        second.done()
        first.wait_for([1])
        leave.close()
        first.check()  # one that has done its part may leave
        first.wait_until_alone()
        assert not list(tmp_path.iterdir())


def test_a_rank_that_vanishes_is_lost(tmp_path: Path) -> None:
    with two(tmp_path) as (first, _, leave):
        leave.close()
        with pytest.raises(CalibrationError, match="rank 1 of 2 failed") as caught:
            first.wait_for([1])
    assert "lost" in str(caught.value.got)


def test_a_failure_is_told_on_as_that_of_the_rank_that_failed_first(tmp_path: Path) -> None:
    ranks = [Ranks(rank, 3) for rank in range(3)]
    contexts = [rank.working_in(tmp_path) for rank in ranks]
    for context in contexts:
        context.__enter__()
    error = CalibrationError("no", expected="a", got="b")
    assert not contexts[2].__exit__(CalibrationError, error, None)
    with pytest.raises(CalibrationError, match="rank 2 of 3 failed") as caught:
        ranks[1].check()
    assert not contexts[1].__exit__(CalibrationError, caught.value, None)
    with pytest.raises(CalibrationError, match="rank 2 of 3 failed") as caught:
        ranks[0].check()
    assert caught.value.got == "no: expected a, got b"
    contexts[0].__exit__(None, None, None)


class _Attention(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)


class _Joint(torch.nn.Module):
    """Joint attention over 64 video tokens and as many text tokens as the prompt has letters."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = _Attention()
        self.gain = torch.nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.attn(x.view(1, 1, -1, 16) * (self.gain + timestep / 500))


class _Pipe:
    """A pipeline whose text length depends on the prompt."""

    def __init__(self) -> None:
        self.transformer = _Joint()
        self.scheduler = SimpleNamespace(timesteps=torch.tensor([900.0, 500.0]), sigmas=None)

    def __call__(self, prompt: str, generator: torch.Generator, output_type: str) -> None:
        x = torch.randn(64 + len(prompt), 16, generator=generator)
        for timestep in self.scheduler.timesteps:
            self.transformer(x, timestep[None])


def test_a_rank_fits_masks_to_the_text_length_of_the_first_input(tmp_path: Path) -> None:
    """The first input may be another rank's: its sizes come from its first step."""
    config = CalibrationConfig(block=(16, 16), grid=(1, 8, 8), text="last", keep_run=True)
    prompts = ["a" * 20, "b" * 9]
    alone = calibrate(_Pipe(), prompts, out=tmp_path / "alone", config=config)
    pipe, out = _Pipe(), tmp_path / "shared"

    class Second(Ranks):
        """Rank 1 of 2, without the first: it does its share and leaves."""

        def __init__(self) -> None:
            super().__init__(1, 2)

        def meet(self, lead: Any, join: Any) -> Any:
            return lead()

        def check(self) -> None:
            pass

        def wait_for(self, ranks: Any, meanwhile: Any = None) -> None:
            raise InterruptedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ranks, "current", Second)
        with pytest.raises(InterruptedError):
            calibrate(pipe, prompts, out=out, config=config)
    assert [p.name for p in Path(f"{out}.calibration").glob("input-*")] == [
        "input-00001.safetensors"
    ]
    assert calibrate(_Pipe(), prompts, out=out, config=config).digest == alone.digest
