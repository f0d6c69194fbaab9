"""Which heads of a video model are row-shared, and what copying their rows costs.

    python benchmarks/repetition.py --out results         the demo's model, two minutes on a CPU
    python benchmarks/repetition.py --check               a tiny video: shows that it runs

Generates one video densely and scores every head at every step, which calibration does too. Prints
how alike rows attend; for several gamma the share of heads that are alike, of these the heads whose
copied rows have no larger output error than their blocks, those that cost less so, and both, which
is what calibration takes; density with them and without; what a few frames instead of all change in
the similarity; how well the error of one mask predicts that of another; and the time it takes.
Writes what each gamma gives to OUT/repetition.json.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from record import write_record
from torch import Tensor

from calibatt_compiler.calibration import CalibrationConfig
from calibatt_compiler.calibration.observe.observation import InputObservation
from calibatt_compiler.calibration.observe.observer import EnergyObserver, ObservedModel
from calibatt_compiler.calibration.observe.pipelines import ObservedPipeline, generate
from calibatt_compiler.calibration.select.repetition_scores import (
    GROWTH,
    AttentionCall,
    copies_of,
    measure,
)
from calibatt_compiler.calibration.select.selection import select
from calibatt_compiler.calibration.store.records import SiteSize
from calibatt_compiler.kernels.common.row_similarity import FRAMES, row_similarity
from calibatt_compiler.plan.copies import AnchorRows

EXAMPLE = Path(__file__).parent.parent / "examples" / "tiny_wan"
GAMMAS = (0.95, 0.9, 0.87, 0.8, 0.7, 0.6, 0.5)
THRESHOLDS = (0.5, 0.7, 0.84, 0.9, 0.95)
FEWER = (1, 2, 4)
SHARES = ("alike", "no_larger_error", "costs_less", "both")
CHECK = {"height": 64, "width": 96, "num_frames": 9}


@dataclass
class Figures:
    """One entry a head and step.

    Attributes:
        scores: similarity, copy error, sparse error, dropped share, at the step's threshold.
        density: of the blocks at that threshold.
        cost: of the anchor rows, as a density.
        others: scores at each of `THRESHOLDS`.
        frames: similarity from each of `FEWER` frames, then from all.
        seconds: that scoring took, in all.
    """

    scores: list[npt.NDArray[np.float32]] = field(default_factory=list)
    density: list[npt.NDArray[np.float64]] = field(default_factory=list)
    cost: list[npt.NDArray[np.float64]] = field(default_factory=list)
    others: list[npt.NDArray[np.float32]] = field(default_factory=list)
    frames: list[npt.NDArray[np.float64]] = field(default_factory=list)
    seconds: float = 0.0


class ScoreObserver(EnergyObserver):
    """Scores each call under several masks."""

    def __init__(self, model: ObservedModel) -> None:
        super().__init__(model)
        self.figures = Figures()

    def _observe(
        self, run: InputObservation, size: SiteSize, step: int, energy: Tensor, call: AttentionCall
    ) -> None:
        grid = self._grid(size.query_length)
        copies = copies_of(grid, size.query_length, None, self._config.anchor_rows)
        assert copies is not None
        steps = self._steps(run)
        assert steps is not None
        threshold = self._config.thresholds(steps).at(run.positions[step], steps)
        started = time.perf_counter()
        scores, mask = self._scores(size, energy, call, copies, threshold)
        found = self.figures
        found.seconds += time.perf_counter() - started
        found.scores.append(scores)
        found.density.append(mask[0].double().mean((-1, -2)).numpy())
        computed = -(-len(copies.computed(size.query_length)) // self._config.block[0])
        found.cost.append(np.full(size.heads, computed / mask.shape[2]))
        others = [self._scores(size, energy, call, copies, other)[0] for other in THRESHOLDS]
        found.others.append(np.stack(others))
        alike = [
            row_similarity(call.q, call.k, grid=grid, scale=call.scale, frames=frames)
            for frames in (*FEWER, grid[0])
        ]
        found.frames.append(torch.stack(alike)[:, 0].numpy())

    def _scores(
        self,
        size: SiteSize,
        energy: Tensor,
        call: AttentionCall,
        copies: AnchorRows,
        threshold: float,
    ) -> tuple[npt.NDArray[np.float32], Tensor]:
        mask, kept = select(
            energy,
            threshold,
            lengths=(size.query_length, size.key_length),
            video=copies.video,
            block=self._config.block,
            text=None,
        )
        return measure(call, mask, kept, copies, self._config.block)[:, 0], mask


def observe(
    folder: Path, config: CalibrationConfig, steps: int, **changed: int
) -> tuple[Figures, float]:
    """Generate the first calibration video of the demo; return its figures and the seconds."""
    from calibatt_compiler.cli import pipelines

    settings = json.loads((EXAMPLE / "demo.json").read_text(encoding="utf-8"))
    case = settings.pop("calibration")[0]
    settings.pop("held_out")
    pipe = pipelines.load_pipeline(str(folder), torch.device("cpu"), torch.float32)
    model = ObservedPipeline.of(pipe, config)
    observer = ScoreObserver(model)
    arguments = {**settings, **changed, "num_inference_steps": steps, "prompt": case["prompt"]}
    with model.shown_to(observer):
        observer.begin("00000", {}, 1)
        started = time.perf_counter()
        generate(pipe, case["seed"], arguments)
    return observer.figures, time.perf_counter() - started


def rows(figures: Figures) -> list[dict[str, float | None]]:
    """Return for each gamma the shares of heads; without one, the density alone."""
    similarity, copied, sparse, _ = np.concatenate(figures.scores, axis=1)
    density, cost = np.concatenate(figures.density), np.concatenate(figures.cost)
    found: list[dict[str, float | None]] = []
    for gamma in GAMMAS:
        alike = similarity >= gamma
        better, cheaper = alike & (copied <= sparse), alike & (cost < density)
        both = better & cheaper
        ratio = copied[alike] / np.maximum(sparse[alike], 1e-12)
        shares = zip(SHARES, (alike, better, cheaper, both), strict=True)
        found.append(
            {
                "gamma": gamma,
                **{name: float(flags.mean()) for name, flags in shares},
                "density": float(np.where(both, cost, density).mean()),
                "copied_/_sparse_error": float(np.median(ratio)) if alike.any() else None,
            }
        )
    return found


def show(figures: Figures) -> None:
    """Print the tables."""
    similarity, copied, *_ = np.concatenate(figures.scores, axis=1)
    density = np.concatenate(figures.density)
    marks = (0, 0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 1)
    print(f"{len(similarity)} heads and steps; quantiles", *(f"{mark:7.2f}" for mark in marks))
    for name, values in (("similarity", similarity), ("copy error", copied)):
        print(f"{name:25s}", *(f"{value:7.4f}" for value in np.quantile(values, marks)))
    columns = (*SHARES, "density", "copied_/_sparse_error")
    print("\ngamma", *(f"{column.replace('_', ' '):>21s}" for column in columns))
    for row in rows(figures):
        words = (f"{row[column] or 0:21.4f}" for column in columns)
        print(f"{row['gamma']:5.2f}", *words)
    print(f"without: density {density.mean():.4f}\n\nframes  mean and largest change, gamma 0.87")
    *few, every = np.concatenate(figures.frames, axis=1)
    for frames, values in zip(FEWER, few, strict=True):
        change, other = abs(values - every), (values >= 0.87) != (every >= 0.87)
        print(f"{frames:6d} {change.mean():8.4f} {change.max():8.4f} {other.sum():5d} heads differ")
    print(f"calibration takes {FRAMES}\n\nsparse error predicted from another threshold / measured")
    others = np.concatenate(figures.others, axis=2)
    for of, base in (*((n, 2) for n in (0, 1, 3, 4)), *((n, 3) for n in (0, 1, 2, 4))):
        error, dropped = others[base, 2:]
        counted = (dropped > 1e-6) & (others[of, 2] > 1e-9)
        predicted = error * (others[of, 3] / np.maximum(dropped, 1e-6)) ** GROWTH
        quantiles = np.quantile(predicted[counted] / others[of, 2][counted], (0.05, 0.5, 0.95))
        print(
            f"{THRESHOLDS[of]:.2f} from {THRESHOLDS[base]:.2f}", *(f"{x:6.2f}" for x in quantiles)
        )


def main() -> None:
    """Observe and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, default=EXAMPLE / "model")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--anchor-rows", type=int, default=5)
    parser.add_argument("--A", type=float, default=0.9)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--check", action="store_true", help="a tiny video: shows that it runs")
    options = parser.parse_args()
    steps, changed = (1, CHECK) if options.check else (options.steps, {})
    options.anchor_rows = 2 if options.check else options.anchor_rows
    config = CalibrationConfig(
        block=(32, 32),
        A=options.A,
        C=0.999,
        k=8.0,
        gamma=0.5,
        anchor_rows=options.anchor_rows,
        inductor=False,
    )
    figures, seconds = observe(options.model, config, steps, **changed)
    show(figures)
    print(f"\nscoring took {figures.seconds:.1f} s; all of it, tables included, {seconds:.1f} s")
    if options.out is not None:
        without = float(np.concatenate(figures.density).mean())
        settings = {"steps": steps, "A": options.A, "anchor_rows": options.anchor_rows}
        settings |= {"density_without": without, "check": options.check}
        path = options.out / "repetition.json"
        write_record(path, torch.device("cpu"), rows(figures), **settings)


if __name__ == "__main__":
    main()
