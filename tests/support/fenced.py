"""Tensors that lie between fences: a read outside gives NaN, a write outside is seen."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from unittest import mock

import torch
from torch import Tensor

FENCE = 4096
"""Elements on either side, a few tiles of the kernels."""
LAYOUTS = ("tokens", "tokens", "tokens", "heads", "fused", "gaps", "odd", "channels")
OUTPUTS = (
    "calibatt_compiler.kernels.reference.attention",
    "calibatt_compiler.kernels.cpu.attention",
    "calibatt_compiler.kernels.portable.attention",
    "calibatt_compiler.kernels.portable.zones",
    "calibatt_compiler.kernels.hopper.attention",
    "calibatt_compiler.kernels.hopper.zones",
)
"""Modules that take their output from `empty_output`."""
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Fences:
    """All buffers of a case, and what lay in them."""

    held: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    outputs: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def operand(self, name: str, values: Tensor, layout: str) -> Tensor:
        """Return values (B, H, S, D) in a layout, all around it and between it NaN and infinity.

        Args:
            name: for what is said.
            values: to copy.
            layout: one of `LAYOUTS`: contiguous (B, S, H, D) or (B, H, S, D), a part of a fused
                projection, rows with gaps, an odd address, or every other channel.
        """
        batch, heads, length, width = values.shape
        per_head, per_token, step, first = width, heads * width, 1, FENCE
        per_batch = length * per_token
        if layout == "heads":
            per_token, per_head = width, length * width
            per_batch = heads * per_head
        elif layout == "fused":
            per_token *= 3
            per_batch = length * per_token
        elif layout == "gaps":
            per_head = width + 8
            per_token = heads * per_head + 16
            per_batch = length * per_token + 64
        elif layout == "odd":
            first += 1
        elif layout == "channels":
            per_head, per_token, per_batch, step = (
                2 * width, 2 * per_token, 2 * per_batch, 2
            )  # fmt: skip
        size = batch * per_batch + 2 * FENCE + 2
        buffer = torch.full((size,), math.nan, dtype=values.dtype, device=values.device)
        buffer[::3] = math.inf
        made = buffer.as_strided(values.shape, (per_batch, per_head, per_token, step), first)
        made.copy_(values)
        self.held.append((name, buffer, buffer.clone()))
        return made

    def output(self, q: Tensor) -> Tensor:
        """`empty_output`, between fences and with NaN inside."""
        batch, heads, length, width = q.shape
        size = q.numel() + 2 * FENCE
        buffer = torch.full((size,), math.nan, dtype=q.dtype, device=q.device)
        self.outputs.append((buffer, buffer.clone()))
        inside = buffer[FENCE : FENCE + q.numel()]
        return inside.view(batch, length, heads, width).transpose(1, 2)

    @contextlib.contextmanager
    def around_outputs(self) -> Iterator[None]:
        """Let kernels write between fences."""
        with contextlib.ExitStack() as stack:
            for module in OUTPUTS:
                with contextlib.suppress(ImportError):  # no triton
                    stack.enter_context(mock.patch(f"{module}.empty_output", self.output))
            yield

    def broken(self) -> str | None:
        """Say what was written where nothing may be."""
        for name, buffer, before in self.held:
            if not torch.equal(_bits(buffer), _bits(before)):
                return f"{name} was written to"
        for buffer, before in self.outputs:
            for where, part in (("before", slice(FENCE)), ("behind", slice(-FENCE, None))):
                if not torch.equal(_bits(buffer[part]), _bits(before[part])):
                    return f"something was written {where} the output"
        return None


def _bits(x: Tensor) -> Tensor:
    return x.view(_INTEGERS[x.element_size()])


def draw_layout(draw: Random) -> str:
    """Draw a layout of an operand."""
    return draw.choice(LAYOUTS)
