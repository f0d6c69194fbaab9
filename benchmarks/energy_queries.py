"""What energies of a share of the queries do to the masks that calibration takes from them.

    python benchmarks/energy_queries.py --out results         seconds on a CPU

Queries and keys are random, with the structure of a video model's: each head looks near in space
and time, along the frames, at some columns, or anywhere. For each share: the mask that covers
`threshold` of each row's energy, against the mask from all queries. Columns: density; blocks that
only one of the two masks keeps, over the blocks of both; mass that the mask really keeps, on
average and in the worst row. Writes OUT/energy_queries.json.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from record import write_record
from torch import Tensor

from calibatt_compiler.calibration.select.selection import covering_mask
from calibatt_compiler.kernels.energy import block_energy

SHARES = (2, 4, 8, 16)
THRESHOLDS = (0.95, 0.84, 0.65)
REACHES = ((0.5, 4.0, 4.0), (4.0, 1.0, 1.0), (1.5, 2.0, 8.0), (0.3, 0.3, 0.3))
"""Sharpness of a head's view along time, height and width, in waves a grid; the last sees all."""


def positions(grid: tuple[int, int, int]) -> Tensor:
    """Time, height and width of each token, from 0 to 1, (S, 3), row after row."""
    axes = [torch.linspace(0, 1, size) for size in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)


def operands(grid: tuple[int, int, int], head_dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """q and k (1, heads, S, D): random features of the position, shared by both, and noise."""
    generator = torch.Generator().manual_seed(seed)
    place = positions(grid)
    queries, keys = [], []
    for reach in REACHES:
        waves = torch.randn(3, head_dim // 2, generator=generator) * torch.tensor(reach)[:, None]
        angle = 2 * math.pi * place @ waves
        feature = torch.cat([angle.cos(), angle.sin()], -1) * 2.0
        noise = torch.randn(2, *feature.shape, generator=generator)
        queries.append(feature + 0.7 * noise[0])
        keys.append(feature + 0.7 * noise[1])
    return torch.stack(queries)[None], torch.stack(keys)[None]


def effect(full: Tensor, energy: Tensor, threshold: float) -> dict[str, float]:
    """Compare the mask from `energy` with that from `full`, the energies of all queries."""
    exact, _ = covering_mask(full, threshold)
    mask, _ = covering_mask(energy, threshold)
    kept = (full * mask).sum(-1)
    return {
        "density": mask.float().mean().item(),
        "other": (mask ^ exact).sum().item() / (mask | exact).sum().item(),
        "mass": kept.mean().item(),
        "least_mass": kept.min().item(),
    }


def main() -> None:
    """Print a table for each threshold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--grid", nargs=3, type=int, default=(9, 20, 26))
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    block = (options.block, options.block)
    shares = (1, *(n for n in SHARES if options.block % n == 0))
    pairs = [operands(tuple(options.grid), 64, seed) for seed in range(options.seeds)]
    found = {
        n: torch.cat([block_energy(q, k, block=block, queries=1 / n) for q, k in pairs])
        for n in shares
    }
    print(f"{math.prod(options.grid)} tokens, {len(REACHES)} heads, {options.seeds} seeds")
    rows: list[dict[str, Any]] = []
    for threshold in THRESHOLDS:
        print(f"\nthreshold {threshold}\nqueries  density    other     mass  least mass")
        for n, energy in found.items():
            row = effect(found[1], energy, threshold)
            rows.append({"threshold": threshold, "queries": f"1/{n}", **row})
            print(f"1/{n:<5d} {row['density']:9.4f}{row['other']:9.4f}{row['mass']:9.4f}"
                  f"{row['least_mass']:12.4f}")  # fmt: skip
    if options.out is not None:
        path = options.out / "energy_queries.json"
        settings = {"grid": options.grid, "block": options.block, "seeds": options.seeds}
        write_record(path, torch.device("cpu"), rows, **settings)


if __name__ == "__main__":
    main()
