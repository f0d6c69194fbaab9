"""Types of arguments at the public entries: what is of another type is named, not stumbled over."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Collection, Iterable
from typing import Any

from calibatt_compiler.errors import CalibattError, OptionError


def described(value: object) -> str:
    """Return a value in a few words: its type, with shape and dtype if it has them."""
    kind = type(value)
    name = kind.__qualname__
    if kind.__module__ != "builtins":
        name = f"{kind.__module__.partition('.')[0]}.{name}"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{name} of {value.dtype}, shape {tuple(value.shape)}"
    return f"{name} {repr(value)[:80]}"


def require(
    found: bool,
    name: str,
    value: object,
    expected: str,
    *,
    error: type[CalibattError] = OptionError,
    remedy: str | None = None,
) -> None:
    """Raise an error of ours about the argument `name` unless `found`."""
    if not found:
        raise error(
            f"{name!r} is of another type",
            expected=expected,
            got=described(value),
            remedy=remedy or "see its documentation",
        )


def require_path(name: str, value: object, *, error: type[CalibattError] = OptionError) -> None:
    """Raise unless a value is the path of a file."""
    path = value if isinstance(value, str) else None
    if isinstance(value, os.PathLike):
        path = os.fspath(value)
    require(isinstance(path, str), name, value, "a path: a text or pathlib.Path", error=error)


def is_integers(value: object, count: int) -> bool:
    """Whether a value is so many integers."""
    return (
        isinstance(value, (tuple, list))
        and len(value) == count
        and all(isinstance(item, int) and not isinstance(item, bool) for item in value)
    )


def is_one_of(value: object, choices: Collection[object]) -> bool:
    """Whether a value is one of some texts, numbers or None; arrays compare by themselves."""
    return any(type(value) is type(choice) and value == choice for choice in choices)


def known(names: Iterable[str], all_names: Collection[str], problem: Callable[[str], Any]) -> None:
    """Raise `OptionError` for the first name that is not among all, with the closest one."""
    for name in names:
        if name not in all_names:
            close = difflib.get_close_matches(str(name), all_names, n=1)
            listed = ", ".join(sorted(all_names)) if len(all_names) <= 40 else "a known name"
            raise OptionError(
                problem(name),
                expected=f"one of {listed}" if len(all_names) <= 40 else listed,
                got=repr(name),
                remedy=f"did you mean {close[0]!r}?" if close else "leave it out",
            )
