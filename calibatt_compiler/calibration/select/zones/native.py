"""The search for runs in C++, where there is a compiler: the same results, sooner.

It leaves Python alone while it runs, so threads that fit one site each do not wait for one another.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from calibatt_compiler.logs import logger

log = logger("calibration")

FROM_BLOCKS = 1 << 20
"""Blocks of a site over all heads from which on it is worth the seconds of compiling."""

Arrays = tuple[npt.NDArray[Any], ...]


def pays(blocks: int) -> bool:
    """Whether sites of so many blocks are fitted in C++."""
    return blocks >= FROM_BLOCKS and library() is not None


@cache
def library() -> Any | None:
    """The compiled library, made once a machine; None without a compiler that makes it."""
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    source = Path(__file__).with_name("lines.cpp").read_text(encoding="utf-8")
    try:
        return CppCodeCache.load(source)
    except (CppCompileError, InvalidCxxCompiler, OSError) as error:
        log.warning("zones are fitted by numpy, slowly, for C++ can't be compiled: %s", error)
        return None


def solve(
    squares: npt.NDArray[np.float64],
    blocks: npt.NDArray[np.float64],
    leads: npt.NDArray[np.int64],
    price: float,
    number: float,
) -> Arrays:
    """Find octaves, variance, kept blocks and runs; see `lines.solve`."""
    compiled = library()
    assert compiled is not None
    lines, places = squares.shape
    groups, width = blocks.shape
    given = [np.ascontiguousarray(array) for array in (squares, blocks, leads)]
    found: Arrays = (
        np.empty((lines, places), np.uint8),
        *(np.empty(lines, dtype) for dtype in (np.float64, np.float64, np.int64)),
    )
    compiled.solve(
        *(ctypes.c_void_p(array.ctypes.data) for array in given),
        *map(ctypes.c_int64, (lines, places, groups, width)),
        *map(ctypes.c_double, (price, number)),
        *(ctypes.c_void_p(array.ctypes.data) for array in found),
    )
    return found
