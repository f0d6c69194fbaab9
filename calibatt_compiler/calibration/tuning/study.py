"""The search itself: an Optuna study on disk that goes on where it was killed."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from calibatt_compiler.calibration.config import SelectionConfig
from calibatt_compiler.calibration.tuning.pareto import Point, SearchPoint, Settings
from calibatt_compiler.errors import OptionError
from calibatt_compiler.files import naming

NAME = "calibatt-tune"
JOURNAL = "study.journal"
"""Name of its file in the folder of a search."""

_STARTUP = 10
"""Trials at random before the sampler goes by what was found: Optuna's own default."""


@dataclass(frozen=True)
class SearchSpace:
    """Where the search looks.

    All but `density` is of masks.

    Attributes:
        A: least and largest share of attention mass to keep at late steps. C is searched between
            A and 0.999.
        k: least and largest; by logarithm.
        rho: least and largest share of the inputs that a block needs.
        pooled: keys of a dropped block to choose from; one value is not searched.
        gamma: similarities from which on a head may be row-shared to choose from, None for no such
            head; one value is not searched.
        density: least and largest density of zones; by logarithm.
    """

    A: tuple[float, float] = (0.5, 0.98)
    k: tuple[float, float] = (1.0, 32.0)
    rho: tuple[float, float] = (0.25, 0.9)
    pooled: tuple[int, ...] = (0,)
    gamma: tuple[float | None, ...] = (None,)
    density: tuple[float, float] = (0.1, 0.6)

    def __post_init__(self) -> None:
        most = {"A": 0.999, "k": 1000.0, "rho": 1.0, "density": 1.0}
        for name, high in most.items():
            first, last = getattr(self, name)
            if not (0 < first <= last <= high):
                raise OptionError(
                    f"the range of {name} can't be searched",
                    expected=f"two numbers above 0 and up to {high}, in order",
                    got=(first, last),
                    remedy="SearchSpace describes each range",
                )
        if not self.pooled or len(set(self.pooled)) != len(self.pooled):
            raise OptionError(
                "pooled has nothing to choose from",
                expected="different numbers of keys, such as (0, 1, 4)",
                got=self.pooled,
                remedy="leave it out to drop blocks as they are",
            )
        for value in self.gamma:
            SelectionConfig(gamma=value)  # checks its range
        if not self.gamma or len(set(self.gamma)) != len(self.gamma):
            raise OptionError(
                "gamma has nothing to choose from",
                expected="different similarities, such as (None, 0.8, 0.87)",
                got=self.gamma,
                remedy="leave it out for no row-shared heads",
            )

    def given(self) -> set[str]:
        """Return the names of what is not the default."""
        return {each.name for each in fields(self) if getattr(self, each.name) != each.default}

    def ends(self) -> tuple[SearchPoint, SearchPoint]:
        """Return the settings of the sparsest and of the densest plan of masks in it."""
        pooled, some = min(self.pooled), [value for value in self.gamma if value is not None]
        most = min(some, default=None)
        fewest = None if None in self.gamma else max(some)
        return (
            SearchPoint(self.A[0], self.A[0], self.k[0], self.rho[1], pooled, most),
            SearchPoint(self.A[1], 0.999, self.k[0], self.rho[0], pooled, fewest),
        )


def inside(value: float, limits: tuple[float, float]) -> float:
    """Return a value, moved to the nearer limit if it lies outside."""
    return min(max(value, limits[0]), limits[1])


class Study(ABC):
    """A study of two objectives, fidelity up and cost down.

    Each trial goes by the finished ones and by nothing else: so a study that was killed and goes
    on finds what an undisturbed one finds. The journal is Optuna's own and can be opened with it.

    Args:
        path: of the journal; made if it does not exist.

    Raises:
        OptionError: Optuna is not installed.
    """

    kind: type[Settings]

    def __init__(self, path: Path) -> None:
        optuna = _optuna()
        self._optuna = optuna
        _mend(path)
        for stale in path.parent.glob(f"{path.name}.lock*"):
            stale.unlink()  # of a killed process: the folder is this one's alone
        with _quiet(optuna):
            self._study = optuna.create_study(
                storage=_storage(path),
                study_name=NAME,
                directions=["maximize", "minimize"],
                load_if_exists=True,
            )
        for trial in self._trials("RUNNING"):
            self._study.tell(trial.number, state=optuna.trial.TrialState.FAIL)

    def points(self) -> list[Point]:
        """Return the finished trials, in order."""
        found = []
        for trial in self._trials("COMPLETE"):
            about = trial.user_attrs
            fidelity, cost = trial.values
            settings = self.kind(**about["knobs"])
            found.append(Point(settings, fidelity, cost, about["density"], about["digest"]))
        return found

    def trial(self, evaluate: Callable[[Any], Point]) -> Point | None:
        """Run one more trial; if `evaluate` fails or the process dies, it does not count.

        Args:
            evaluate: takes the settings of a plan, a `SearchPoint` or a `ZonePoint`.

        Returns:
            The trial; None if nothing is left to try.
        """
        trial = self._ask()
        if trial is None:
            return None
        try:
            point = evaluate(self._suggested(trial))
        except BaseException:
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
            raise
        about = {"density": point.density, "digest": point.digest}
        for name, value in {"knobs": asdict(point.settings), **about}.items():
            trial.set_user_attr(name, value)
        self._study.tell(trial, [point.fidelity, point.cost])
        return point

    def _trials(self, state: str) -> list[Any]:
        wanted = getattr(self._optuna.trial.TrialState, state)
        found: list[Any] = self._study.get_trials(deepcopy=False, states=(wanted,))
        return found

    @abstractmethod
    def _ask(self) -> Any:
        """Return the next trial, Optuna's; None if nothing is left to try."""

    @abstractmethod
    def _suggested(self, trial: Any) -> Settings:
        """Return what is tried in it."""


class MaskStudy(Study):
    """A study of thresholds, sampled by TPE.

    Each trial draws from a generator of its own, seeded by its place among the finished ones.

    Args:
        path: see `Study`.
        space: where to look.
        start: where the first trial is, moved into the space.
        seed: of the sampler.

    Raises:
        OptionError: Optuna is not installed.
    """

    kind = SearchPoint

    def __init__(self, path: Path, space: SearchSpace, start: SearchPoint, seed: int) -> None:
        super().__init__(path)
        self._space = space
        self._start = start
        self._seed = seed

    def _ask(self) -> Any:
        number = len(self._trials("COMPLETE"))
        self._study.sampler = self._optuna.samplers.TPESampler(
            seed=(self._seed * 1_000_003 + number) % 2**32,
            n_startup_trials=_STARTUP,
            constant_liar=False,
        )
        if number == 0 and not self._trials("WAITING"):
            self._study.enqueue_trial(self._first())
        return self._study.ask()

    def _suggested(self, trial: Any) -> SearchPoint:
        space = self._space
        A = trial.suggest_float("A", *space.A)
        lift = trial.suggest_float("lift", 0.0, 1.0)
        pooled, gamma = space.pooled[0], space.gamma[0]
        if len(space.pooled) > 1:
            pooled = trial.suggest_categorical("pooled", space.pooled)
        if len(space.gamma) > 1:
            gamma = trial.suggest_categorical("gamma", space.gamma)
        return SearchPoint(
            A=A,
            C=A + lift * (0.999 - A),
            k=trial.suggest_float("k", *space.k, log=True),
            rho=trial.suggest_float("rho", *space.rho),
            pooled=pooled,
            gamma=gamma,
        )

    def _first(self) -> dict[str, float | None]:
        space, start = self._space, self._start
        A = inside(start.A, space.A)
        first: dict[str, float | None] = {
            "A": A,
            "lift": inside((start.C - A) / (0.999 - A) if A < 0.999 else 0.0, (0.0, 1.0)),
            "k": inside(start.k, space.k),
            "rho": inside(start.rho, space.rho),
        }
        if len(space.pooled) > 1:
            first["pooled"] = start.pooled if start.pooled in space.pooled else space.pooled[0]
        if len(space.gamma) > 1:
            first["gamma"] = start.gamma if start.gamma in space.gamma else space.gamma[0]
        return first


def finished(path: Path) -> int:
    """Return how many trials of a study are finished; 0 without a file.

    Another process may be searching there: a copy of the journal's whole lines is read, and nothing
    beside it is touched.
    """
    if not path.exists():
        return 0
    optuna = _optuna()
    content = path.read_bytes()
    with tempfile.TemporaryDirectory(prefix="calibatt-") as folder, _quiet(optuna):
        copy = Path(folder) / JOURNAL
        copy.write_bytes(content[: content.rfind(b"\n") + 1])
        storage = _storage(copy)
        if NAME not in optuna.get_all_study_names(storage):
            return 0
        study = optuna.load_study(study_name=NAME, storage=storage)
        states = [trial.state.name for trial in study.get_trials(deepcopy=False)]
    return states.count("COMPLETE")


def _optuna() -> Any:
    try:
        import optuna
        import optuna.storages.journal
    except ImportError as error:
        raise OptionError(
            "the search needs a package that is not installed",
            expected="optuna",
            got="no such module",
            remedy='pip install "calibatt[tune]"',
        ) from error
    return optuna


def _storage(path: Path) -> Any:
    journal = _optuna().storages.journal
    lock = journal.JournalFileOpenLock(str(path))
    return journal.JournalStorage(journal.JournalFileBackend(str(path), lock_obj=lock))


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _mend(path: Path) -> None:
    """Cut off what a killed process left of a line: the journal's reader refuses half a line."""
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            return
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)
