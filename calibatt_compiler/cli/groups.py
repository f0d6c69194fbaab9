"""Groups of options: a dataclass each, which commands take as one parameter.

    @grouped
    def compare(model: Model, video: Video, inputs: Inputs = Inputs(seed=1000)) -> None:

typer sees one option a field, with the field's default or that of the parameter's own default. What
is under `ADVANCED` comes last in the help.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

ADVANCED = "Advanced"
"""Panel of what few people need."""


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command with the options of its groups as parameters, for typer."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for own in inspect.signature(command).parameters.values():
        if own.name not in groups:
            parameters.append(_parameter(own.name, hints[own.name], own.default))
            continue
        types = get_type_hints(groups[own.name], include_extras=True)
        for each in fields(groups[own.name]):
            given = own.default is not own.empty
            default = getattr(own.default, each.name) if given else each.default
            parameters.append(_parameter(each.name, types[each.name], default))

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, group in groups.items():
            own = {each.name: given.pop(each.name) for each in fields(group)}
            given[name] = group(**own)
        command(**given)

    ordered = sorted(parameters, key=lambda parameter: _panel(parameter) == ADVANCED)
    run.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in ordered}
    return run


def _parameter(name: str, annotation: object, default: object) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def _panel(parameter: inspect.Parameter) -> str | None:
    (option,) = parameter.annotation.__metadata__
    panel: str | None = option.rich_help_panel
    return panel
