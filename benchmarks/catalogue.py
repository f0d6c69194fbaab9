"""What each benchmark asks, which columns its table has, and what it aims at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
Cells = dict[str, float | str]


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: its heading.
        digits: behind the point, for numbers.
        key: whether it names the row; the others show the least and the greatest of the runs.
    """

    title: str
    digits: int = 2
    key: bool = False


@dataclass(frozen=True)
class Aim:
    """What a benchmark is to show.

    Attributes:
        words: the aim.
        misses: rows of a table that it speaks of and that miss it.
        applies: rows that it speaks of.
    """

    words: str
    applies: Callable[[Cells], bool]
    met: Callable[[Cells], bool]


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is shown.

    Attributes:
        name: of the script, without suffix.
        question: what it answers.
        command: how to run it.
        columns: of its table.
        cells: the rows of the table from one row of a record.
        aims: what it is to show.
        picture: beside the table, relative to the repository.
    """

    name: str
    question: str
    command: str
    columns: tuple[Column, ...]
    cells: Callable[[Row], Iterator[Cells]]
    aims: tuple[Aim, ...] = ()
    picture: str | None = None


def _attention(row: Row) -> Iterator[Cells]:
    for kernel, ms in row["sustained"].items():
        yield {
            "case": row["case"],
            "density": row["density"],
            "kernel": kernel,
            "ms": ms,
            "e sustained": row["efficiency"].get(kernel, float("nan")),
            "e burst": row["burst_efficiency"].get(kernel, float("nan")),
            "error / SDPA's": row["errors"][kernel],
        }


def _layer(row: Row) -> Iterator[Cells]:
    ms = row["ms"]
    for variant, own in ms.items():
        yield {
            "size": row["size"],
            "density": row["density"],
            "attention": variant,
            "ms a layer": own,
            "x FlashAttention-3": ms["fa3"] / own if "fa3" in ms else float("nan"),
            "x stock": ms["stock"] / own if "stock" in ms else float("nan"),
        }


def _energy(row: Row) -> Iterator[Cells]:
    for kernel, ms in row["ms"].items():
        yield {"size": row["size"], "tokens": row["tokens"], "kernel": kernel, "ms": ms}


def _as_it_is(*titles: str) -> Callable[[Row], Iterator[Cells]]:
    def cells(row: Row) -> Iterator[Cells]:
        yield {title: row[title.replace(" ", "_")] for title in titles}

    return cells


def _is(**wanted: str) -> Callable[[Cells], bool]:
    return lambda cells: all(str(cells[key]).startswith(value) for key, value in wanted.items())


def _least(title: str, least: float) -> Callable[[Cells], bool]:
    return lambda cells: float(cells[title]) >= least


def _most(title: str, most: float) -> Callable[[Cells], bool]:
    return lambda cells: float(cells[title]) <= most


BENCHMARKS = (
    Benchmark(
        "attention",
        "How fast is a block-sparse call, beside dense FlashAttention-3? "
        "e = density x t(FlashAttention-3, dense) / t: 1 is as fast as what is skipped allows.",
        "python benchmarks/attention.py --quick --out results",
        (
            Column("case", key=True),
            Column("density", 3, key=True),
            Column("kernel", key=True),
            Column("ms"),
            Column("e sustained"),
            Column("e burst"),
            Column("error / SDPA's", 3),
        ),
        _attention,
        (
            Aim("the Hopper kernel with a fixed shift: e >= 1", _is(kernel="hopper fixed"),
                _least("e sustained", 1.0)),
            Aim("zones: e >= 1", _is(kernel="zones"), _least("e sustained", 1.0)),
            Aim("exact: e >= 0.95", _is(kernel="hopper exact"), _least("e sustained", 0.95)),
            Aim("portable tables: e >= 0.88", _is(kernel="table"), _least("e sustained", 0.88)),
        ),
        "docs/attention-h100.png",
    ),
    Benchmark(
        "dit_layer",
        "How fast is a whole layer of Wan 14B, beside stock torch.compile and FlashAttention-3?",
        "python benchmarks/dit_layer.py --layers 4 --out results",
        (
            Column("size", key=True),
            Column("density", 3, key=True),
            Column("attention", key=True),
            Column("ms a layer", 1),
            Column("x FlashAttention-3"),
            Column("x stock"),
        ),
        _layer,
    ),
    Benchmark(
        "energy",
        "What do block energies cost beside the attention that calibration runs anyway?",
        "python benchmarks/energy.py --out results",
        (Column("size", key=True), Column("tokens", 0, key=True), Column("kernel", key=True),
         Column("ms")),
        _energy,
    ),
    Benchmark(
        "calibration_cost",
        "What does an observed forward pass cost beside a dense one?",
        "python benchmarks/calibration_cost.py --out results",
        (Column("size", key=True), Column("tokens", 0, key=True), Column("layers", 0, key=True),
         Column("dense", 1), Column("observed", 1), Column("ratio")),
        _as_it_is("size", "tokens", "layers", "dense", "observed", "ratio"),
        (Aim("ratio <= 1.35", lambda cells: True, _most("ratio", 1.35)),),
    ),
    Benchmark(
        "plan_serving",
        "Does it cost speed that tables of a large plan come while the model runs?",
        "python benchmarks/plan_serving.py --out results",
        (Column("tokens", 0, key=True), Column("sites", 0, key=True), Column("steps", 0, key=True),
         Column("passes", 0, key=True), Column("density", 3), Column("ratio", 3),
         Column("tables mb", 0), Column("held mb", 0)),
        _as_it_is("tokens", "sites", "steps", "passes", "density", "ratio", "tables mb", "held mb"),
        (Aim("ratio of served to resident <= 1.01", lambda cells: True, _most("ratio", 1.01)),),
    ),
)  # fmt: skip
