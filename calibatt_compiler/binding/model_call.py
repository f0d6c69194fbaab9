"""The call of the model that is under way: its timestep, and whether its tokens are the plan's.

A graph that is a part of a model has neither the timestep nor the latents among its inputs. But
whenever it runs, its model is being called (`callers`), with all of its arguments. They are read
once a forward pass, not once a graph: to read a timestep waits for the device.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from calibatt_compiler.model.calls import another_size
from calibatt_compiler.model.dynamo import TIMESTEPS, FrameInputs, Place
from calibatt_compiler.plan import Plan
from calibatt_compiler.runtime.coordinates import CoordinatesReader
from calibatt_compiler.runtime.timestep import OTHER_TOKENS, read, send


def call_inputs(
    root: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> FrameInputs:
    """Return the arguments of a model's call by name, as those of a captured frame are."""
    named = list(inspect.signature(type(root).forward).parameters)[1:]
    values = {**dict(zip(named, args, strict=False)), **kwargs}
    tensors = frozenset(name for name, value in values.items() if isinstance(value, Tensor))
    return FrameInputs(
        module=root,
        values=values,
        constants=frozenset(values) - tensors,
        given=tensors,
        place=Place(root, root),
    )


def timestep_in(inputs: FrameInputs) -> Tensor | None:
    """Return the timestep of a model's call; None if it has none that can be read."""
    for name in TIMESTEPS:
        value = inputs.values.get(name)
        if isinstance(value, Tensor):
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return torch.tensor(float(value), dtype=torch.float64)
    return None


@dataclass
class _Pass:
    """What was read of a forward pass, and of which tensors."""

    tensors: Mapping[str, tuple[weakref.ref[Tensor], int | None]]
    others: Mapping[str, object]
    timestep: float
    parts: set[Hashable] = field(default_factory=set)


class ModelCallReader:
    """Reads the timestep of the call under way, once a forward pass.

    Args:
        plan: whose tokens the call should have; None: nothing is compared.
        coordinates: what is shown the coordinates of the tokens.
        look: receives the arguments of each call, once or more.
    """

    def __init__(
        self,
        plan: Plan | None,
        coordinates: CoordinatesReader,
        look: Callable[[FrameInputs], None] = lambda inputs: None,
    ) -> None:
        self._plan = plan
        self._coordinates = coordinates
        self._look = look
        self._threads = threading.local()

    def timestep(
        self,
        root: torch.nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        part: Hashable,
    ) -> float:
        """Return the timestep of a call of a model; see `runtime.timestep`.

        Args:
            root: the model.
            args: what it was called with.
            kwargs: likewise.
            part: which part of the model asks; each does so once a forward pass.

        Raises:
            KeyError: the call has none.
        """
        inputs = call_inputs(root, args, kwargs)
        last: _Pass | None = getattr(self._threads, "last", None)
        if last is None or not _same(last, inputs, part):
            last = self._threads.last = self._read(inputs)
        last.parts.add(part)
        return last.timestep

    def _read(self, inputs: FrameInputs) -> _Pass:
        self._look(inputs)
        timestep = timestep_in(inputs)
        if timestep is None:
            raise KeyError("timestep")
        shown = [self._coordinates.read(name, inputs.values[name]) for name in inputs.coordinates()]
        value = read(send(timestep, [fits for fits in shown if fits is not None]))
        if self._plan is not None and another_size(self._plan, inputs) is not None:
            value = OTHER_TOKENS
        return _Pass(
            {
                name: (weakref.ref(x), None if x.is_inference() else x._version)
                for name, x in _tensors(inputs).items()
            },
            _others(inputs),
            value,
        )


def _same(last: _Pass, inputs: FrameInputs, part: Hashable) -> bool:
    """Whether a call is known to be the one that was read, or equal to it."""
    now = _tensors(inputs)
    if last.tensors.keys() != now.keys() or last.others != _others(inputs):
        return False
    for name, (held, version) in last.tensors.items():
        if held() is not now[name]:
            return False
        # What is written into an inference tensor is not counted: a part that comes again is taken
        # for that of another pass.
        if part in last.parts if version is None else version != now[name]._version:
            return False
    return True


def _tensors(inputs: FrameInputs) -> dict[str, Tensor]:
    return {name: inputs.values[name] for name in inputs.given}


def _others(inputs: FrameInputs) -> dict[str, object]:
    plain = (int, float, str, bool)
    return {name: x for name, x in inputs.values.items() if isinstance(x, plain)}
