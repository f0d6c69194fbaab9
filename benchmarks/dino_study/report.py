"""Table and picture of what the study has found so far."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from dino_study.methods import CORE, HIGHEST, ORACLE, PAPER, POOLED, RANDOM
from dino_study.study import MAIN_TILE, Study

from calibatt_compiler.files import replacing

KINDS = ("film", "photo")
DRAWN = (*CORE, RANDOM, "neighbouring tiles")


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def layer_error(study: Study, order: str, density: float, method: str, kind: str) -> float | None:
    """Return the mean over layers and over the images of a kind, None if not measured."""
    found = []
    for name in study.tests:
        row = study.results.get(f"layers|{order}|{name}", {}).get(f"{density}|{method}")
        if name.startswith(kind) and row is not None:
            errors = cast("list[float]", row)[1:]
            found.append(sum(errors) / len(errors))
    return _mean(found)


def feature_error(study: Study, density: float, method: str, kind: str) -> float | None:
    """Return the mean over the images of a kind, None if not measured."""
    rows = (
        study.results.get(f"features|{density}|{method}|{name}")
        for name in study.tests
        if name.startswith(kind)
    )
    return _mean([cast("float", row["error"]) for row in rows if row is not None])


def _pair(values: list[float | None]) -> str:
    if any(value is None for value in values):
        return ""
    return " / ".join(f"{value:.3f}" for value in values)


def _methods(study: Study, order: str) -> list[str]:
    """Names of the methods measured in an order, as they came."""
    names: dict[str, None] = {}
    for name in study.tests:
        for key in study.results.get(f"layers|{order}|{name}", {}):
            names[key.partition("|")[2]] = None
    return list(names)


def table(study: Study) -> str:
    """Return the figures as Markdown: film / photographs in each cell."""
    densities = list(study.densities)
    heads = [f"layer {d:g}" for d in densities] + [f"features {d:g}" for d in densities]
    lines = [f"| method | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for method in _methods(study, MAIN_TILE):
        cells = [
            _pair([layer_error(study, MAIN_TILE, d, method, kind) for kind in KINDS])
            for d in densities
        ] + [_pair([feature_error(study, d, method, kind) for kind in KINDS]) for d in densities]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_order_lines(study)])


def rows(study: Study) -> list[dict[str, Any]]:
    """Return a row for each density and method of the main order; None: not measured."""
    return [
        {
            "density": density,
            "method": method,
            **{
                f"layer,_{kind}": layer_error(study, MAIN_TILE, density, method, kind)
                for kind in KINDS
            },
            **{f"features,_{kind}": feature_error(study, density, method, kind) for kind in KINDS},
        }
        for density in study.densities
        for method in _methods(study, MAIN_TILE)
    ]


def _order_lines(study: Study) -> list[str]:
    names = [key.partition("|")[2] for key in study.results if key.startswith("order|")]
    if not names:
        return []
    shares: list[Mapping[str, Any]] = [study.results[f"order|{name}"] for name in names]
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for key in shares[0]:
        lines.append(f"| {key} | {' | '.join(f'{share[key]:.3f}' for share in shares)} |")
    for density in study.densities:
        for method in (HIGHEST, ORACLE, POOLED.format(1), POOLED.format(4)):
            cells = [
                _pair([layer_error(study, name, density, method, kind) for kind in KINDS])
                for name in names
            ]
            lines.append(f"| {method}, layer {density:g} | {' | '.join(cells)} |")
    return lines


def draw(study: Study, path: Path) -> None:
    """Write a picture: layer error over density, film and photographs side by side."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 5.6), sharey=True, layout="constrained")
    titles = ("held-out frames of the film", "photographs")
    for axis, kind, title in zip(axes, KINDS, titles, strict=True):
        for number, method in enumerate(DRAWN):
            points = [
                (density, error)
                for density in sorted(study.densities)
                if (error := layer_error(study, MAIN_TILE, density, method, kind)) is not None
            ]
            if not points:
                continue
            style = "--" if method in {RANDOM, "neighbouring tiles", ORACLE} else "-"
            width = 2.5 if method in {PAPER, POOLED.format(4)} else 1.3
            axis.plot(
                [x for x, _ in points],
                [y for _, y in points],
                style,
                marker="o",
                markersize=3,
                linewidth=width,
                color=plt.get_cmap("tab20")(number),
                label=method,
            )
        axis.set(title=title, xlabel="density (kept blocks and pooled keys over all keys)")
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="relative error of a layer's attention output", ylim=(0, None))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)
