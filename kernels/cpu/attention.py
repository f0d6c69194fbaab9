"""Block-sparse attention and block energies on a CPU, in C++ that Inductor compiles.

Whoever compiles a model for a CPU has the C++ compiler that this needs: Inductor compiles the
source with its own flags, at first use, once a machine for each dtype and head dim, and keeps the
library in its cache. Indices are tables, so one library serves every pattern.

FlexAttention with a `BlockMask` would serve the same patterns; it is the peer in
`benchmarks/cpu_attention.py`. Its CPU template took 2 to 3 times as long there, which at the
densities that keep a video's quality is no faster than dense attention.
"""

from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.common.operands import check_operands, empty_output
from calibatt_compiler.kernels.common.padding import KeyPadding
from calibatt_compiler.kernels.common.row_copies import copy_tables
from calibatt_compiler.plan.pattern import BlockPattern

Tables = tuple[npt.NDArray[Any] | None, ...]

PANEL_KEYS = 16
"""Keys a packed panel; what a pattern's blocks are multiples of."""

_ELEMENTS = {
    torch.float64: ("double", "double"),
    torch.float32: ("float", "float"),
    torch.bfloat16: ("c10::BFloat16", "float"),
    torch.float16: ("c10::Half", "float"),
}
"""By dtype: what the operands hold, what is computed in."""


class NativeCpuAttention:
    """Block-sparse attention on a CPU; half types are computed in float32.

    Compiled when it is made, which takes some seconds once a machine, dtype and head dim.

    Attributes:
        kind: "native-cpu".
        density: the pattern's own density, and the pooled keys as part of it.
        table_bytes: what its tables take.

    Raises:
        KernelError: there is no C++ compiler, or it fails.
    """

    kind = "native-cpu"
    reason = None
    repairs = 0

    def __init__(self, pattern: BlockPattern, *, dtype: torch.dtype, head_dim: int) -> None:
        self.pattern = pattern
        self._library = library(dtype, head_dim)
        self._specialisation = (dtype, head_dim)
        self.density = pattern.computed_density
        runs = pattern.intervals()
        order = _longest_first(pattern)
        self._tables = (order, runs.offsets, runs.starts, runs.ends, runs.log_weights, None)
        copies = copy_tables(pattern)
        self._copies: tuple[npt.NDArray[Any] | None, ...] = (None, None, None)
        self._count, self._slots = 0, 0
        if copies is not None:
            self._copies = (pattern.repetitive, copies.computed, copies.targets)
            self._slots, self._count = copies.targets.shape
        tables = (*self._tables, *self._copies)
        self.table_bytes = sum(table.nbytes for table in tables if table is not None)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        padding: KeyPadding | None = None,
    ) -> Tensor:
        """Return the attention output, (B, H, Sq, D) laid out as contiguous (B, Sq, H, D).

        Args:
            q: (B, H, Sq, D) on the CPU, any strides.
            k: (B, H, Sk, D).
            v: (B, H, Sk, D).
            scale: factor on the scores; default 1 / sqrt(D).
            padding: what a mask says of the keys; None: there is none.

        Raises:
            KernelError: the operands don't fit the pattern, one another or this kernel.
        """
        return self._attend(q, k, v, scale, (None, None), padding)

    def reordered(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        query_tokens: Tensor,
        key_tokens: Tensor,
        *,
        scale: float | None = None,
        padding: KeyPadding | None = None,
    ) -> Tensor:
        """Attend tokens in the pattern's order; see `ReorderingKernel`.

        Raises:
            KernelError: the operands don't fit, or the tokens are no permutations.
        """
        _check_tokens("query_tokens", query_tokens, self.pattern.query_length)
        _check_tokens("key_tokens", key_tokens, self.pattern.key_length)
        return self._attend(q, k, v, scale, (query_tokens, key_tokens), padding)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        tokens: tuple[Tensor | None, Tensor | None],
        padding: KeyPadding | None,
    ) -> Tensor:
        pattern = self.pattern
        check_operands(pattern, q, k, v, padding)
        check_compiled_for(q, self._specialisation)
        others = (pattern.pooled, pattern.bits, self._copies, (self._count, self._slots))
        block = (pattern.block_m, pattern.block_n)
        call = (self._library, (q, k, v), block, scale, tokens, self._tables)
        return attend(*call, *others, padding=padding)


def check_compiled_for(q: Tensor, specialisation: tuple[torch.dtype, int]) -> None:
    """Raise `KernelError` unless q is on the CPU, of this dtype and so many channels a head."""
    if (q.dtype, q.shape[-1]) != specialisation or q.device.type != "cpu":
        raise KernelError(
            "the operands are not what the kernel was compiled for",
            expected="{} with {} channels a head, on the CPU".format(*specialisation),
            got=f"{q.dtype} with {q.shape[-1]}, on {q.device}",
            remedy="make a kernel for each dtype and head dim",
        )


def attend(
    compiled: Any,
    operands: tuple[Tensor, Tensor, Tensor],
    block: tuple[int, int],
    scale: float | None,
    tokens: tuple[Tensor | None, Tensor | None],
    tables: Tables,
    pooled: int = 0,
    bits: npt.NDArray[np.uint8] | None = None,
    copies: tuple[npt.NDArray[Any] | None, ...] = (None, None, None),
    copy_sizes: tuple[int, int] = (0, 0),
    padding: KeyPadding | None = None,
) -> Tensor:
    """Call the C++ function `attend`, which says what its arguments are.

    Args:
        compiled: from `library`.
        operands: q, k, v, checked.
        block: tokens a query block, tokens a key block.
        scale: factor on the scores; default 1 / sqrt(D).
        tokens: the query and the key at each position, or None.
        tables: order, offsets, starts, ends, log weights, octaves.
        pooled: mean keys a dropped block.
        bits: kept blocks; with `pooled`.
        copies: of row-shared heads, or None.
        copy_sizes: their rows and slots.
        padding: what a mask says of the keys at their positions, or None.
    """
    q, k, v = operands
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    out = empty_output(q)
    q, k, v = (_dense_channels(x) for x in (q, k, v))
    given = (None, None) if padding is None else (padding.bias, padding.bounds)
    compiled.attend(
        _sizes(q, k, block),
        _strides(q, k, v, out),
        *(_pointer(x) for x in (q, k, v, out)),
        ctypes.c_double(factor),
        *(_pointer(x) for x in tokens),
        *(_pointer(table) for table in tables),
        ctypes.c_int64(pooled),
        _pointer(bits),
        *(_pointer(table) for table in copies),
        *(ctypes.c_int64(size) for size in copy_sizes),
        *(_pointer(x) for x in given),
        ctypes.c_int64(0 if padding is None or len(padding.bias) == 1 else 1),
        ctypes.c_int(torch.get_num_threads()),
    )
    if padding is None or not padding.rows:
        return out
    if tokens[0] is not None:
        padding = padding.ordered(tokens[0].argsort())
    return padding.clear_rows(out)


def native_energy(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    block: tuple[int, int],
    scale: float,
    lse: Tensor | None,
) -> tuple[Tensor | None, Tensor]:
    """Return the attention output, if values are given, and the block energies, in one pass.

    Each row's probabilities are summed by key block as they appear, and the sums are made relative
    to the row's log-sum-exp when it is known.

    Args:
        q: (B, H, Sq, D) on the CPU.
        k: (B, H, Sk, D).
        v: (B, H, Sk, D) or None.
        block: tokens a query block, tokens a key block.
        scale: factor on the scores.
        lse: (B, H, Sq), natural log-sum-exp of the scaled scores, or None.

    Returns:
        (B, H, Sq, D) laid out as contiguous (B, Sq, H, D), or None; float32 (B, H, query_blocks,
        key_blocks).

    Raises:
        KernelError: there is no C++ compiler, or the operands don't fit one another.
    """
    _check_energy(q, k, v, block, lse)
    rows, columns = -(-q.shape[2] // block[0]), -(-k.shape[2] // block[1])
    energy = torch.empty(*q.shape[:2], rows, columns)
    out = None if v is None else empty_output(q)
    q, k = _dense_channels(q), _dense_channels(k)
    v = None if v is None else _dense_channels(v)
    if lse is not None:
        lse = lse.detach().to(torch.float64 if q.dtype == torch.float64 else torch.float32)
        lse = lse.contiguous()
    library(q.dtype, q.shape[-1]).attend_with_energy(
        _sizes(q, k, block),
        _strides(q, k, k if v is None else v, q if out is None else out),  # unused without values
        *(_pointer(x) for x in (q, k, v, out)),
        ctypes.c_double(scale),
        _pointer(lse),
        _pointer(energy),
        ctypes.c_int(torch.get_num_threads()),
    )
    return out, energy


@functools.cache
def library(dtype: torch.dtype, head_dim: int) -> Any:
    """Compile, or take from Inductor's cache, the functions for one dtype and head dim.

    Raises:
        KernelError: there is no C++ compiler, or it fails.
    """
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    if dtype not in _ELEMENTS:
        raise KernelError(
            "there is no CPU kernel for this dtype",
            expected=", ".join(str(known) for known in _ELEMENTS),
            got=dtype,
            remedy="cast the model, or use the option lowering='reference'",
        )
    element, value = _ELEMENTS[dtype]
    padded = -(-head_dim // PANEL_KEYS) * PANEL_KEYS
    names = {"ELEMENT": element, "VALUE": value, "HEAD_DIM": head_dim, "PADDED_DIM": padded}
    defines = "".join(f"#define {name} {content}\n" for name, content in names.items())
    source = Path(__file__).with_name("attention.cpp").read_text(encoding="utf-8")
    try:
        return CppCodeCache.load(defines + source)
    except (CppCompileError, InvalidCxxCompiler, OSError) as error:
        raise KernelError(
            "the CPU kernel can't be compiled",
            expected="a C++ compiler that Inductor can use, such as g++",
            got=str(error)[-2000:],
            remedy="install g++ (Inductor needs it on a CPU), or use the option "
            "lowering='reference'",
        ) from error


def _longest_first(pattern: BlockPattern) -> npt.NDArray[np.int32]:
    """Rows of blocks by falling work, so that no core is left with a long one at the end."""
    kept = pattern.numpy_mask().sum(-1)
    copies = copy_tables(pattern)
    lengths = np.full((pattern.heads, 1), pattern.query_length)
    if copies is not None:
        lengths[pattern.repetitive] = len(copies.computed)
    starts = np.arange(pattern.query_blocks) * pattern.block_m
    tokens = (lengths - starts).clip(0, pattern.block_m)
    return np.argsort(-(kept * tokens).ravel(), kind="stable").astype(np.int32)


def _check_tokens(name: str, tokens: Tensor, length: int) -> None:
    # C++ reads and writes where they say.
    fits = (
        isinstance(tokens, Tensor)
        and tokens.dtype == torch.int32
        and tuple(tokens.shape) == (length,)
        and tokens.device.type == "cpu"
        and tokens.is_contiguous()
    )
    if fits:
        least, most = (int(value) for value in tokens.aminmax())
        fits = least == 0 and most == length - 1
        fits = fits and int(torch.bincount(tokens, minlength=length).max()) == 1
    if not fits:
        raise KernelError(
            f"{name} is no order of the tokens",
            expected=f"contiguous int32 ({length},) on the CPU, each of 0 to {length - 1} once",
            got=f"{tokens.dtype} {tuple(tokens.shape)} on {tokens.device}, strides "
            f"{tokens.stride()}"
            if isinstance(tokens, Tensor)
            else type(tokens).__name__,
            remedy="pass the permutation of a TokenOrder as tokens.int().contiguous()",
        )


def _check_energy(
    q: Tensor, k: Tensor, v: Tensor | None, block: tuple[int, int], lse: Tensor | None
) -> None:
    rest = [k] if v is None else [k, v]
    shown = ", ".join(f"{x.dtype} {tuple(x.shape)} on {x.device}" for x in (q, *rest))
    if (
        q.dim() != 4
        or not q.numel()
        or not k.numel()
        or any(x.dim() != 4 or x.shape != k.shape for x in rest)
        or (*q.shape[:2], q.shape[3]) != (*k.shape[:2], k.shape[3])
        or any(x.dtype != q.dtype or x.device.type != "cpu" for x in (q, *rest))
    ):
        raise KernelError(
            "operands of the energies don't fit one another",
            expected="q (B, H, Sq, D), k and v (B, H, Sk, D) of one dtype on the CPU, not empty",
            got=shown,
            remedy="pass q, k and v of one attention call",
        )
    if len(block) != 2 or min(block) < 1 or block[1] % PANEL_KEYS:
        raise KernelError(
            "the block size of the energies is out of range",
            expected=f"tokens a query block, and a multiple of {PANEL_KEYS} tokens a key block",
            got=block,
            remedy="use blocks of 32, 64 or 128 tokens",
        )
    if lse is not None and (lse.shape != q.shape[:3] or lse.device.type != "cpu"):
        raise KernelError(
            "the log-sum-exp doesn't fit the queries",
            expected=f"{tuple(q.shape[:3])} on the CPU",
            got=f"{tuple(lse.shape)} on {lse.device}",
            remedy="pass the natural log-sum-exp of the scaled scores, one a query token",
        )


def _dense_channels(x: Tensor) -> Tensor:
    x = x.detach()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _sizes(q: Tensor, k: Tensor, block: tuple[int, int]) -> Any:
    values = (*q.shape[:2], q.shape[2], k.shape[2], *block)
    return (ctypes.c_int64 * len(values))(*values)


def _strides(*operands: Tensor) -> Any:
    values = [stride for x in operands for stride in x.stride()[:3]]
    return (ctypes.c_int64 * len(values))(*values)


def _pointer(x: Tensor | npt.NDArray[Any] | None) -> ctypes.c_void_p:
    if x is None:
        return ctypes.c_void_p(None)
    return ctypes.c_void_p(x.data_ptr() if isinstance(x, Tensor) else x.ctypes.data)
