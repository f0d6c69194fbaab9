"""What each benchmark asks, which columns and picture it has, and what it aims at."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import tables
from charts import Chart
from tables import Cells, Tabulate, columns, facts, rowwise


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: its heading.
        digits: behind the point, for numbers; None: four digits that count.
        key: whether it names the row; the others show the least and the greatest of the runs.
    """

    title: str
    digits: int | None = 2
    key: bool = False


@dataclass(frozen=True)
class Aim:
    """What a benchmark is to show.

    Attributes:
        words: the aim.
        rows: those of the table that it speaks of.
        column: of the table.
        least: wanted there.
        most: wanted there.
    """

    words: str
    rows: Callable[[Cells], bool]
    column: str
    least: float = -math.inf
    most: float = math.inf

    def applies(self, cells: Cells) -> bool:
        """Whether it speaks of a row, and something was measured there."""
        return self.rows(cells) and not math.isnan(float(cells[self.column]))

    def met(self, cells: Cells) -> bool:
        """Whether a run met it in a row that it speaks of."""
        return self.least <= float(cells[self.column]) <= self.most


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is shown.

    Attributes:
        name: of its records; that of the script, without suffix.
        question: what it answers.
        command: how to run it.
        columns: of its table.
        cells: the rows of the table from a run.
        aims: what it is to show.
        chart: the picture beside the table.
        script: where it is run from; default the file of its name.
    """

    name: str
    question: str
    command: str
    columns: tuple[Column, ...]
    cells: Tabulate
    aims: tuple[Aim, ...] = ()
    chart: Chart | None = None
    script: str = ""


def matching(**wanted: str) -> Callable[[Cells], bool]:
    """Rows whose columns say so; * stands for anything."""
    return lambda cells: all(
        fnmatchcase(str(cells[title]), words) for title, words in wanted.items()
    )


def every(cells: Cells) -> bool:
    """All rows."""
    return True


def key(*titles: str, digits: int | None = 0) -> tuple[Column, ...]:
    """Columns that name the row; digits are of those that hold numbers."""
    return tuple(Column(title, digits, key=True) for title in titles)


BENCHMARKS = (
    Benchmark(
        "attention",
        "How fast is a block-sparse call, beside dense FlashAttention-3? "
        "e = density x t(FlashAttention-3, dense) / t: 1 is as fast as what is skipped allows.",
        "python benchmarks/attention.py --quick --out results",
        (*key("case"), *key("density", digits=3), *key("kernel"), Column("ms"),
         Column("e sustained"), Column("e burst"), Column("error / SDPA's", 3)),
        rowwise(tables.attention),
        (
            Aim("the Hopper kernel with a fixed shift: e >= 1", matching(kernel="hopper fixed"),
                "e sustained", least=1.0),
            Aim("zones on the Hopper kernel: e >= 1", matching(kernel="hopper zones*"),
                "e sustained", least=1.0),
            Aim("exact: e >= 0.95", matching(kernel="hopper exact"), "e sustained", least=0.95),
            Aim("portable tables: e >= 0.88", matching(kernel="table*"), "e sustained", least=0.88),
        ),
        Chart("e sustained", "kernel", ("case",), mark=1.0,
              shows=lambda cells: not matching(kernel="fa3")(cells)),
    ),
    Benchmark(
        "dit_layer",
        "How fast is a whole layer of Wan 14B, beside stock torch.compile and FlashAttention-3?",
        "python benchmarks/dit_layer.py --layers 4 --out results",
        (*key("size"), *key("density", digits=3), *key("mask", "layers", "attention"),
         Column("ms a layer"), Column("x FlashAttention-3"), Column("x stock")),
        rowwise(tables.layer),
        (
            Aim("720p: at least 1.75 times as fast as with FlashAttention-3",
                matching(size="720p", attention="hopper table"), "x FlashAttention-3", least=1.75),
            Aim("720p: at least 1.95 times as fast as stock torch.compile",
                matching(size="720p", attention="hopper table"), "x stock", least=1.95),
            Aim("480p: at least 1.53 times as fast as with FlashAttention-3",
                matching(size="480p", attention="hopper table"), "x FlashAttention-3", least=1.53),
            Aim("zones at density .2, 720p: at least 2.2 times as fast as with FlashAttention-3",
                matching(size="720p", attention="zones baked"), "x FlashAttention-3", least=2.2),
            Aim("zones at density .2, 720p: at least 2.5 times as fast as stock torch.compile",
                matching(size="720p", attention="zones baked"), "x stock", least=2.5),
            Aim("zones at density .2, 480p: at least 1.75 times as fast as with FlashAttention-3",
                matching(size="480p", attention="zones baked"), "x FlashAttention-3", least=1.75),
        ),
        Chart("ms a layer", "attention", ("size", "density")),
    ),
    Benchmark(
        "layer_profile",
        "Where does the time of a layer go?",
        "python benchmarks/dit_layer.py --profile --layers 4 --out results",
        (*key("size"), *key("density", digits=3), *key("attention", "kernels"),
         Column("ms a layer")),
        rowwise(tables.profile),
        chart=Chart("ms a layer", "kernels", ("size", "attention")),
    ),
    Benchmark(
        "zone_choices",
        "What does the fit of zones gain by each of its choices, on whole held-out videos?",
        "python benchmarks/zone_choices.py --model examples/tiny_wan/work/mid/model "
        "--settings examples/tiny_wan/mid.json --block 64 --out results",
        (*key("model"), *key("choice"), *key("density", digits=3), Column("videos", 0),
         Column("median dB"), Column("PSNR dB"), Column("gain, dB"), Column("mean gain, dB"),
         Column("videos better"), Column("SSIM", 4)),
        tables.zone_choices,
    ),
    Benchmark(
        "ways_of_running",
        "What does a plan gain where a model is offloaded, or compiled block by block? Two layers "
        "of Wan 14B under octave zones. Sparse: share of the planned sites; errors are relative to "
        "float32; distance: what the plan changes.",
        "python benchmarks/ways_of_running.py --out results",
        (*key("way", "size", "layers"), *key("density", digits=3), Column("ms, stock", 1),
         Column("ms, plan", 1), Column("x stock"), Column("compile s, stock", 1),
         Column("compile s, plan", 1), Column("compile / stock's"), Column("sparse"),
         Column("error, stock", 4), Column("error, plan", 4), Column("error / stock's"),
         Column("distance")),
        rowwise(tables.ways),
        (
            Aim("all planned sites sparse", every, "sparse", least=1.0),
            Aim("error: at most twice that of stock torch.compile", every, "error / stock's",
                most=2.0),
            Aim("at least as fast as stock torch.compile", every, "x stock", least=1.0),
            Aim("block by block: compiled in at most 1.5 times stock's time",
                matching(way="blocks"), "compile / stock's", most=1.5),
        ),
    ),
    Benchmark(
        "fidelity",
        "How near do sparse videos come to dense ones, at equal density, on held-out prompts?",
        "python benchmarks/fidelity.py compare --out results",
        (*key("model"), *key("density", digits=2), *key("method"), Column("videos", 0),
         Column("PSNR dB"), Column("median dB"), Column("over the masks, dB"),
         Column("videos above them"), Column("SSIM", 3), Column("DINOv2 distance", 3),
         Column("flicker", 1), Column("over static peers, dB", 1),
         Column("over the oracle, dB", 1)),
        tables.fidelity,
        (
            Aim("zones: above the paper's masks of equal density in most videos",
                matching(method="octave zones (ours)"), "over the masks, dB", least=0.0),
            Aim("zones: PSNR above that of every static peer", matching(method="octave zones*"),
                "over static peers, dB", least=0.0),
            Aim("zones: at most 1 dB below the per-input oracle", matching(method="octave zones*"),
                "over the oracle, dB", least=-1.0),
        ),
        Chart("PSNR dB", "method", ("density",), panel="model",
              shows=lambda cells: not matching(method="dense,*")(cells)),
    ),
    Benchmark(
        "energy",
        "What do block energies cost beside the attention that calibration runs anyway?",
        "python benchmarks/energy.py --out results",
        (*key("size", "tokens", "heads", "kernel"), Column("ms"),
         Column("added to FlashAttention-3"), Column("added to cuDNN")),
        rowwise(tables.energy),
        (Aim("output and energies by the Hopper kernel: at most 0.45 added",
             matching(kernel="hopper"), "added to FlashAttention-3", most=0.45),),
        Chart("ms", "kernel", ("size", "heads")),
    ),
    Benchmark(
        "energy_queries",
        "What do energies of a share of the queries do to the masks taken from them?",
        "python benchmarks/energy_queries.py --out results",
        (*key("threshold", digits=2), *key("queries"), Column("density", 3), Column("other", 3),
         Column("mass", 3), Column("least mass", 3)),
        columns("threshold", "queries", "density", "other", "mass", "least mass"),
        chart=Chart("least mass", "threshold", ("queries",)),
    ),
    Benchmark(
        "calibration_cost",
        "What does an observed forward pass cost beside a dense one?",
        "python benchmarks/calibration_cost.py --out results",
        (*key("size", "tokens", "layers"), Column("dense", 1), Column("observed", 1),
         Column("ratio")),
        columns("size", "tokens", "layers", "dense", "observed", "ratio"),
        (Aim("ratio <= 1.35", every, "ratio", most=1.35),),
        Chart("ratio", "size", ("size", "layers"), mark=1.35),
    ),
    Benchmark(
        "calibration_memory",
        "Which memory does the calibration of a layer of Wan 14B at 720p take?",
        "python benchmarks/calibration_memory.py --drawn --out results",
        (*key("energies", "layers", "heads", "steps", "inputs", "what"), Column("found", None)),
        facts("energies", "layers", "heads", "steps", "inputs"),
        (
            Aim("host memory with the masks of 40 layers: at most 8 GiB",
                matching(what="host memory with the masks of 40*"), "found", most=8590),
            Aim("GPU memory beyond model and operands: at most 8 GiB",
                matching(what="GPU memory beyond*"), "found", most=8590),
        ),
    ),
    Benchmark(
        "plan_size",
        "How large is the plan of a large model, and what does it take to open and use it? Zones "
        "are those that calibration fits by default, at its density and at that of the masks.",
        "python benchmarks/plan_size.py --out results",
        (*key("form"), *key("density", digits=2), *key("sites", "steps", "tokens", "what"),
         Column("found", None)),
        facts("form", "density", "sites", "steps", "tokens"),
        (
            Aim("masks: at most 400 MB at 40 sites",
                matching(form="masks", what="file MB at 40 sites"), "found", most=400),
            Aim("masks opened, every byte checked, in at most 5 s",
                matching(form="masks", what="load s"), "found", most=5),
            Aim("zones: at most 20 MB at 40 sites",
                matching(form="zones", what="file MB at 40 sites"), "found", most=20),
            Aim("zones opened, every byte checked, in at most 0.1 s",
                matching(form="zones", what="load s"), "found", most=0.1),
        ),
    ),
    Benchmark(
        "plan_serving",
        "Does it cost speed that tables of a large plan come while the model runs?",
        "python benchmarks/plan_serving.py --out results",
        (*key("plan", "tokens", "sites", "steps", "passes"), Column("density", 3),
         Column("ratio", 3), Column("tables mb", 0), Column("held mb", 0),
         Column("of all steps mb", 0)),
        rowwise(tables.serving),
        (
            Aim("ratio of served to resident <= 1.01", every, "ratio", most=1.01),
            Aim("masks: at most 256 MB of tables", matching(plan="masks"), "tables mb", most=256),
        ),
        Chart("ratio", "plan", ("plan", "passes"), mark=1.01),
    ),
    Benchmark(
        "plan_serving_model",
        "The same in a compiled model: what does bringing tables cost a step of it?",
        "python benchmarks/plan_serving_model.py --out results",
        (*key("plan", "layers", "passes", "served"), Column("ms, all steps", 1),
         Column("x resident", 3)),
        rowwise(tables.serving_model),
        (Aim("served takes at most 1.01 of resident", matching(served="served"),
             "x resident", most=1.01),),
        Chart("ms, all steps", "served", ("plan", "passes")),
    ),
    Benchmark(
        "kernels_smoke",
        "How fast are the portable kernels beside SDPA and FlexAttention? e is of the faster SDPA.",
        "python benchmarks/kernels_smoke.py --out results",
        (*key("shape"), *key("density", digits=3), *key("kernel"), Column("ms", 3), Column("e"),
         Column("error / SDPA's", 3)),
        rowwise(tables.smoke),
        chart=Chart("e", "kernel", ("shape",), mark=1.0),
    ),
    Benchmark(
        "cpu_attention",
        "How fast is a block-sparse call on a CPU? e = density x t(SDPA, dense) / t.",
        "python benchmarks/cpu_attention.py --out results",
        (*key("block"), *key("density", digits=2), *key("kernel"), Column("ms", 1),
         Column("x SDPA"), Column("e")),
        rowwise(tables.cpu_attention),
        chart=Chart("x SDPA", "kernel", ("block", "density"), mark=1.0,
                    shows=matching(kernel="ours")),
    ),
    Benchmark(
        "repetition",
        "Which heads of the demo's model are row-shared, and what does sharing their rows cost? "
        "Shares are of all heads and steps.",
        "python benchmarks/repetition.py --out results",
        (*key("gamma", digits=2), Column("alike", 3), Column("no larger error", 3),
         Column("costs less", 3), Column("both", 3), Column("density", 3),
         Column("copied / sparse error")),
        columns("gamma", "alike", "no larger error", "costs less", "both", "density",
                "copied / sparse error"),
    ),
    Benchmark(
        "token_orders",
        "Which token order needs the fewest blocks, and what error has it at equal density?",
        "python benchmarks/token_orders.py synthetic --out results",
        (*key("attention", "text", "block", "order"), Column("density", 3), Column("error", 3)),
        rowwise(tables.orders),
        chart=Chart("density", "attention", ("order", "text")),
    ),
    Benchmark(
        "dino",
        "How well do block-sparse forms keep the attention of a pretrained model? Relative errors "
        "of a layer's attention output and of the final features.",
        "python benchmarks/dino.py --work /tmp/dino --out results",
        (*key("pixels"), *key("density", digits=2), *key("method"), Column("layer, film", 3),
         Column("layer, photo", 3), Column("features, film", 3), Column("features, photo", 3)),
        columns("pixels", "density", "method", "layer, film", "layer, photo", "features, film",
                "features, photo"),
        chart=Chart("layer, photo", "method", ("density",), panel="pixels"),
    ),
    Benchmark(
        "campaigns",
        "Does anything go wrong in cases drawn at random? `tests/campaigns` says of each file what "
        "a case is; minutes are those of the clock.",
        "make campaign MINUTES=60 CAMPAIGNS='--out results'",
        (*key("campaign"), Column("cases", 0), Column("failures", 0), Column("minutes", 0),
         Column("workers", 0)),
        rowwise(tables.campaign),
        (Aim("no failures", every, "failures", most=0.0),),
        script="tests/campaigns",
    ),
)  # fmt: skip
