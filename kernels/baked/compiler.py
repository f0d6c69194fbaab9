"""Compile generated kernels in parallel, ahead of their first use.

Each worker is a process of its own (`compile_worker`), spoken to over pipes: the caller's main
module is not imported again, nothing is pickled, and a worker that dies takes down one kernel only.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.baked.cover import EXACT, CoverError, CoverLimits
from calibatt_compiler.kernels.baked.worker import encode_pattern
from calibatt_compiler.kernels.baked.zone_jobs import encode_zones
from calibatt_compiler.kernels.request import Softmax, Target
from calibatt_compiler.logs import logger
from calibatt_compiler.plan.pattern import BlockPattern
from calibatt_compiler.plan.zones import ZonePattern

log = logger("kernels")

JOB_TIMEOUT = 600.0
"""Seconds after which a kernel counts as failed."""

AHEAD = 4
"""Specs a worker that `build` has in its queue: each holds a pattern, of up to 1.7 MB at 720p."""


@dataclass(frozen=True)
class KernelSpec:
    """A kernel to be compiled.

    Attributes:
        pattern: which blocks are kept, or the zones of a step group.
        dtype: of the operands: float16, bfloat16 or float32.
        head_dim: of the operands.
        arch: compute capability as one number, such as 90.
        limits: what its cover may take; zones have none.
        target: whose kernel: the portable one, or Hopper's, which runs on sm_90 only.
        softmax: see `CompileOptions`.
    """

    pattern: BlockPattern | ZonePattern
    dtype: torch.dtype
    head_dim: int
    arch: int
    limits: CoverLimits = EXACT
    target: Target = "portable"
    softmax: Softmax = "auto"

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for specs that one compiled kernel serves."""
        kind = (self.target, self.softmax, self.pattern.digest, str(self.dtype))
        return (*kind, self.head_dim, self.arch, self.limits)

    def job(self) -> str:
        """One line for a worker."""
        pattern = self.pattern
        return json.dumps(
            {
                "pattern": encode_zones(pattern)
                if isinstance(pattern, ZonePattern)
                else encode_pattern(pattern),
                "dtype": str(self.dtype).removeprefix("torch."),
                "head_dim": self.head_dim,
                "arch": self.arch,
                "limits": asdict(self.limits),
                "target": self.target,
                "softmax": self.softmax,
            }
        )


@dataclass(frozen=True)
class CompiledSource:
    """A kernel whose machine code lies in Triton's cache.

    Attributes:
        digest: key of its entry in the kernel cache.
        variant: what it was compiled for.
        source_path: the generated module.
        seconds: time that covering, generating and compiling took.
        cached: it had been compiled before.
    """

    digest: str
    variant: str
    source_path: Path
    seconds: float
    cached: bool


@dataclass
class BuildReport:
    """What `KernelCompiler.build` did.

    Attributes:
        compiled: kernels that are ready, those from the cache included.
        declined: reasons of those that are not to be, for their masks take too many literals, by
            pattern digest.
        failed: reasons of the others that are not ready, by pattern digest.
        ready: pattern digest, head dim and GPU generation of each spec that is ready.
    """

    compiled: list[CompiledSource] = field(default_factory=list)
    declined: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    ready: set[tuple[str, int, int]] = field(default_factory=set)


class KernelCompiler:
    """A pool of compiling processes.

    Args:
        workers: processes at a time; default one a core, at most 16.
        timeout: seconds after which a kernel counts as failed.

    Attributes:
        failures: reasons of failed kernels, by pattern digest. Such a site stays on the table
            kernel.
    """

    def __init__(self, workers: int | None = None, *, timeout: float = JOB_TIMEOUT) -> None:
        self.workers = workers or min(os.cpu_count() or 1, 16)
        self.timeout = timeout
        self.failures: dict[str, str] = {}
        self._futures: dict[tuple[Any, ...], Future[CompiledSource]] = {}
        self._jobs: queue.SimpleQueue[tuple[KernelSpec, Future[CompiledSource]] | None]
        self._jobs = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> KernelCompiler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, spec: KernelSpec) -> Future[CompiledSource]:
        """Queue a kernel; equal specs share one future.

        The future raises `CoverError` if the mask takes too many literals, `KernelError` if the
        kernel can't be compiled.
        """
        with self._lock:
            if self._closed:
                raise KernelError(
                    "this compiler is closed",
                    remedy="make a new KernelCompiler, or submit before close()",
                )
            future = self._futures.get(spec.key)
            if future is not None and not future.cancelled():
                return future
            future = self._futures[spec.key] = Future()
            self._jobs.put((spec, future))
            if len(self._threads) < min(self.workers, len(self._futures)):
                # Daemons: a program that ends does not wait for kernels it will not use.
                thread = threading.Thread(target=self._serve, daemon=True, name="calibatt-compile")
                self._threads.append(thread)
                thread.start()
        return future

    def build(
        self,
        specs: Collection[KernelSpec],
        on_progress: Callable[[int, int], object] | None = None,
    ) -> BuildReport:
        """Compile all `specs` and wait; `on_progress(done, total)` after each.

        Specs are asked for as the workers come to them, a few at a time.
        """
        report = BuildReport()
        waiting: dict[Future[CompiledSource], list[tuple[str, int, int]]] = {}
        reported: set[Future[CompiledSource]] = set()
        done = 0

        def finish(futures: Iterable[Future[CompiledSource]]) -> None:
            nonlocal done
            for future in futures:
                asked = waiting.pop(future)
                digest = asked[0][0]
                if future.exception() is None:
                    report.ready.update(asked)
                if future not in reported:
                    reported.add(future)
                    try:
                        report.compiled.append(future.result())
                    except CoverError as error:
                        report.declined[digest] = str(error)
                    except KernelError as error:
                        report.failed[digest] = str(error)
                for _ in asked:
                    done += 1
                    if on_progress is not None:
                        on_progress(done, len(specs))

        try:
            for spec in specs:
                said = (spec.pattern.digest, spec.head_dim, spec.arch)
                waiting.setdefault(self.submit(spec), []).append(said)
                while len(waiting) > AHEAD * self.workers:
                    finish(wait(waiting, return_when=FIRST_COMPLETED).done)
            while waiting:
                finish(wait(waiting, return_when=FIRST_COMPLETED).done)
        except BaseException:
            self.close()  # Ctrl-C: the queue is dropped, finished kernels stay in the cache
            raise
        return report

    def close(self) -> None:
        """Drop what is queued and stop the workers as soon as their kernel is done."""
        with self._lock:
            self._closed = True
            with contextlib.suppress(queue.Empty):
                while True:
                    job = self._jobs.get_nowait()
                    if job is not None:
                        job[1].cancel()
            for _ in self._threads:
                self._jobs.put(None)

    def _serve(self) -> None:
        worker: _Worker | None = None
        try:
            while (job := self._jobs.get()) is not None:
                spec, future = job
                if not future.set_running_or_notify_cancel():
                    continue
                try:
                    worker = worker or _Worker()
                    result = worker.run(spec.job(), self.timeout)
                except Exception as error:
                    if worker is not None:
                        worker.stop()
                    worker = None
                    self._fail(spec, future, str(error) or type(error).__name__)
                    continue
                if result.pop("ok"):
                    result["source_path"] = Path(result["source_path"])
                    future.set_result(CompiledSource(**result))
                elif result.get("declined"):
                    future.set_exception(CoverError(result["reason"]))
                else:
                    log.debug("%s", result["trace"])
                    self._fail(spec, future, result["reason"])
        finally:
            if worker is not None:
                worker.stop()

    def _fail(self, spec: KernelSpec, future: Future[CompiledSource], reason: str) -> None:
        self.failures[spec.pattern.digest] = reason
        log.warning(
            "no baked kernel for pattern %s (sm_%s, %s, head dim %s): %s; the table kernel serves",
            spec.pattern.digest[:12],
            spec.arch,
            spec.dtype,
            spec.head_dim,
            reason,
        )
        future.set_exception(
            KernelError(
                "a generated kernel could not be compiled",
                got=reason,
                remedy="the table kernel serves this site; set lowering='table' to not try",
            )
        )


class _Worker:
    """One compiling process."""

    def __init__(self) -> None:
        # The child resolves imports as this process does, wherever that took them from; never by
        # way of the current folder, whose files are data.
        path = os.pathsep.join(entry for entry in sys.path if entry)
        environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
        environment["PYTHONSAFEPATH"] = "1"
        # The interpreter would have nothing to compile.
        environment.pop("TRITON_INTERPRET", None)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "calibatt_compiler.kernels.baked.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self.pending = b""

    def run(self, job: str, timeout: float) -> dict[str, Any]:
        """Send a job and wait for its answer.

        Raises:
            KernelError: the process died or took too long.
        """
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # found dead below, with its exit status
            self.process.stdin.write(job.encode() + b"\n")
            self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._line(time.monotonic() + timeout, timeout))
        return answer

    def _line(self, deadline: float, timeout: float) -> bytes:
        assert self.process.stdout is not None
        pipe = self.process.stdout.fileno()
        while b"\n" not in self.pending:
            ready, _, _ = select.select([pipe], [], [], max(deadline - time.monotonic(), 0))
            if not ready:
                raise KernelError(f"compiling took longer than {timeout:.0f} s")
            piece = os.read(pipe, 1 << 16)
            if not piece:
                raise KernelError(f"the compiling process ended with status {self.process.wait()}")
            self.pending += piece
        line, _, self.pending = self.pending.partition(b"\n")
        return line

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


@cache
def shared_compiler() -> KernelCompiler:
    """The compiler that serves all models of this process; half the cores stay free."""
    return KernelCompiler(workers=max(1, min((os.cpu_count() or 2) // 2, 16)))
