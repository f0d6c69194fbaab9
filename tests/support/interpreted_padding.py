"""Run the portable kernels with masks over keys under Triton's interpreter.

A process of its own, as `interpreted.py` is. Prints one JSON line a case: its name, the largest
error against the reference, and what that may be.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from zone_patterns import zone_pattern

from calibatt_compiler.kernels.common.padding import KeyPadding
from calibatt_compiler.kernels.portable.attention import TableAttention
from calibatt_compiler.kernels.portable.zones import ZoneAttention
from calibatt_compiler.kernels.reference.attention import ReferenceAttention
from calibatt_compiler.kernels.reference.zones import ReferenceZones
from calibatt_compiler.kernels.request import KernelRequest
from calibatt_compiler.plan.copies import AnchorRows
from calibatt_compiler.plan.pattern import BlockPattern

CPU = torch.device("cpu")
LENGTH = 100


def masks(length: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Key masks of two samples."""

    def cut(*spans: tuple[int, int]) -> torch.Tensor:
        mask = torch.ones(len(spans), length, dtype=torch.bool)
        for row, (first, last) in zip(mask, spans, strict=True):
            row[first:last] = False
        return mask

    yield "tails", cut((length - 1, length), (77, length))
    yield "one key", cut((1, length), (length, length))
    yield "first keys", cut((0, 40), (0, 32))
    yield "in the midst", cut((5, 64), (17, length - 20))
    yield "none", cut((0, 0), (0, 0))
    yield "one for all", cut((90, length))
    generator = torch.Generator().manual_seed(3)
    yield "scattered", torch.rand(2, length, generator=generator) < 0.6
    yield "added", torch.where(cut((3, 50), (70, length)), 0.0, -0.7)


def patterns() -> Iterator[tuple[str, BlockPattern]]:
    """Masks of blocks: of one and of several tiles a block, weighted, with row-shared heads."""
    generator = torch.Generator().manual_seed(0)
    for block in ((32, 32), (128, 128)):
        count = [-(-LENGTH // size) for size in block]
        draw = torch.rand(2, *count, generator=generator)
        mask = (draw < 0.6).scatter_(2, draw.argmin(-1, keepdim=True), True)
        weight = 1 + 3 * torch.rand(mask.shape, generator=generator)
        sizes: dict[str, Any] = {
            "query_length": LENGTH, "key_length": LENGTH, "block": block
        }  # fmt: skip
        yield f"blocks of {block[0]}", BlockPattern.from_mask(mask, **sizes)
        yield f"weighted, {block[0]}", BlockPattern.from_mask(mask, weight=weight, **sizes)
    copies = AnchorRows((1, 12, 8), 3)
    shared = np.array([True, False])
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    sizes["block"] = (32, 32)
    yield "row-shared", BlockPattern.from_mask(mask, repetitive=shared, copies=copies, **sizes)


def compare(
    name: str, pattern: Any, made: Any, exact: Any, masked: list[tuple[str, torch.Tensor]]
) -> None:
    """Call a kernel and the reference with each mask; a hole is not the overflow of a shift."""
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, length, pattern.heads, 40).transpose(1, 2)
        for length in (pattern.query_length, pattern.key_length, pattern.key_length)
    )
    for kind, mask in masked:
        repaired = made.repairs
        padding = KeyPadding.of(mask, rows=kind in ("tails", "in the midst"))
        want = exact(q.double(), k.double(), v.double(), padding=padding)
        error = (made(q, k, v, padding=padding) - want).abs().nan_to_num(torch.inf).max().item()
        case = f"{name}, {kind}"
        print(json.dumps({"case": case, "error": error, "repairs": made.repairs - repaired}))


def main() -> None:
    where: dict[str, Any] = {"device": CPU, "dtype": torch.float32, "head_dim": 40}
    for number, (name, pattern) in enumerate(patterns()):
        few = list(masks(LENGTH))[number :: 3 if number else 1]
        for softmax in ("exact", "fixed") if number == 0 else ("fixed",):
            made = TableAttention(KernelRequest(pattern, **where, softmax=softmax))
            compare(f"{name}, {softmax}", pattern, made, ReferenceAttention(pattern), few)
    for number, case in enumerate(("text last", "text first")):
        zones = zone_pattern(case, block=(32, 32))
        few = list(masks(zones.key_length))[number::3]
        softmax = ("exact", "fixed")[number]
        made = ZoneAttention(KernelRequest(zones, **where, softmax=softmax)).at(5)
        compare(f"zones, {case}, {softmax}", zones, made, ReferenceZones(zones).at(5), few)


if __name__ == "__main__":
    main()
