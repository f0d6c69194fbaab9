"""Draw the loss curves of the two trainings."""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean

from checkpoint import read_log
from settings import HERE, WORK


def draw(log: Path, out: Path, title: str) -> None:
    """Plot loss against step, with a running mean over 13 records."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    records = {record["step"]: record["loss"] for record in read_log(log)}
    steps, losses = list(records), list(records.values())
    smooth = [mean(losses[max(0, i - 6) : i + 7]) for i in range(len(losses))]
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    axes.plot(steps, losses, color="0.75", linewidth=0.7, label="loss")
    axes.plot(steps, smooth, color="tab:blue", linewidth=1.3, label="running mean")
    axes.set(xlabel="step", ylabel="loss", title=title, yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=100)
    last = mean(losses[-25:])
    print(f"{title}: first {losses[0]:.4f}, last 25 records {last:.4f}, {steps[-1]} steps")


def main() -> None:
    """Write ``loss_vae.png`` and ``loss.png``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the logs")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    draw(args.work / "vae_loss.jsonl", args.out / "loss_vae.png", "Autoencoder")
    draw(args.work / "dit_loss.jsonl", args.out / "loss.png", "Transformer and text encoder")


if __name__ == "__main__":
    main()
