"""Run the portable kernels under Triton's interpreter; started by test_triton_interpreted.py.

A process of its own: the interpreter is chosen when kernels are defined, for the whole process.
Prints one JSON line a case: its name and the largest error against the reference.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.baked.attention import baked_attention
from calibatt_compiler.kernels.baked.cover import CoverLimits
from calibatt_compiler.kernels.portable.attention import TableAttention
from calibatt_compiler.kernels.reference.attention import ReferenceAttention
from calibatt_compiler.kernels.request import KernelRequest
from calibatt_compiler.plan.copies import AnchorRows
from calibatt_compiler.plan.order import TokenOrder
from calibatt_compiler.plan.pattern import BlockPattern

CPU = torch.device("cpu")
Case = tuple[str, BlockPattern, int, int, float | None, float]


REPETITIVE = [
    # copies, tokens, head dim, weighted, pooled
    (AnchorRows((2, 9, 8), 3), 144, 64, False, 0),
    (AnchorRows((3, 7, 5), 2, first=20), 130, 64, False, 0),
    (AnchorRows((3, 7, 5), 7, first=20), 130, 64, False, 0),
    (AnchorRows((1, 12, 12), 5, order=TokenOrder((1, 4, 4))), 150, 21, False, 0),
    (AnchorRows((2, 10, 6), 1, first=3, order=TokenOrder((2, 4, 4))), 125, 40, True, 2),
]


def random_mask(heads: int, rows: int, columns: int, density: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(heads, rows, columns, generator=generator)
    return (draw < density).scatter_(2, draw.argmin(-1, keepdim=True), True)


def pattern(
    mask: torch.Tensor, query_length: int, key_length: int, block: tuple[int, int]
) -> BlockPattern:
    return BlockPattern.from_mask(
        mask, query_length=query_length, key_length=key_length, block=block
    )


def cases() -> Iterator[Case]:
    """Name, pattern, batch, head dim, scale, size of the scores."""
    square = pattern(random_mask(2, 5, 5, 0.4, 0), 150, 150, (32, 32))
    yield "odd lengths", square, 1, 64, None, 1.0
    small = pattern(random_mask(2, 3, 3, 0.6, 0), 90, 90, (32, 32))
    yield "head dim 128", small, 1, 128, None, 1.0
    yield "batch, head dim not a power of two", small, 2, 40, None, 1.0
    yield "head dim without aligned rows", small, 1, 21, None, 1.0
    yield "negative scale", small, 1, 64, -0.3, 1.0
    yield "scale zero", small, 1, 64, 0.0, 1.0
    yield "scores far apart", square, 1, 64, None, 30.0
    tall = pattern(random_mask(3, 7, 2, 0.5, 1), 7 * 32 - 31, 100, (32, 64))
    yield "rectangular, one query in the last block", tall, 1, 64, None, 1.0
    wide = pattern(random_mask(1, 2, 9, 0.3, 2), 128 + 1, 9 * 32 - 31, (128, 32))
    yield "rectangular, one key in the last block", wide, 1, 64, None, 1.0
    yield "short", pattern(torch.ones(2, 1, 1).bool(), 3, 5, (64, 64)), 1, 64, None, 1.0
    last = torch.zeros(1, 3, 3, dtype=torch.bool)
    last[:, :, 2] = True
    yield "ragged block alone", pattern(last, 3 * 64, 2 * 64 + 7, (64, 64)), 1, 64, None, 1.0
    tiles = pattern(last, 3 * 128, 2 * 128 + 70, (128, 128))
    yield "ragged block of one whole and one ragged tile", tiles, 1, 64, None, 1.0
    whole = pattern(last, 3 * 128, 2 * 128 + 64, (128, 128))
    yield "ragged block of one whole tile", whole, 1, 64, None, 1.0
    odd = pattern(random_mask(2, 4, 4, 0.5, 3), 190, 180, (48, 48))
    yield "blocks of 48", odd, 1, 64, None, 1.0
    row, column = np.indices((9, 9))
    bands = np.stack([abs(column - row - shift) <= 1 for shift in (0, 1, 2)])
    bands |= abs(column - row + 5) <= 0
    bands[:, :, 0] = bands[:, 8] = True
    bands[2, 4:6] = column[4:6] == 4
    yield "bands", pattern(torch.from_numpy(bands), 280, 280, (32, 32)), 1, 64, None, 1.0


def report(case: str, error: float, allowed: float) -> None:
    """Say how far a kernel is off; what is allowed, the test that started this process checks."""
    print(json.dumps({"case": case, "error": error, "allowed": allowed}))


def overflows() -> None:
    """Spikes in every block of a row: repaired where they overflow its reference, and only there.

    Table and baked kernel agree, and a repaired call has the bits of the running maximum.
    """
    row, column = np.indices((5, 5))
    mask = torch.from_numpy(np.stack([row >= 0, (row + column) % 2 == 0, row == column + 1]))
    mask[2, 0, 3] = True
    made = pattern(mask, 150, 140, (32, 32))
    where: dict[str, Any] = {"device": CPU, "dtype": torch.float32, "head_dim": 32}
    table = TableAttention(KernelRequest(made, **where, softmax="fixed"))
    baked = baked_attention(KernelRequest(made, **where, softmax="fixed"))
    exact = TableAttention(KernelRequest(made, **where, softmax="exact"))
    assert baked.kind == "triton-baked", baked.reason
    generator = torch.Generator().manual_seed(0)
    calm = [torch.randn(1, 3, n, 32, generator=generator) for n in (150, 140, 140)]
    worst, repairs, calls = 0.0, 0, 0
    for head, query, key, nats in [
        *((0, query, key, 200.0) for query in (3, 149) for key in (5, 100, 139)),
        *((1, 40, key, 200.0) for key in (0, 35, 101)),
        *((2, query, 100, 200.0) for query in (5, 140)),
        (0, 3, 100, 60.0),  # within the range of the reference
        (0, 3, 100, 95.0),  # above it
        (0, 3, 100, -500.0),
        (0, 3, 5, -500.0),  # its own reference far below the rest
    ]:
        q, k, v = (x.clone() for x in calm)
        length = math.sqrt(abs(nats) * math.sqrt(32))
        q[0, head, query], k[0, head, :, 0] = 0, 0
        q[0, head, query, 0], k[0, head, key, 0] = math.copysign(length, nats), length
        out = table(q, k, v)
        assert torch.equal(out, baked(q, k, v))
        attended = bool(mask[head, query // 32, key // 32])
        kept = mask[head, query // 32].nonzero()[:, 0].tolist()
        block = next((at for at in kept if at >= query // 32), kept[-1])
        # The reference is of the block's first tile; here a block is one tile.
        repaired = attended and nats > 90 and key // 32 != block
        repairs, calls = repairs + repaired, calls + 1
        assert table.repairs == baked.repairs == repairs, (head, query, key, nats)
        if repaired:
            assert torch.equal(out, exact(q, k, v))
        worst = max(worst, (out - ReferenceAttention(made)(q, k, v)).abs().max().item())
    assert 0 < repairs < calls
    report("spikes", worst, 5e-6)
    # Probabilities of 2^86 times values of 2^80: only the output overflows.
    q, k, v = (x.clone() for x in calm)
    length = math.sqrt(60 * math.sqrt(32))
    q[0, 0, 3], k[0, 0, :, 0] = 0, 0
    q[0, 0, 3, 0], k[0, 0, 100, 0] = length, length
    v *= 2.0**80
    out = table(q, k, v)
    assert table.repairs == repairs + 1
    error = (out - ReferenceAttention(made)(q, k, v)).abs().max().item() / 2.0**80
    report("large values", error, 5e-6)


def which_softmax() -> None:
    """By dtype and option."""
    mask = random_mask(2, 5, 5, 0.4, 0)
    plain = pattern(mask, 150, 150, (32, 32))
    for dtype, softmax, expected in [
        (torch.bfloat16, "auto", "fixed"),
        (torch.bfloat16, "exact", "exact"),
        (torch.float16, "auto", "exact"),
        (torch.float32, "auto", "exact"),
    ]:
        where: dict[str, Any] = {"device": CPU, "dtype": dtype, "head_dim": 64, "softmax": softmax}
        assert TableAttention(KernelRequest(plain, **where)).config.softmax == expected
    with pytest.raises(KernelError, match="fixed softmax shift"):
        TableAttention(
            KernelRequest(plain, device=CPU, dtype=torch.float16, head_dim=64, softmax="fixed")
        )


def main() -> None:
    for name, made, batch, head_dim, scale, size in cases():
        generator = torch.Generator().manual_seed(0)
        q, k, v = (
            torch.randn(batch, length, made.heads, head_dim, generator=generator).transpose(1, 2)
            for length in (made.query_length, made.key_length, made.key_length)
        )
        q = q * size
        k = k.contiguous()
        where: dict[str, Any] = {"device": CPU, "dtype": torch.float32, "head_dim": head_dim}
        expected = ReferenceAttention(made)(q, k, v, scale=scale)
        for softmax in ("exact", "fixed"):
            where["softmax"] = softmax
            table = TableAttention(KernelRequest(made, **where))
            baked = baked_attention(KernelRequest(made, **where))
            assert baked.kind == "triton-baked", baked.reason
            first, second = (kernel(q, k, v, scale=scale) for kernel in (table, baked))
            assert torch.equal(first, second), name
            assert first.transpose(1, 2).is_contiguous()
            if size == 1:
                assert table.repairs == baked.repairs == 0, name
            error = (first - expected).abs().max().item()
            # Numpy's exp2 turns to subnormals where torch does not: looser where scores are far
            # apart.
            allowed = 2e-5 if size > 1 else 5e-6
            report(f"{name}, {softmax}", error, allowed)
        # By descriptors, with the keys past the end that they read as zero.
        tiles = replace(table.config.settings, descriptors=True)
        by_tma = TableAttention(KernelRequest(made, **where), settings=tiles)
        assert by_tma.config.descriptors == (head_dim % 4 == 0)
        assert torch.equal(by_tma(q, k, v, scale=scale), first), name

    overflows()
    which_softmax()

    # Operands that the kernel can't read as they are: no unit stride, misaligned.
    made = next(cases())[1]
    storage = torch.randn(3 * 2 * 150 * 64 * 2 + 1)
    q, k, v = storage[1:].view(3, 1, 2, 150, 128).unbind(0)
    strided = [x[..., ::2] for x in (q, k, v)]
    kernel = TableAttention(KernelRequest(made, device=CPU, dtype=torch.float32, head_dim=64))
    error = (kernel(*strided) - ReferenceAttention(made)(*strided)).abs().max().item()
    report("strides", error, 5e-6)
    # One head's keys for all: TMA can't read them as they are.
    q, k, v = torch.randn(3, 1, 2, 150, 64)
    k = k[:, :1].expand(1, 2, 150, 64)
    tiles = replace(kernel.config.settings, descriptors=True)
    by_tma = TableAttention(
        KernelRequest(made, device=CPU, dtype=torch.float32, head_dim=64), settings=tiles
    )
    assert torch.equal(by_tma(q, k, v), kernel(q, k, v))

    # A mask beyond the budget: the table serves.
    made = pattern(random_mask(2, 8, 8, 0.4, 5), 250, 250, (32, 32))
    where = {"device": CPU, "dtype": torch.float32, "head_dim": 64}
    declined = baked_attention(KernelRequest(made, **where), limits=CoverLimits(24))
    assert declined.kind == "triton-table"
    assert declined.density == made.density
    assert declined.reason is not None
    assert "24 literals" in declined.reason

    # Weights and pooled keys: every kept block its own weight, the ragged last block among them.
    for length, block, pooled in ((250, 32, 0), (190, 48, 4), (2 * 128 + 70, 128, 1)):
        blocks = -(-length // block)
        mask = random_mask(3, blocks, blocks, 0.6, length)
        draw = torch.rand(3, blocks, blocks, generator=torch.Generator().manual_seed(0))
        made = BlockPattern.from_mask(
            mask, query_length=length, key_length=length, block=(block,) * 2,
            weight=1 + 30 * draw if pooled != 1 else None, pooled=pooled,
        )  # fmt: skip
        q, k, v = (torch.randn(2, length, 3, 64).transpose(1, 2) for _ in range(3))
        table = TableAttention(KernelRequest(made, device=CPU, dtype=torch.float32, head_dim=64))
        error = (table(q, k, v) - ReferenceAttention(made)(q, k, v)).abs().max().item()
        name = f"weights, {length} keys, {pooled} pooled"
        report(name, error, 5e-6)
        fixed = TableAttention(
            KernelRequest(made, device=CPU, dtype=torch.float32, head_dim=64, softmax="fixed")
        )
        error = (fixed(q, k, v) - ReferenceAttention(made)(q, k, v)).abs().max().item()
        report(f"{name}, fixed", error, 5e-6)
        assert fixed.repairs == 0
        q[0, 0, 0], k[0, 0, :, 0] = 0, 0
        q[0, 0, 0, 0] = k[0, 0, -1, 0] = math.sqrt(200 * 8)
        error = (fixed(q, k, v) - ReferenceAttention(made)(q, k, v)).abs().max().item()
        report(f"{name}, spike", error, 5e-6)

    # Row-shared heads: grids that blocks don't divide, text on either side, tiles, odd head dims.
    for copies, length, head_dim, weighted, pooled in REPETITIVE:
        blocks = -(-length // 32)
        draw = torch.rand(4, blocks, blocks, generator=torch.Generator().manual_seed(0))
        made = BlockPattern.from_mask(
            random_mask(4, blocks, blocks, 0.4, length), query_length=length, key_length=length,
            block=(32, 32), weight=1 + 30 * draw if weighted else None, pooled=pooled,
            repetitive=np.array([True, False, True, True]), copies=copies,
        )  # fmt: skip
        q, k, v = (torch.randn(2, length, 4, head_dim).transpose(1, 2) for _ in range(3))
        where = {"device": CPU, "dtype": torch.float32, "head_dim": head_dim}
        where["softmax"] = "fixed"
        table = TableAttention(KernelRequest(made, **where))
        kernels = [table] if weighted else [baked_attention(table.request), table]
        assert kernels[0].kind == ("triton-table" if weighted else "triton-baked")
        out = kernels[0](q, k, v)
        assert torch.equal(out, table(q, k, v))
        error = (out - ReferenceAttention(made)(q, k, v)).abs().max().item()
        report(f"repetitive, {copies}", error, 5e-6)
        # What is copied is not read.
        rest = torch.ones(length, dtype=torch.bool)
        rest[copies.computed(length).tolist()] = False
        q[:, [0, 2, 3]] = q[:, [0, 2, 3]].masked_fill(rest[:, None], torch.nan)
        assert torch.equal(kernels[0](q, k, v), out)
        assert kernels[0].repairs == 0

    # Inf and NaN: a query that sees nothing but -inf scores at first is still right.
    made = pattern(torch.ones(1, 1, 4).bool(), 32, 128, (32, 32))
    for softmax in ("exact", "fixed"):
        q, k, v = (torch.ones(1, 1, n, 64) for n in (32, 128, 128))
        k[:, :, :32, 0] = -float("inf")
        where = {"device": CPU, "dtype": torch.float32, "head_dim": 64, "softmax": softmax}
        kernel = TableAttention(KernelRequest(made, **where))
        error = (kernel(q, k, v) - 1).abs().max().item()
        report(f"a block of -inf scores, {softmax}", error, 1e-6)
        assert kernel.repairs == (softmax == "fixed")
        k[:, :, 5, 0] = float("nan")
        assert kernel(q, k, v).isnan().all()
        k[:, :, 5, 0], k[:, :, 90, 0] = 1.0, float("inf")
        assert kernel(q, k, v).isnan().all()
        k[:, :, 90, 0], v[:, :, 90, 3] = 1.0, float("inf")
        out = kernel(q, k, v)
        assert (out[..., 3] == float("inf")).all()
        assert out[..., :3].isfinite().all()


if __name__ == "__main__":
    sys.exit(main())
