"""Compile options and environment variables: all switches of the package, in one place."""

from __future__ import annotations

import difflib
import functools
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from calibatt_compiler.arguments import described, is_one_of, known, require
from calibatt_compiler.errors import OptionError
from calibatt_compiler.logs import logger
from calibatt_compiler.plan import Plan, file

log = logger("kernels")

Lowering = Literal["baked", "table", "reference"]
Softmax = Literal["auto", "exact"]
OnMismatch = Literal["dense", "error"]


@dataclass(frozen=True)
class CompileOptions:
    """What `torch.compile(..., backend="calibatt", options={...})` takes.

    Attributes:
        plan: a `Plan`, or the path of a plan file. Required.
        lowering: `baked`: block indices as literals in a generated kernel; `table`: one kernel
            that reads them; `reference`: the plain definition, slow.
        on_mismatch: what to do where the plan does not fit a call (another size of video, another
            number of heads): run `dense`, counted in the summary, or raise an `error`.
        inductor: settings handed on to Inductor, such as `{"max_autotune": True}`.
        hopper: take the kernel for Hopper GPUs where it serves, else the portable one.
        softmax: `auto`: in bfloat16 and from 8,192 keys on, GPU kernels keep one reference for
            each row where that is exact to rounding, and recompute where it is not; `exact`: the
            running maximum.
        monitor: of so many calls of a site, look at one: a few of its queries are attended densely,
            and the attention mass that the plan keeps of theirs stands in the summary beside the
            mass that it was calibrated to keep. 0 looks at none.
        table_memory: megabytes of a GPU's memory that tables of block indices may take; None: 240,
            or 720 for a plan with weights of blocks. More than all steps take saves the host the
            making of tables while it generates.

    Raises:
        OptionError: from `parse`, for an unknown key or a value out of range.
    """

    plan: Plan
    lowering: Lowering = "baked"
    on_mismatch: OnMismatch = "dense"
    inductor: Mapping[str, Any] = field(default_factory=dict)
    hopper: bool = True
    softmax: Softmax = "auto"
    monitor: int = 0
    table_memory: int | None = None

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None, mode: str | None = None) -> CompileOptions:
        """Check the options of a compile call and load the plan."""
        if mode is not None:
            from torch._inductor import list_mode_options

            settings = list_mode_options().get(str(mode)) or {"max_autotune": True}
            raise OptionError(
                "the calibatt backend takes no mode, and torch.compile no mode beside options",
                expected='options={"plan": ...}',
                got=f"mode={mode!r}",
                remedy="leave mode out and give what it stands for: "
                f'options={{"plan": ..., "inductor": {settings}}}',
            )
        require(options is None or isinstance(options, Mapping), "options", options, "a mapping")
        given = dict(options) if options else {}
        names = [option.name for option in fields(cls)]
        for key in given:
            if key not in names:
                close = difflib.get_close_matches(str(key), names, n=1)
                hint = f"did you mean {close[0]!r}? " if close else ""
                raise OptionError(
                    f"unknown option {key!r}",
                    expected=f"one of {', '.join(names)}",
                    got=repr(key),
                    remedy=f'{hint}Inductor settings go into options={{"inductor": {{...}}}}',
                )
        _check_choice("lowering", given.get("lowering", "baked"), get_args(Lowering))
        _check_choice("on_mismatch", given.get("on_mismatch", "dense"), get_args(OnMismatch))
        _check_choice("softmax", given.get("softmax", "auto"), get_args(Softmax))
        if not isinstance(given.get("hopper", True), bool):
            raise OptionError(
                "option 'hopper' must be a boolean",
                expected="True or False",
                got=repr(given["hopper"]),
                remedy="leave it out for the default",
            )
        monitor = given.get("monitor", 0)
        if not isinstance(monitor, int) or isinstance(monitor, bool) or monitor < 0:
            raise OptionError(
                "option 'monitor' must be a number of calls",
                expected="0, or how many calls of a site there are for one that is looked at",
                got=repr(monitor),
                remedy="leave it out, or use 50",
            )
        memory = given.get("table_memory")
        if memory is not None and (
            not isinstance(memory, int) or isinstance(memory, bool) or memory < 1
        ):
            raise OptionError(
                "option 'table_memory' must be a number of megabytes",
                expected="1 or more, or None",
                got=repr(memory),
                remedy="leave it out for the default",
            )
        inductor = given.get("inductor", {})
        if not isinstance(inductor, Mapping) or not all(isinstance(key, str) for key in inductor):
            raise OptionError(
                "option 'inductor' must be a mapping of Inductor settings",
                expected='a dict such as {"max_autotune": True}',
                got=repr(inductor),
                remedy="see torch._inductor.list_options() for the names",
            )
        _check_inductor(inductor)
        return cls(**{**given, "plan": _load_plan(given.get("plan")), "inductor": dict(inductor)})


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not is_one_of(value, choices):
        raise OptionError(
            f"option {name!r} has an unknown value",
            expected=f"one of {', '.join(choices)}",
            got=repr(value),
            remedy="leave it out for the default",
        )


def _check_inductor(settings: Mapping[str, Any]) -> None:
    """Raise `OptionError` for settings that Inductor does not have, or of another type."""
    if not settings:
        return
    from torch._inductor import config

    names = config.get_config_copy()
    known(settings, names, lambda name: f"Inductor has no setting {name!r}")
    for name, value in settings.items():
        kind = config.get_type(name)
        # Types with parameters can't be asked whether a value is of them.
        if get_origin(kind) is None and not isinstance(value, kind):
            expected = getattr(kind, "__name__", str(kind))
            require(False, f"inductor setting {name}", value, expected)


_loaded: dict[Path, Plan] = {}


def _load_plan(plan: object) -> Plan:
    """Load a plan, once for a file of the same content."""
    if isinstance(plan, Plan):
        return plan
    if not isinstance(plan, (str, os.PathLike)):
        raise OptionError(
            "the calibatt backend needs a plan",
            expected='options={"plan": path or Plan}',
            got=described(plan),
            remedy="calibrate the model once with `calibatt calibrate` or calibatt_compiler"
            ".calibrate, then pass the file",
        )
    path = _path(plan)
    known = _loaded.get(path)
    if known is None or not path.is_file() or file.record_digest(path) != known.digest:
        known = _loaded[path] = Plan.load(path)
    return known


def plan_digest(path: str | os.PathLike[str]) -> str:
    """Return the digest of the plan that a file holds now.

    Raises:
        PlanFormatError: it holds none.
    """
    return file.record_digest(_path(path))


def _path(plan: str | os.PathLike[str]) -> Path:
    return Path(plan).expanduser().resolve()


def cache_dir() -> Path:
    """Where generated kernels are kept: `CALIBATT_CACHE_DIR`, or `calibatt` in the user's cache.

    Where the user has no home, it is `fallback_dir`; that is said once.
    """
    chosen = os.environ.get("CALIBATT_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(chosen).expanduser() if chosen else Path(base).expanduser() / "calibatt"
    except RuntimeError as error:
        _say_homeless(str(error))
        return fallback_dir()


def fallback_dir() -> Path:
    """A folder for one user's kernels where temporary files lie."""
    return Path(tempfile.gettempdir()) / f"calibatt-{os.geteuid()}"


@functools.cache
def _say_homeless(reason: str) -> None:
    where = fallback_dir()
    log.warning("kernel cache: %s; kernels are kept in %s (CALIBATT_CACHE_DIR)", reason, where)


def debug_dir() -> Path | None:
    """Where graphs are dumped before and after each pass: `CALIBATT_DEBUG_DIR`, off by default."""
    chosen = os.environ.get("CALIBATT_DEBUG_DIR")
    if not chosen:
        return None
    try:
        return Path(chosen).expanduser()
    except RuntimeError:
        return Path(chosen)  # there is no home
