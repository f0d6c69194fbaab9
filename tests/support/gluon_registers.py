"""Tensors in registers and what pointers reach, for the interpreter of Gluon kernels."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch


class Tile(np.ndarray):
    """A tensor in registers: float32 or int32; layouts are not modelled."""

    type = SimpleNamespace(layout=None)

    def to(self, dtype: str, bitcast: bool = False) -> Tile:
        return tile(self.view(dtype)) if bitcast else rounded(self, dtype)


def tile(x: Any) -> Any:
    return np.asarray(x).view(Tile) if np.ndim(x) else x


def rounded(x: np.ndarray, dtype: str) -> Tile:
    """Round to bfloat16 or float16, kept in float32; overflow gives infinity."""
    low = getattr(torch, dtype)
    return tile(torch.from_numpy(np.array(x, np.float32)).to(low).float().numpy())


class Memory:
    """What a pointer may reach: the elements of a tensor of any strides, and nothing between."""

    def __init__(self, tensor: torch.Tensor) -> None:
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        size = 1 + sum((length - 1) * stride for length, stride in steps)
        self.flat = tensor.as_strided((size,), (1,))
        self.own = torch.zeros(size, dtype=torch.bool)
        self.own.as_strided(tensor.shape, tensor.stride()).fill_(True)

    def check(self, offsets: torch.Tensor) -> torch.Tensor:
        inside = (offsets >= 0) & (offsets < len(self.own))
        assert inside.all(), f"access out of bounds: {offsets} of {len(self.own)}"
        assert self.own[offsets].all(), "access between the rows of a tensor"
        return offsets

    def read(self, offsets: Any) -> Any:
        """Values of registers: integers, or floats of 32 bits."""
        values = self.flat[self.check(torch.as_tensor(np.asarray(offsets)).long())]
        return (values.float() if values.is_floating_point() else values).numpy()

    def write(self, offsets: Any, values: Any) -> None:
        where = self.check(torch.as_tensor(np.asarray(offsets)).long())
        self.flat[where] = torch.as_tensor(np.array(values)).to(self.flat.dtype)


class Pointer:
    """A pointer into a tensor, or a vector of them."""

    def __init__(self, memory: Memory, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset

    def __add__(self, step: Any) -> Pointer:
        return Pointer(self.memory, self.offset + step)


def load(pointer: Pointer, mask: Any = None, other: Any = None) -> Any:
    if not np.ndim(pointer.offset):
        return pointer.memory.read(pointer.offset).item()
    if mask is None:
        return tile(pointer.memory.read(pointer.offset))
    inside = np.broadcast_to(np.asarray(mask), pointer.offset.shape)
    found = pointer.memory.read(pointer.offset[inside])
    values = np.full(inside.shape, other or 0, found.dtype)
    values[inside] = found
    return tile(values)


def store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    if mask is None:
        pointer.memory.write(pointer.offset, value)
        return
    inside = np.broadcast_to(np.asarray(mask), pointer.offset.shape)
    pointer.memory.write(pointer.offset[inside], np.broadcast_to(value, inside.shape)[inside])


def choose(condition: Any, a: Any, b: Any) -> Any:
    if np.ndim(condition) == 0:
        return a if condition else b
    return tile(np.where(condition, a, b).astype(np.result_type(a, b), copy=False))


def inline_asm(asm: Any, _: str, operands: list[Any], *__: object, **___: object) -> Any:
    """The pieces of PTX that kernels have: 2^x, rescaling, and literals looked up by number."""
    asm = getattr(asm, "value", asm)
    if found := re.search(r"\.const \S+ \d+ \.b32 runs\[(\d+)\] = \{([^}]*)\}", asm):
        words = [int(word) for word in found[2].split(",")]
        assert len(words) == int(found[1])
        assert 0 <= operands[0] < len(words), "literals read out of bounds"
        return words[operands[0]]
    if asm.startswith("ex2.approx.ftz"):
        result = np.exp2(np.asarray(operands[0], np.float32))
        return tile(np.where(result < 2.0**-126, np.float32(0), result))
    assert "vote.sync.any" in asm
    assert asm.count("mul.f32") == operands[0].shape[1] // 2
    return operands[0] * operands[1]


def reduce(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, axis: tile(function(np.asarray(x), axis))


def of_two(function: Callable[..., Any]) -> Callable[..., Any]:
    def apply(a: Any, b: Any) -> Any:
        both = function(a, b)
        return tile(both) if np.ndim(both) else type(a)(both)

    return apply
