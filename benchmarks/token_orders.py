"""Compare token orders: on synthetic local attention, and on a model by the survey of `auto`.

    python benchmarks/token_orders.py synthetic --grid 21 30 52 --block 128 --out results
    python benchmarks/token_orders.py model examples/tiny_wan/model --block 32 --pooled 1

`synthetic` takes attention that falls off with distance, exp(-|(df/a, dh/b, dw/c)|), for several
reaches a, b, c in frames, rows and columns, and prints which share of the blocks covers a threshold
of it, over sampled query blocks. `--text` puts so many tokens before the video, so that blocks
begin elsewhere in the order. `model` prints what `calibatt calibrate --token-order auto` measures
on the first two prompts of a file of settings such as `examples/tiny_wan/demo.json`. Both write
OUT/token_orders.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import write_record
from torch import Tensor

from calibatt_compiler.calibration.order_search.candidates import candidates
from calibatt_compiler.calibration.select.selection import covering_mask
from calibatt_compiler.plan.order import TokenOrder

REACHES = ((1, 4, 4), (3, 3, 3), (8, 1.5, 1.5), (0.5, 6, 6), (2, 2, 8))
"""Frames, rows, columns over which attention falls to 1/e."""

Grid = tuple[int, int, int]


def density(
    places: Tensor, reach: tuple[float, ...], starts: Tensor, rows: Tensor, threshold: float
) -> float:
    """Mean share of key blocks that covers a threshold of each query block's attention.

    Args:
        places: (tokens, 3) in the order.
        reach: frames, rows, columns.
        starts: first token of each block.
        rows: query blocks that count.
        threshold: share of attention.
    """
    scaled = places / torch.tensor(reach)
    of_token = torch.bucketize(torch.arange(len(places)), starts, right=True) - 1
    shares = []
    for row in rows.tolist():
        weight = torch.exp(-torch.cdist(scaled[of_token == row], scaled))
        mass = (weight / weight.sum(-1, keepdim=True)).mean(0)
        energy = torch.zeros(len(starts)).index_add_(0, of_token, mass)
        shares.append(covering_mask(energy[None], threshold)[0].double().mean().item())
    return float(np.mean(shares))


def synthetic(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Print a line an order, density at each reach and the mean; return the rows."""
    grid: Grid = tuple(args.grid)
    orders = args.orders or [str(order) for order in candidates(grid, (args.block, args.block))]
    places = torch.from_numpy(np.indices(grid).reshape(3, -1).T.copy()).float()
    cut = -args.text % args.block
    starts = torch.arange(cut, len(places), args.block)
    starts = torch.cat([torch.zeros(1, dtype=starts.dtype), starts]) if cut else starts
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(starts), generator=generator)[: args.rows]
    print(f"grid {grid}, blocks of {args.block}, {args.text} text tokens, reaches {REACHES}")
    made: list[dict[str, Any]] = []
    for name in orders:
        tokens = TokenOrder.parse(name).tokens(grid)
        ordered = places if tokens is None else places[torch.from_numpy(tokens)]
        found = [density(ordered, reach, starts, rows, args.threshold) for reach in REACHES]
        mean = float(np.mean(found))
        print(f"{name:>10}", *(f"{x:.3f}" for x in found), f"mean {mean:.3f}", flush=True)
        made.append({"attention": "synthetic", "text": args.text, "order": name, "density": mean})
        made[-1]["by_reach"] = found
    return made


def model(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Print what the survey finds, return the rows."""
    from calibatt_compiler.calibration import CalibrationConfig
    from calibatt_compiler.calibration.observe.pipelines import ObservedPipeline
    from calibatt_compiler.calibration.order_search.search import survey_pipeline
    from calibatt_compiler.calibration.progress import CalibrationProgress
    from calibatt_compiler.cli.pipelines import device_of, dtype_of, load_pipeline

    device = device_of("auto")
    pipe = load_pipeline(str(args.folder), device, dtype_of("auto", device))
    settings = json.loads((args.settings or args.folder.parent / "demo.json").read_text())
    cases = settings.pop("calibration")[:2]
    del settings["held_out"]
    settings["num_inference_steps"] = args.steps
    size = (args.block, args.block)
    config = CalibrationConfig(block=size, pooled=args.pooled, A=args.threshold, C=0.99, k=16.0)
    inputs = [(case["seed"], {"prompt": case["prompt"]}) for case in cases]
    with CalibrationProgress(len(inputs), 0, False) as bar:
        found = survey_pipeline(ObservedPipeline.of(pipe, config), inputs, settings, bar)
    print(f"blocks of {args.block}, {args.pooled} pooled keys, steps {found.steps} of {args.steps}")
    for name, share in found.density.items():
        print(f"{name:>10} density {share:.3f} error {found.error[name]:.3f}")
    print(f"taken: {found.chosen}")
    name = f"{args.folder.resolve().parent.name}, {args.pooled} pooled keys"
    return [
        {"attention": name, "text": 0, "order": order, "density": share}
        | {"error": found.error[order], "taken": order == str(found.chosen)}
        for order, share in found.density.items()
    ]


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    first = commands.add_parser("synthetic")
    first.add_argument("--grid", type=int, nargs=3, default=(21, 30, 52))
    first.add_argument("--orders", nargs="+", help="default: the candidates of a survey")
    first.add_argument("--text", type=int, default=0)
    first.add_argument("--rows", type=int, default=64, help="query blocks that are sampled")
    second = commands.add_parser("model")
    second.add_argument("folder", type=Path)
    second.add_argument("--settings", type=Path, help="default: demo.json beside the folder")
    second.add_argument("--pooled", type=int, default=0)
    second.add_argument("--steps", type=int, default=8)
    for command, run in ((first, synthetic), (second, model)):
        command.add_argument("--block", type=int, default=128)
        command.add_argument("--threshold", type=float, default=0.84)
        command.add_argument("--out", type=Path)
        command.set_defaults(run=run)
    args = parser.parse_args()
    rows = [{"block": args.block, **row} for row in args.run(args)]
    if args.out is not None:
        settings = {"threshold": args.threshold, "grid": getattr(args, "grid", None)}
        write_record(args.out / "token_orders.json", torch.device("cpu"), rows, **settings)


if __name__ == "__main__":
    main()
