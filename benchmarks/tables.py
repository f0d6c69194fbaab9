"""What a table shows: one line of cells for each row of a record, by benchmark."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from record import Run

Row = Mapping[str, Any]
Cells = dict[str, float | str]
Tabulate = Callable[[Run], Iterator[Cells]]

STATIC_PEERS = ("tiles", "radial", "heads", "random")
"""Methods of `fidelity.py` that know nothing of the input: their names in its rows."""


def rowwise(one: Callable[[Row], Iterable[Cells]]) -> Tabulate:
    """Make a table from a function of one row, which sees the run's settings too."""

    def cells(run: Run) -> Iterator[Cells]:
        for row in run.rows:
            yield from one({**run.settings, **row})

    return cells


def columns(*titles: str) -> Tabulate:
    """Make a table of what rows hold under the titles, with _ for blanks."""

    def one(row: Row) -> Iterator[Cells]:
        yield {title: number(row[title.replace(" ", "_")]) for title in titles}

    return rowwise(one)


def number(value: Any) -> float | str:
    """Return a number or text; NaN for what was not measured."""
    if value is None:
        return math.nan
    return value if isinstance(value, int | float | str) else str(value)


def facts(*keys: str) -> Tabulate:
    """Make a table of everything that a row holds, a line each, named by the keys."""

    def cells(run: Run) -> Iterator[Cells]:
        for row in run.rows:
            named: Cells = {key: number(row[key]) for key in keys}
            for what, found in row.items():
                if isinstance(found, int | float) and what not in keys:
                    yield {**named, "what": what.replace("_", " "), "found": found}

    return cells


def attention(row: Row) -> Iterator[Cells]:
    """Yield a line for each kernel of a case."""
    for kernel, ms in row["sustained"].items():
        yield {
            "case": row["case"],
            "density": row["density"],
            "kernel": kernel,
            "ms": ms,
            "e sustained": row["efficiency"].get(kernel, math.nan),
            "e burst": row["burst_efficiency"].get(kernel, math.nan),
            "x dense": row["sustained"].get("fa3", math.nan) / ms,
            "error / SDPA's": row["errors"][kernel],
        }


def layer(row: Row) -> Iterator[Cells]:
    """Yield a line for each kind of attention in a layer."""
    ms = row["ms"]
    for variant, own in ms.items():
        yield {
            "size": row["size"],
            "density": round(row["density"], 3),
            "mask": row.get("mask", ""),
            "layers": row["layers"],
            "attention": variant,
            "ms a layer": own,
            "x FlashAttention-3": ms["fa3"] / own if "fa3" in ms else math.nan,
            "x stock": ms["stock"] / own if "stock" in ms else math.nan,
        }


def profile(row: Row) -> Iterator[Cells]:
    """Yield a line for each kind of kernel in a layer."""
    named: Cells = {key: row[key] for key in ("size", "density", "attention")}
    for kind, ms in {**row["kinds"], "all": row["span"]}.items():
        yield {**named, "kernels": kind, "ms a layer": ms / row["layers"]}


def ways(row: Row) -> Iterator[Cells]:
    """Yield the line of a way of running."""
    ms, compile_s, error = row["ms"], row["compile_s"], row["error"]
    yield {
        **{key: row[key] for key in ("way", "size", "layers", "sparse", "distance")},
        "density": round(row["density"], 3),
        "ms, stock": ms["stock"],
        "ms, plan": ms["plan"],
        "x stock": ms["stock"] / ms["plan"],
        "compile s, stock": compile_s["stock"],
        "compile s, plan": compile_s["plan"],
        "compile / stock's": compile_s["plan"] / compile_s["stock"],
        "error, stock": error["stock"],
        "error, plan": error["plan"],
        "error / stock's": error["plan"] / error["stock"] if error["stock"] else math.nan,
    }


def campaign(row: Row) -> Iterator[Cells]:
    """Yield the line of a campaign."""
    yield {key: row[key] for key in ("campaign", "cases", "failures", "minutes", "workers")}


def energy(row: Row) -> Iterator[Cells]:
    """Yield a line for each kernel that gives energies."""
    for kernel, ms in row["ms"].items():
        yield {
            "size": row["size"],
            "tokens": row["tokens"],
            "heads": row["heads"],
            "kernel": kernel,
            "ms": ms,
            "added to FlashAttention-3": row["added"].get("fa3", {}).get(kernel, math.nan),
            "added to cuDNN": row["added"].get("cudnn", {}).get(kernel, math.nan),
        }


def cpu_attention(row: Row) -> Iterator[Cells]:
    """Yield a line for each kernel of a mask."""
    for kernel, ms in row["ms"].items():
        times = row["ms"]["SDPA"] / ms
        yield {
            "block": row["block"],
            "density": row["density"],
            "kernel": kernel,
            "ms": ms,
            "x SDPA": times,
            # Energies are of dense attention, and SDPA leaves nothing out: no efficiency.
            "e": row["density"] * times if kernel in ("ours", "FlexAttention") else math.nan,
        }


def smoke(row: Row) -> Iterator[Cells]:
    """Yield a line for each kernel of a shape."""
    for kernel, ms in row["times"].items():
        yield {
            "shape": row["shape"]["name"],
            "density": row["density"],
            "kernel": kernel,
            "ms": ms,
            "e": row["efficiency"].get(kernel, math.nan),
            "error / SDPA's": row["errors"].get(kernel, math.nan),
        }


def serving(row: Row) -> Iterator[Cells]:
    """Yield the line of a plan."""
    yield {
        "plan": "weighted samples" if row.get("samples") else "masks",
        **{key: row[key] for key in ("tokens", "sites", "steps", "passes", "density", "ratio")},
        "tables mb": row["tables_mb"],
        "held mb": row["held_mb"],
        "of all steps mb": row["tables_of_all_steps_mb"],
    }


def serving_model(row: Row) -> Iterator[Cells]:
    """Yield a line for each way of serving a model."""
    for name, steps in row["ms"].items():
        yield {
            "plan": "weighted samples" if row.get("samples") else "masks",
            "layers": row["layers"],
            "passes": row["passes"],
            "served": name,
            "ms, all steps": sum(steps),
            "x resident": sum(steps) / sum(row["ms"]["resident"]),
        }


def orders(row: Row) -> Iterator[Cells]:
    """Yield the line of a token order."""
    yield {
        "attention": row["attention"],
        "text": row["text"],
        "block": row["block"],
        "order": row["order"],
        "density": row["density"],
        "error": number(row.get("error")),
    }


def zone_choices(run: Run) -> Iterator[Cells]:
    """Each choice beside the fit as it is."""
    for row in run.rows:
        yield {
            "model": run.settings["model"],
            "choice": row["choice"],
            "density": number(row["density"]),
            "videos": number(row["videos"]),
            "median dB": number(row["median"]),
            "PSNR dB": number(row["psnr"]),
            "gain, dB": number(row["gain"]),
            "mean gain, dB": number(row["mean_gain"]),
            "videos better": number(row["better"]),
            "SSIM": number(row["ssim"]),
        }


def fidelity(run: Run) -> Iterator[Cells]:
    """Yield a line for each method at each density, beside the peers of the same run."""
    for row in run.rows:
        same = [
            other for other in run.rows
            if (other["model"], other["density"]) == (row["model"], row["density"])
        ]  # fmt: skip
        peers = [decibels(other) for other in same if other["name"] in STATIC_PEERS]
        oracle = [decibels(other) for other in same if other["name"] == "oracle"]
        own, masks = decibels(row), [other for other in same if other["name"] == "ours"]
        gains = paired(row, masks[0]) if masks else []
        yield {
            "model": row["model"],
            "density": row["density"],
            "method": row["method"],
            "videos": len(row["by_video"]),
            "PSNR dB": own,
            "median dB": statistics.median(map(finite, row["by_video"].values())),
            "over the masks, dB": statistics.median(gains) if gains else math.nan,
            "videos above them": sum(gain > 0 for gain in gains) / len(gains)
            if gains
            else math.nan,
            "SSIM": number(row["ssim"]),
            "DINOv2 distance": number(row["perceptual"]),
            "flicker": number(row["flicker"]),
            "over static peers, dB": own - max(peers) if peers else math.nan,
            "over the oracle, dB": own - oracle[0] if oracle else math.nan,
        }


def finite(decibels: float | None) -> float:
    """Return a PSNR, infinite for equal videos."""
    return math.inf if decibels is None else decibels


def paired(row: Row, other: Row) -> list[float]:
    """Return what each video has more than the same one of another method, in dB."""
    both = row["by_video"].keys() & other["by_video"].keys()
    return [
        finite(row["by_video"][case]) - finite(other["by_video"][case])
        for case in sorted(both)
        if row is not other
    ]


def decibels(row: Row) -> float:
    """Return the mean PSNR of a row of `fidelity.py`: infinite for equal videos."""
    return math.inf if row["psnr"] is None else float(row["psnr"])
