"""Run the energy kernels under Triton's interpreter; started by test_triton_energy.py.

A process of its own: the interpreter is chosen when kernels are defined, for the whole process.
Prints one JSON line a case: its name and the largest errors of energies and output.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch
from torch import Tensor

from calibatt_compiler.kernels.portable import energy_fused as fused
from calibatt_compiler.kernels.portable.energy_fused import triton_attention_and_energy
from calibatt_compiler.kernels.portable.energy_scores import triton_energy
from calibatt_compiler.kernels.portable.tiles import TileSettings
from calibatt_compiler.kernels.reference.energy import reference_energy

SCALE = 0.2
WIDE = TileSettings(64, 16, 4, 2)
"""Tiles of several query blocks, and key blocks of several tiles."""

Case = tuple[str, int, int, int, tuple[int, int], float, TileSettings | None]


def cases() -> Iterator[Case]:
    """Name, queries, keys, head dim, block, scale, tiles."""
    yield "whole blocks", 128, 64, 64, (64, 64), SCALE, None
    yield "ragged, blocks of no power of two", 67, 83, 64, (32, 48), SCALE, None
    yield "several query blocks a tile", 150, 83, 64, (32, 48), SCALE, WIDE
    yield "blocks of 48 queries", 101, 50, 64, (48, 32), SCALE, WIDE
    yield "query blocks below 16", 23, 40, 64, (4, 32), SCALE, WIDE
    yield "one tile past the last whole one", 40, 33, 128, (16, 128), SCALE, None
    yield "head dim padded", 20, 40, 40, (16, 32), SCALE, None
    yield "no aligned rows", 20, 40, 21, (16, 32), SCALE, None
    yield "negative scale", 35, 40, 64, (16, 32), -SCALE, None
    yield "scale zero", 35, 40, 64, (16, 32), 0.0, None
    yield "more key blocks than are read at once", 20, 18 * 16 + 3, 64, (16, 16), SCALE, WIDE


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in float64."""
    scores = q.double() @ k.double().mT * scale
    return scores.softmax(-1) @ v.double(), scores.logsumexp(-1)


def tell(name: str, energy: float, output: float) -> None:
    print(json.dumps({"case": name, "energy": energy, "output": output}), flush=True)


def largest(a: Tensor, b: Tensor) -> float:
    """Largest difference; infinite where one is not a number."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return (a.double() - b.double()).abs().nan_to_num(torch.inf).max().item()


def main() -> None:
    torch.manual_seed(0)
    for name, length_q, length_k, head_dim, block, scale, settings in cases():
        q, k, v = (
            torch.randn(2, length, 2, head_dim).transpose(1, 2)
            for length in (length_q, length_k, length_k)
        )
        exact = reference_energy(q, k, block=block, scale=scale)
        expected, lse = dense(q, k, v, scale)
        errors = [
            largest(triton_energy(q, k, block, scale, given, settings=settings), exact)
            for given in (None, lse)
        ]
        out, energy = triton_attention_and_energy(q, k, v, block, scale, settings=settings)
        assert out.transpose(1, 2).is_contiguous()
        tell(name, max(*errors, largest(energy, exact)), largest(out, expected))

    # The same bits however many launches it takes.
    q, k, v = (torch.randn(2, 100, 2, 64).transpose(1, 2) for _ in range(3))
    once = triton_attention_and_energy(q, k, v, (32, 32), SCALE)
    budget, fused.SCRATCH_BYTES = fused.SCRATCH_BYTES, 3 * 4 * 32 * 4 * 4
    several = triton_attention_and_energy(q, k, v, (32, 32), SCALE)
    fused.SCRATCH_BYTES = 1
    single = triton_attention_and_energy(q, k, v, (32, 32), SCALE)
    fused.SCRATCH_BYTES = budget
    for other in (several, single):
        assert all(torch.equal(a, b) for a, b in zip(once, other, strict=True))

    # Every fourth query, by stride and in place.
    sampled = triton_energy(q[:, :, ::4], k, (8, 32), SCALE, dense(q, k, v, SCALE)[1][:, :, ::4])
    tell("strided queries", largest(sampled, reference_energy(
        q[:, :, ::4], k, block=(8, 32), scale=SCALE)), 0.0)  # fmt: skip

    # A row maximum that rises by hundreds from block to block, and falls: nothing may overflow.
    steep = k * torch.linspace(0, 60, 100)[:, None]
    for name, keys in (("rising scores", steep), ("falling scores", steep.flip(2))):
        exact = reference_energy(q, keys, block=(32, 32), scale=SCALE)
        out, energy = triton_attention_and_energy(q, keys, v, (32, 32), SCALE)
        # Such scores are of the order of 100; their rounding is that much larger.
        error = largest(energy, exact) / 100
        tell(name, error, largest(out, dense(q, keys, v, SCALE)[0]) / 100)

    # Scores of -inf in the first block, as a mask would give them, and NaN where there is one.
    q, k, v = (torch.ones(1, 1, n, 64) for n in (32, 128, 128))
    k[:, :, :32, 0] = -float("inf")
    out, energy = triton_attention_and_energy(q, k, v, (32, 32), SCALE)
    tell("a block of -inf", largest(energy[0, 0, 0], torch.tensor([0.0, *[1 / 3] * 3])),
         largest(out, torch.ones_like(out)))  # fmt: skip
    k[:, :, 5, 0] = float("nan")
    out, energy = triton_attention_and_energy(q, k, v, (32, 32), SCALE)
    assert out.isnan().all()
    assert energy.isnan().any()
    assert triton_energy(q, k, (32, 32), SCALE, None).isnan().any()


if __name__ == "__main__":
    main()
