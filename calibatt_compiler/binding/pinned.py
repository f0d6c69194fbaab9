"""Options of one `torch.compile` call as they stood when it first compiled: its plan stays."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from calibatt_compiler.binding.said import Said
from calibatt_compiler.errors import CalibattError
from calibatt_compiler.model.compile_calls import keywords_with
from calibatt_compiler.options import CompileOptions, plan_digest
from calibatt_compiler.plan import Plan


class PinnedOptions(dict[str, Any]):
    """A copy of the options that a compile call was given, with the plan that they meant then.

    Dynamo serves a frame by what another `torch.compile` call has compiled if the backends of both
    compare equal, options and all. A plan file made again has an equal path. So the options of a
    call are replaced by these when they are first read or compared, which are equal if their
    settings and the content of their plans are.
    """

    def __init__(self, given: Mapping[str, Any], parsed: CompileOptions | None) -> None:
        super().__init__(given)
        self.parsed = parsed
        self.said = Said()
        self._key = None if parsed is None else _key(parsed)

    @classmethod
    def of(cls, given: Mapping[str, Any] | None, mode: str | None = None) -> PinnedOptions:
        """Read options, once for the compile call that holds them.

        Args:
            given: what the backend was given.
            mode: that it was given.

        Raises:
            CalibattError: they can't be used. The call then equals no other, not even itself.
        """
        if isinstance(given, cls) and given.parsed is not None:
            return given
        pinned = cls(given or {}, None)
        try:
            pinned = cls(pinned, CompileOptions.parse(given, mode))
        finally:
            keywords = keywords_with(given)
            if keywords is not None:
                keywords["options"] = pinned
        return pinned

    @property
    def options(self) -> CompileOptions:
        """The checked options."""
        assert self.parsed is not None
        return self.parsed

    def changed(self) -> str | None:
        """Say, in words, that the plan's file is another one by now; None if it is not."""
        path = self.get("plan")
        if self.parsed is None or isinstance(path, Plan) or path is None:
            return None
        try:
            now = plan_digest(path)
        except CalibattError:
            return (
                f"{os.fspath(path)} holds no plan any more: the one compiled with goes on serving"
            )
        if now == self.parsed.plan.digest:
            return None
        return (
            f"{os.fspath(path)} holds another plan since, {now[:12]}: compile the model again to "
            "serve it"
        )

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, dict) or self._key is None:
            return False
        if not isinstance(other, PinnedOptions):
            # Options of a call that has compiled nothing yet. Where they can't be replaced, they
            # would mean another plan when the file changes: not equal, to be safe.
            if keywords_with(other) is None:
                return False
            try:
                other = PinnedOptions.of(other)
            except CalibattError:  # raised by the first call of what is then compiled
                return False
        return bool(self._key == other._key)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None  # as of any dict

    def __deepcopy__(self, memo: object) -> PinnedOptions:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def _key(parsed: CompileOptions) -> dict[str, Any]:
    key = {option.name: getattr(parsed, option.name) for option in fields(parsed)}
    return {**key, "plan": parsed.plan.digest}
