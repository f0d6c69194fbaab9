"""Run the Hopper kernel's own source on a CPU: its warps as threads, its barriers as conditions.

Gluon has no interpreter. This one covers what the Hopper kernel uses and is meant to find what a
compiler can't: a barrier that waits for ever, a tile that is overwritten while a product reads it,
a block left out, a row masked wrongly. So it is as late and as unkind as the hardware may be:
products read their operands when they are waited for, loads leave NaN until they have landed, and
every read out of bounds is an error.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from gluon_registers import (
    Memory,
    Pointer,
    Tile,
    choose,
    inline_asm,
    load,
    of_two,
    reduce,
    store,
    tile,
)

TIMEOUT = 20.0
"""Seconds after which a barrier counts as a deadlock."""

_thread = threading.local()


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all expected bytes are there."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = 0

    def init(self, count: int) -> None:
        self.count = self.pending = count
        self.bytes = self.phase = 0

    def update(self, arrivals: int, size: int) -> None:
        with self.changed:
            assert self.count, "a barrier was used before it was initialised"
            self.pending -= arrivals
            self.bytes += size
            assert self.pending >= 0, "more arrivals than the barrier counts"
            if self.pending == 0 and self.bytes == 0:
                self.phase += 1
                self.pending = self.count
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            done = self.changed.wait_for(
                lambda: self.phase % 2 != parity or _thread.program.failed, TIMEOUT
            )
            assert done, "deadlock"
            assert not _thread.program.failed, "another warp failed"


class SharedTiles:
    """Tiles (N, 1, 1, rows, D) in shared memory, uninitialised."""

    def __init__(self, dtype: str, shape: Sequence[int]) -> None:
        self.dtype, self.shape = dtype, list(shape)
        self.array = np.full(shape, np.nan, np.float32)

    def index(self, i: int) -> SharedTiles:
        part = SharedTiles(self.dtype, [1])
        part.array = self.array[i]
        part.shape = list(part.array.shape)
        return part

    def reshape(self, shape: Sequence[int]) -> SharedTiles:
        part = SharedTiles(self.dtype, [1])
        part.array = self.array.reshape(shape)
        assert part.array.base is not None
        part.shape = list(shape)
        return part

    def permute(self, order: Sequence[int]) -> SharedTiles:
        part = SharedTiles(self.dtype, [1])
        part.array = self.array.transpose(order)
        part.shape = list(part.array.shape)
        return part

    def store(self, value: np.ndarray) -> None:
        self.array[...] = value
        if self.shape == [1]:
            _thread.unordered = True
        else:
            _thread.unfenced = True

    def load(self, _: object) -> Any:
        return Late(self) if self.shape == [1] else tile(self.array.copy())


class Late:
    """A number on its way from shared memory: it is there when something waits for it."""

    def __init__(self, source: SharedTiles) -> None:
        self.source = source
        self.result: Tile | None = None

    def finish(self) -> None:
        assert not np.isnan(self.source.array).any(), "read before it was written"
        self.result = tile(self.source.array.copy())


class Pieces:
    """The same memory as pieces of 8 rows x 64 columns: how tiles lie that TMA swizzles."""

    def __init__(self, tiles: SharedTiles, dtype: str, shape: Sequence[int], _: object) -> None:
        assert dtype == tiles.dtype
        self.tiles = tiles
        number, _, _, self.rows, self.columns = tiles.shape
        assert list(shape) == [number * self.rows * self.columns // 512, 8, 64]

    def index(self, i: int) -> SharedTiles:
        i, group = divmod(i, self.rows // 8)
        number, strip = divmod(i, self.columns // 64)
        part = SharedTiles(self.tiles.dtype, [1])
        rows, columns = slice(group * 8, group * 8 + 8), slice(strip * 64, strip * 64 + 64)
        part.array = self.tiles.array[number, 0, 0, rows, columns]
        part.shape = list(part.array.shape)
        return part


class Barriers:
    def __init__(self, number: int) -> None:
        self.all = [Barrier() for _ in range(number)]

    def index(self, i: int) -> Barrier:
        return self.all[i]


class Descriptor:
    """A TMA descriptor: tiles of a (B, H, S, D) tensor, zeros past its end."""

    layout = None

    def __init__(self, tensor: torch.Tensor, rows: int) -> None:
        self.tensor, self.rows = tensor, rows
        self.dtype = str(tensor.dtype).removeprefix("torch.")
        shape = [1, 1, rows, tensor.shape[3]]
        nbytes = rows * tensor.shape[3] * tensor.itemsize
        self.block_type = SimpleNamespace(shape=shape, nbytes=nbytes)

    def part(self, coordinates: Sequence[int]) -> torch.Tensor:
        batch, head, row, column = coordinates
        assert column == 0
        assert 0 <= batch < self.tensor.shape[0]
        assert 0 <= head < self.tensor.shape[1]
        return self.tensor[batch, head, row : row + self.rows]


def start_load(desc: Descriptor, coordinates: Any, full: Barrier, into: SharedTiles) -> None:
    into.array[...] = np.nan
    if random.random() < 0.1:
        time.sleep(0.0005)
    part = desc.part(coordinates).float().numpy()
    into.array[...] = 0
    into.array[0, 0, : len(part)] = part
    full.update(0, -desc.block_type.nbytes)


def start_gather(into: SharedTiles, pointer: Pointer) -> None:
    """Rows through the generic proxy; they land when their group is waited for."""
    assert pointer.offset.shape == into.array.shape
    assert (pointer.offset[:, ::8] % 8 == 0).all(), "rows that are not aligned to 16 bytes"
    into.array[...] = np.nan
    _thread.gathers.append((into, pointer))


def commit_group() -> None:
    _thread.groups.append(_thread.gathers)
    _thread.gathers = []


def wait_group(outstanding: int) -> None:
    """Copies that were not committed are not waited for."""
    while len(_thread.groups) > outstanding:
        for into, pointer in _thread.groups.pop(0):
            into.array[...] = pointer.memory.read(pointer.offset)
            _thread.unfenced = True


def fence() -> None:
    _thread.unfenced = False


def order() -> None:
    _thread.unordered = False


def expect(barrier: Barrier, size: int) -> None:
    """One lane arrives for its warp."""
    assert not _thread.unordered, "written by other lanes than the one that arrives"
    barrier.update(1, size)


def arrive(barrier: Barrier, count: int) -> None:
    """What this warp wrote, others read through the asynchronous proxy."""
    assert not _thread.unfenced, "written to shared memory and not fenced"
    barrier.update(count, 0)


def start_store(desc: Descriptor, coordinates: Any, source: SharedTiles) -> None:
    part = desc.part(coordinates)
    values = torch.from_numpy(source.array[0, 0, : len(part)].copy())
    part.copy_(values.to(part.dtype))


class Product:
    """A product that is under way: it reads its operands when it is waited for."""

    def __init__(self, a: Any, b: SharedTiles, acc: Any, use_acc: bool) -> None:
        self.a, self.b, self.acc, self.use_acc = a, b, acc, use_acc
        self.result: Tile | None = None

    def finish(self) -> None:
        a = self.a.array if isinstance(self.a, SharedTiles) else np.asarray(self.a)
        # Not `@`: its threads and ours would fight for the cores.
        product = np.einsum("mk,kn->mn", a, self.b.array)
        self.result = tile(np.asarray(self.acc) + product if self.use_acc else product)


def warpgroup_mma(a: Any, b: Any, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Any:
    product = Product(a, b, acc, use_acc)
    _thread.products.append(product)
    return product if is_async else warpgroup_mma_wait(0, deps=[product])


def warpgroup_mma_wait(outstanding: int = 0, deps: Any = None) -> Any:
    while len(_thread.products) > outstanding:
        _thread.products.pop(0).finish()
    results = []
    for dep in deps:
        if isinstance(dep, Late):
            dep.finish()
        result = dep.result if isinstance(dep, Product | Late) else dep
        assert result is not None, "a product was used before it was waited for"
        results.append(result)
    return results[0] if len(results) == 1 else tuple(results)


def allocate(dtype: Any, shape: Sequence[int], layout: object) -> Any:
    return Barriers(shape[0]) if dtype == "int64" else SharedTiles(dtype, shape)


def atomic_add(pointer: Pointer, value: int) -> None:
    pointer.memory.write(pointer.offset, pointer.memory.read(pointer.offset) + value)


def warp_specialize(parts: Any, warps: object, registers: object) -> None:
    program = _thread.program

    def run(function: Callable[..., None], arguments: Any) -> None:
        _thread.program, _thread.products = program, []
        _thread.gathers, _thread.groups = [], []
        _thread.unfenced = _thread.unordered = False
        try:
            with np.errstate(all="ignore"):
                function(*arguments)
            assert not _thread.products, "a product was never waited for"
            waiting = _thread.gathers or _thread.groups
            assert not waiting, "gathered rows were never waited for"
        except BaseException as error:
            program.failed.append(error)

    threads = [threading.Thread(target=run, args=part, daemon=True) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(4 * TIMEOUT)
        if thread.is_alive():
            program.failed.append(AssertionError("a warp does not end"))
    if program.failed:
        raise program.failed[0]


def layout(*_: object) -> None:
    return None


GL = SimpleNamespace(
    float32="float32", int32="int32", int64="int64",
    load=load, store=store, where=choose, atomic_add=atomic_add,
    zeros=lambda shape, dtype, _: tile(np.zeros(shape, dtype)),
    full=lambda shape, value, dtype, _: tile(np.full(shape, value, dtype)),
    arange=lambda a, b, _: tile(np.arange(a, b, dtype=np.int32)),
    max=reduce(np.fmax.reduce), sum=reduce(np.add.reduce),
    maximum=of_two(np.fmax), minimum=of_two(np.fmin),
    expand_dims=lambda x, axis: tile(np.expand_dims(x, axis)),
    reshape=lambda x, shape: tile(np.reshape(x, shape)),
    convert_layout=lambda x, _: x, cast=lambda x, _: x,
    log2=lambda x: tile(np.log2(x)),
    inline_asm_elementwise=inline_asm, static_range=range,
    program_id=lambda axis: _thread.program.index[axis],
    allocate_shared_memory=allocate, warp_specialize=warp_specialize,
    NVMMADistributedLayout=layout, SliceLayout=layout, DotOperandLayout=layout,
    BlockedLayout=layout, NVMMASharedLayout=layout,
)  # fmt: skip
MBARRIER = SimpleNamespace(
    MBarrierLayout=layout,
    init=lambda barrier, count: barrier.init(count),
    expect=expect,
    arrive=arrive,
    wait=lambda barrier, phase, pred=True: barrier.wait(phase) if pred else None,
)
NAMES = {
    "gl": GL,
    "mbarrier": MBARRIER,
    "tma": SimpleNamespace(store_wait=lambda pending: None),
    # Every thread of a warpgroup arrives.
    "async_copy": SimpleNamespace(
        mbarrier_arrive=lambda barrier, increment_count: barrier.update(128, 0),
        commit_group=commit_group,
        wait_group=wait_group,
    ),
    "reinterpret": Pieces,
    "start_gather": start_gather,
    "start_load": start_load,
    "start_store": start_store,
    "warpgroup_mma": warpgroup_mma,
    "warpgroup_mma_wait": warpgroup_mma_wait,
    "fence_async_shared": fence,
    "warp_barrier": order,
}


def interpret(kernel: Any, known: dict[Any, Callable[..., Any]] | None = None) -> Any:
    """Return the Python function behind a Gluon function, calling interpreted ones throughout."""
    known = {} if known is None else known
    if kernel in known:
        return known[kernel]
    source = kernel.fn
    names: dict[str, Any] = {"__builtins__": __builtins__}
    function = FunctionType(source.__code__, names, source.__name__, source.__defaults__)
    known[kernel] = function
    for name in source.__code__.co_names:
        value = source.__globals__.get(name)
        if name in NAMES:
            names[name] = NAMES[name]
        elif getattr(value, "__triton_aggregate__", False):
            names[name] = interpret_aggregate(value, known)
        elif hasattr(value, "fn"):
            names[name] = interpret(value, known)
        elif hasattr(value, "value"):
            names[name] = value.value
        elif value is not None:
            names[name] = value
    return function


def interpret_aggregate(kind: Any, known: dict[Any, Callable[..., Any]]) -> Any:
    """Return a class of the same methods, interpreted, whose fields are given by name."""
    if kind not in known:
        methods = {name: method for name, method in vars(kind).items() if hasattr(method, "fn")}
        known[kind] = stand_in = type(kind.__name__, (SimpleNamespace,), {})
        for name, method in methods.items():
            setattr(stand_in, name, interpret(method, known))
    return known[kind]


class Interpreted:
    """Stands for a Gluon kernel: `kernel[grid](...)` runs its programs one after another."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.function = interpret(kernel)
        self.launches = 0

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        def launch(*positional: Any, num_warps: int, enable_fp_fusion: bool = True, **named: Any):
            self.launches += 1
            positional = [self.argument(value) for value in positional]
            named = {name: self.argument(value) for name, value in named.items()}
            for index in np.ndindex(*grid):
                _thread.program = SimpleNamespace(index=index, failed=[])
                _thread.gathers, _thread.groups = [], []
                _thread.unfenced = _thread.unordered = False
                with np.errstate(all="ignore"):
                    self.function(*positional, **named)

        return launch

    @staticmethod
    def argument(value: Any) -> Any:
        if hasattr(value, "_fields"):
            return type(value)(*map(Interpreted.argument, value))
        if isinstance(value, torch.Tensor):
            return Pointer(Memory(value))
        return interpret(value) if hasattr(value, "fn") else value
