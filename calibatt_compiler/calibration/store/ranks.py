"""The processes of one data-parallel calibration: who does what, and the status of the others.

They meet once, over torch.distributed, to agree on the run. From then on each keeps a file
`rank-NNNNN` in the run folder locked as long as it lives, and writes into it how it ended. So a
rank learns within a step that another has failed, why, and even that it was killed: the kernel
drops the lock. Nobody waits in a collective operation, which could hang or time out while another
rank computes for an hour.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, TypeVar

import torch.distributed as dist

from calibatt_compiler.errors import CalibattError, CalibrationError

T = TypeVar("T")

RENDEZVOUS_TIMEOUT = timedelta(minutes=10)
"""How long ranks wait for one another at the start, when models may still be loading."""

SHUTDOWN_TIMEOUT = 60.0
"""Seconds that the first rank gives the others to read the plan before it deletes the folder."""

_POLL = 0.1


@dataclass(frozen=True)
class RankStatus:
    """Status of a rank.

    Attributes:
        alive: its process works on.
        done: it did its part.
        failure: the rank that failed first, and why, as far as this one knows.
    """

    alive: bool
    done: bool = False
    failure: tuple[int, str] | None = None


class Ranks:
    """This process among those that calibrate together; by default it is alone.

    Args:
        rank: number of this process.
        size: how many there are.

    Attributes:
        rank: number of this process.
        size: how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size
        self._folder: Path | None = None
        self._file: IO[str] | None = None
        self._done: set[int] = set()
        self._failure: tuple[int, str] | None = None

    @classmethod
    def current(cls) -> Ranks:
        """Return the ranks of the default process group; one alone where there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def others(self) -> list[int]:
        """The other ranks."""
        return [rank for rank in range(self.size) if rank != self.rank]

    def share(self, items: Sequence[T]) -> list[T]:
        """Return this rank's part of what all have in common."""
        return list(items[self.rank :: self.size])

    def meet(self, lead: Callable[[], Any], join: Callable[[Any], None]) -> Any:
        """Let rank 0 run `lead`, then the others `join` with what it returned.

        All ranks must call it. A failure of one is a failure of all.

        Args:
            lead: returns JSON values.
            join: given them.

        Returns:
            What `lead` returned, on every rank.

        Raises:
            CalibrationError: another rank failed, or did not come.
        """
        if self.size == 1:
            return lead()
        said, error = _attempt(lead) if self.rank == 0 else (None, None)
        with self._meeting() as group:
            words = [json.dumps([said, _reason(error)])]
            dist.broadcast_object_list(words, src=0, group=group)
            said, reason = json.loads(words[0])
            if self.rank and reason is None:
                _, error = _attempt(lambda: join(said))
            failures: list[str | None] = [None] * self.size
            dist.all_gather_object(failures, _reason(error), group=group)
        if error is not None:
            raise error
        for rank, reason in enumerate(failures):
            if reason is not None:
                raise self._failed(rank, reason)
        return said

    @contextmanager
    def working_in(self, folder: Path) -> Iterator[None]:
        """Show the others that this rank lives, and tell them if what is done within fails.

        Args:
            folder: of the run, open on this rank.
        """
        self._folder = folder
        if self.size > 1:
            self._file = self._path(self.rank).open("w+", encoding="utf-8")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield
        except BaseException as error:
            # Another's failure is passed on as it is: each rank names the one that failed first.
            self._write({"failure": self._failure or (self.rank, _reason(error))})
            raise
        finally:
            if self._file is not None:
                self._file.close()
                self._file = None

    def done(self) -> None:
        """Tell the others that this rank did its part."""
        self._write({"done": True})

    def check(self) -> None:
        """Return if all others work or did their part.

        Raises:
            CalibrationError: one failed or was lost.
        """
        for rank in self.others:
            if rank in self._done:
                continue
            status = self._status(rank)
            if status.failure is not None:
                raise self._failed(*status.failure)
            if status.done:
                self._done.add(rank)
            elif not status.alive:
                raise self._failed(rank, "its process was lost (killed, or out of memory?)")

    def wait_for(self, ranks: Iterable[int], meanwhile: Callable[[], None] = lambda: None) -> None:
        """Wait until some ranks did their part, however long it takes.

        Raises:
            CalibrationError: one failed or was lost.
        """
        awaited = set(ranks)
        self.check()
        while not awaited <= self._done:
            time.sleep(_POLL)
            meanwhile()
            self.check()

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Wait, however long it takes, for what another rank does.

        Raises:
            CalibrationError: one failed or was lost.
        """
        while not ready():
            time.sleep(_POLL)
            self.check()

    def wait_until_alone(self) -> None:
        """Wait, not for ever, until all others have left; then tidy up."""
        until = time.monotonic() + SHUTDOWN_TIMEOUT
        for rank in self.others:
            while self._status(rank).alive and time.monotonic() < until:
                time.sleep(_POLL)
            self._path(rank).unlink(missing_ok=True)
        if self.size > 1:
            self._path(self.rank).unlink(missing_ok=True)

    def _path(self, rank: int) -> Path:
        assert self._folder is not None
        return self._folder / f"rank-{rank:05d}"

    def _write(self, status: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.seek(0)
            self._file.truncate()
            self._file.write(json.dumps(status))
            self._file.flush()

    def _status(self, rank: int) -> RankStatus:
        try:
            file = self._path(rank).open("r", encoding="utf-8")
        except FileNotFoundError:
            return RankStatus(alive=False)
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                alive = False
            except OSError:
                alive = True
            # Read after the lock was tried: what one that has gone wrote last is then complete.
            try:
                status = json.loads(file.read())
            except ValueError:
                return RankStatus(alive)  # nothing yet, or half written
        failure = status.get("failure")
        return RankStatus(alive, bool(status.get("done")), tuple(failure) if failure else None)

    def _failed(self, rank: int, reason: str) -> CalibrationError:
        self._failure = (rank, reason)
        return CalibrationError(
            f"rank {rank} of {self.size} failed",
            expected="all ranks to finish their share of the inputs",
            got=reason,
            remedy="correct that and run the same command again, with any number of processes: "
            "finished inputs are kept",
        )

    @contextmanager
    def _meeting(self) -> Iterator[dist.ProcessGroup]:
        """A group on the host: that of the user may be NCCL, which moves GPU tensors only."""
        group = None
        try:
            group = dist.new_group(backend="gloo", timeout=RENDEZVOUS_TIMEOUT)
            yield group
        except RuntimeError as error:
            raise CalibrationError(
                "the ranks of a calibration did not come together",
                expected=f"all {self.size} ranks of the process group to call calibrate with the "
                f"same arguments, within {RENDEZVOUS_TIMEOUT}",
                got=_reason(error),
                remedy="look at what the other ranks say; a call that one rank makes alone takes "
                "CalibrationConfig(distributed=False)",
            ) from error
        finally:
            if group is not None:
                dist.destroy_process_group(group)


def _attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return None, error


def _reason(error: BaseException | None) -> str | None:
    if error is None:
        return None
    if isinstance(error, CalibattError):
        return f"{error.problem}: expected {error.expected}, got {error.got}"
    return f"{type(error).__name__}: {error}"
