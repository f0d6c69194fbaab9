"""Patterns of zones that kernel tests share, each with what is special about it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from calibatt_compiler.plan.zones import ZonePattern

CASES: dict[str, dict[str, Any]] = {
    # heads, tokens, block, rows a group, diagonal heads, text
    "plain": {"queries": 384, "keys": 1024},
    "ragged": {"queries": 333, "keys": 1111, "heads": 3},
    "narrow blocks": {"queries": 300, "keys": 801, "block_n": 64},
    "diagonal": {"queries": 1000, "keys": 1000, "diagonal": True, "group": 4},
    "text last": {"queries": 900, "keys": 900, "text": "last", "video": 700},
    "text first": {"queries": 930, "keys": 930, "text": "first", "video": 700, "diagonal": True},
    "text alone": {"queries": 200, "keys": 210, "text": "last", "video": 60},
    "one block": {"queries": 100, "keys": 90},
    "one column": {"queries": 400, "keys": 128},
    "octave 7": {"queries": 400, "keys": 140 * 64, "block_n": 64, "octaves": (7, 8), "heads": 1},
    "lead last": {"queries": 300, "keys": 1000, "lead": -1},
}


def zone_pattern(
    name: str, *, block_m: int = 128, block: tuple[int, int] | None = None, seed: int = 5
) -> ZonePattern:
    """The pattern of a case; with `block`, the same blocks of other sizes."""
    case = CASES[name]
    block_n = case.get("block_n", 128)
    heads, group = case.get("heads", 2), case.get("group", 2)
    queries, keys, video = case["queries"], case["keys"], case.get("video", 0)
    if block is not None:
        queries, keys, video = (
            -(-length * to // size)
            for length, to, size in ((queries, block[0], block_m), (keys, block[1], block_n),
                                     (video, block[1], block_n))
        )  # fmt: skip
        if video:  # one sequence
            queries = keys = max(queries, keys)
        block_m, block_n = block
    rows, columns = -(-queries // block_m), -(-keys // block_n)
    text = case.get("text")
    top = left = 0
    bottom, right = rows, columns
    if text == "first":
        top, left = -(-(queries - video) // block_m), -(-(keys - video) // block_n)
    elif text == "last":
        bottom, right = video // block_m, video // block_n
    generator = np.random.default_rng(len(name))
    octaves = np.zeros((heads, rows, columns), np.int64)
    low, high = case.get("octaves", (0, 8))
    inner_rows, inner_columns = max(bottom - top, 0), max(right - left, 0)
    for head in range(heads if inner_rows and inner_columns else 0):
        for first in range(0, inner_rows, group):
            last = min(first + group, inner_rows)
            line = np.repeat(generator.integers(low, high, inner_rows + inner_columns),
                             generator.integers(1, 6))  # fmt: skip
            slides = case.get("diagonal", False) and head == 0 and last - first <= inner_columns
            lead = int(generator.integers(last - first - 1, inner_columns)) if slides else (
                case.get("lead", int(generator.integers(0, inner_columns))) % inner_columns
            )  # fmt: skip
            for row in range(first, last):
                back = last - 1 - row if slides else 0
                octaves[head, top + row, left:right] = line[back : back + inner_columns]
                octaves[head, top + row, left + lead - back] = 0
    return ZonePattern.from_octaves(
        torch.from_numpy(octaves), query_length=queries, key_length=keys,
        block=(block_m, block_n), video=video, text=text, seed=seed,
    )  # fmt: skip


def many_runs(runs: int, *, heads: int = 8, blocks: int = 512) -> ZonePattern:
    """Zones of so many runs, each head one group."""
    each = runs // heads
    cuts = np.tile(np.arange(1, each, dtype=np.int32), heads) + np.repeat(
        np.arange(heads, dtype=np.int32), each - 1
    )
    octaves = np.tile(np.arange(each, dtype=np.uint8) % 8, heads)
    none = np.zeros(heads, np.uint8)
    return ZonePattern(
        heads, blocks * 128, blocks * 128, 128, 128, np.full(heads, blocks, np.int32), none,
        none.astype(np.int32), np.full(heads, each, np.int32), cuts, octaves,
    )  # fmt: skip
