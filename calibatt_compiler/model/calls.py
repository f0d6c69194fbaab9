"""What fixes the tokens of a call, and whether they are those that a plan was made for.

A mask says which tokens attend to which, by their places in the sequence. Two calls with as many
tokens may still lay them out differently: a portrait video has as many as the landscape one. What
the plan records of its calibration (`FixedBy`) is compared with the call: the grid, where both can
be read; else shapes and numbers among the arguments. Coordinates of tokens are values on the
device: they are compared once a forward pass (`runtime.coordinates`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from calibatt_compiler.model import families as models
from calibatt_compiler.model.dynamo import FrameInputs
from calibatt_compiler.plan import Plan
from calibatt_compiler.plan.coordinates import OF_TEXT, OF_VIDEO
from calibatt_compiler.plan.schema import FixedBy

NOT_OF_VIDEO = (
    "encoder_", "text", "txt", "cap_", "prompt", "pooled", "audio", "attention_mask", "timestep",
    "guidance", "sigma", "joint_attention", "id_", "image_embeds", "global_", "fps", "frame_rate",
)  # fmt: skip
"""How names of arguments begin that say nothing of the video's tokens."""

UNKNOWN = "the grid of this call can't be read, and the plan is of"


def transformer_of(inputs: FrameInputs, class_name: str | None = None) -> torch.nn.Module | None:
    """Return the transformer that a frame is or calls.

    Args:
        inputs: of the frame.
        class_name: its class, if known: it, or a class derived from it, comes first.
    """
    chain = [] if inputs.place.root is None else [inputs.place.root]
    chain += [] if inputs.module is None else [inputs.module]
    chain += [enclosing.module for enclosing in inputs.enclosing]
    for module in chain:
        if class_name is not None and models.is_class(type(module), class_name):
            return module
    known = (m for m in chain if models.config_of(m) or models.family_of(type(m)))
    return next(known, inputs.place.root or inputs.module)


def read_grid(inputs: FrameInputs) -> tuple[Any, Any, Any] | None:
    """Return the tokens (frames, height, width) of a call; None if they can't be read.

    Sizes may be symbolic. Where the call has coordinates for its tokens, numbers do not count: the
    models take the coordinates.
    """
    module = transformer_of(inputs)
    if module is None:
        return None
    sizes = {
        name: value
        for name, value in inputs.values.items()
        if isinstance(value, torch.Tensor) or _is_read(inputs, name)
    }
    if video_coordinates(inputs):
        sizes = {name: v for name, v in sizes.items() if isinstance(v, torch.Tensor)}
    entering = next((e.entering for e in inputs.enclosing if e.module is module), None)
    return models.latent_grid(module, sizes, None if module is inputs.module else entering)


def video_coordinates(inputs: FrameInputs) -> tuple[str, ...]:
    """Return the names of the arguments that place the video's tokens, if the graph reads them."""
    return tuple(name for name in inputs.coordinates() if name in OF_VIDEO)


def fixed_by(inputs: FrameInputs) -> FixedBy:
    """Return what fixes the tokens of a captured call, but for the coordinates."""
    given = _given(inputs)
    tensors = {name: x for name, x in given.items() if isinstance(x, torch.Tensor)}
    return FixedBy(
        grid="length",
        shapes={name: (None, *map(int, x.shape[1:])) for name, x in tensors.items()},
        integers={name: int(x) for name, x in given.items() if name not in tensors},
    )


def another_size(plan: Plan, inputs: FrameInputs) -> str | None:
    """Return why the tokens of a call are not the plan's, in words, or None.

    Symbolic sizes are compared, which makes Dynamo guard on the answer.
    """
    record, grid = plan.metadata.fixed_by, read_grid(inputs)
    if record is None and _is_length(plan.grid) and not _is_known(inputs):
        return None  # nobody knew how the tokens are laid out: there is nothing to compare
    if record is not None and record.grid != "call":
        differing = _differing(record, inputs)
        if differing is None or differing:
            return differing and f"another size: {differing}"
        if record.grid == "length":
            return _unknown(plan)
    if grid is not None:
        return None if _same(grid, plan) else _other_grid(plan, grid)
    # Coordinates are compared when they are there.
    return None if video_coordinates(inputs) else _unknown(plan)


def _is_length(grid: tuple[int, int, int]) -> bool:
    return sorted(grid)[:2] == [1, 1]


def _is_known(inputs: FrameInputs) -> bool:
    module = transformer_of(inputs)
    return module is not None and models.family_of(type(module)) is not None


def _unknown(plan: Plan) -> str:
    frames, height, width = plan.grid
    return f"another size, perhaps: {UNKNOWN} {frames} x {height} x {width} tokens"


def _other_grid(plan: Plan, grid: tuple[Any, ...]) -> str:
    got, planned = (" x ".join(str(hint(n)) for n in sizes) for sizes in (grid, plan.grid))
    return f"another size: {got} latent tokens instead of {planned}"


def hint(size: Any) -> Any:
    """Return the value that a symbolic size was captured with."""
    node = getattr(size, "node", None)
    return size if node is None else getattr(node, "hint", size)


def _differing(record: FixedBy, inputs: FrameInputs) -> str | None:
    """Return what differs from the record; None: nothing; empty: not all of it is in the call."""
    given = _given(inputs)
    tensors = {name: x for name, x in given.items() if isinstance(x, torch.Tensor)}
    unknown = any(name in OF_VIDEO and name not in inputs.values for name in record.coordinates)
    for name, dims in record.shapes.items():
        if name not in tensors:  # a function around the model may name its arguments otherwise
            unknown |= not any(_alike(x, dims) for x in tensors.values())
        elif not _alike(tensors[name], dims):
            got = tuple(hint(size) for size in tensors[name].shape[1:])
            return f"{name} is (samples, {_listed(got)}) instead of (samples, {_listed(dims[1:])})"
    for name, number in record.integers.items():
        if name not in given:
            unknown = True
        elif given[name] != number:
            return f"{name} is {hint(given[name])} instead of {number}"
    return "" if unknown else None


def _alike(x: torch.Tensor, dims: tuple[int | None, ...]) -> bool:
    return x.dim() == len(dims) and all(
        got == size for got, size in zip(x.shape[1:], dims[1:], strict=True)
    )


def _listed(sizes: tuple[Any, ...]) -> str:
    return ", ".join(map(str, sizes))


def _given(inputs: FrameInputs) -> Mapping[str, Any]:
    """Arguments that may say how the video's tokens are laid out: tensors and integers."""
    placing = (*OF_VIDEO, *OF_TEXT)
    return {
        name: value
        for name, value in inputs.values.items()
        if name not in placing
        and not name.startswith(NOT_OF_VIDEO)
        and (
            (isinstance(value, torch.Tensor) and inputs.reads(name) and value.dim() > 1)
            or _is_read(inputs, name)
        )
    }


def _is_read(inputs: FrameInputs, name: str) -> bool:
    """Whether an argument is an integer that the captured code reads."""
    value = inputs.values.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        return False
    return name in inputs.placeholders or name in inputs.constants


def _same(grid: tuple[Any, ...], plan: Plan) -> bool:
    # Attention within single frames knows of one of them only. Where text may have any length, the
    # number of tokens would not tell more frames from more text.
    first = 1 if plan.grid[0] == 1 and plan.text_position is None else 0
    return all(got == size for got, size in zip(grid[first:], plan.grid[first:], strict=True))
