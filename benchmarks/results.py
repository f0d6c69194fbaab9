"""Keep records of benchmarks, and write RESULTS.md and docs/performance.md from them.

    python benchmarks/results.py --add results/*.json    keep runs, then write the pages
    python benchmarks/results.py                         write the pages

A record lies in benchmarks/results/<benchmark>/<device>.json: the last runs on that device, newest
first, and beside it the picture of its table. Pages and pictures are made of these files,
`catalogue.py` and `performance.py` alone; a test holds them together.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import charts
import performance
from catalogue import BENCHMARKS, Benchmark, Cells
from performance import spread
from record import Run, read_record

from calibatt_compiler.files import write_text

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "results"
PAGE = ROOT / "benchmarks" / "RESULTS.md"
PERFORMANCE = ROOT / "docs" / "performance.md"
PICTURE = "picture.svg"
KEPT = 5
"""Runs kept of a benchmark on a device."""

_HEAD = """\
# Results

Made from the records in `benchmarks/results` by `make results`; not to be edited. Ratios and times
are measured side by side in one process, medians of repeated rounds; where a benchmark was run more
than once on a device, the least and the greatest of the last runs. What misses its aim stands here.
"""


def add(path: Path) -> Path | None:
    """Keep a run with those before it; return the file that holds them.

    What is no record is left alone, and so is a run that shows only that a script works: None.
    """
    try:
        run = read_record(path)
    except ValueError as why:
        print(f"left out: {why}")
        return None
    if run.settings.get("check"):
        print(f"left out: {path} is of a check, its figures mean nothing")
        return None
    if run.benchmark not in {benchmark.name for benchmark in BENCHMARKS}:
        raise SystemExit(f"{path} is of {run.benchmark}, which is not in benchmarks/catalogue.py")
    slug = re.sub(r"[^a-z0-9]+", "-", run.device.lower()).strip("-")
    kept = FOLDER / run.benchmark / f"{slug}.json"
    runs = [asdict(each) for each in runs_of(kept)] if kept.is_file() else []
    if asdict(run) not in runs:
        runs.insert(0, asdict(run))
    write_text(kept, json.dumps(runs[:KEPT], indent=1) + "\n")
    return kept


def runs_of(path: Path) -> list[Run]:
    """Read the runs of a device, newest first."""
    return [Run(**each) for each in json.loads(path.read_text(encoding="utf-8"))]


def devices_of(benchmark: Benchmark) -> list[list[Run]]:
    """Read the runs of a benchmark, a list a device, the device that ran last first."""
    found = [runs_of(file) for file in sorted((FOLDER / benchmark.name).glob("*.json"))]
    return sorted(found, key=lambda runs: runs[0].date, reverse=True)


def pages() -> dict[Path, str]:
    """Return everything that is made of the records: pages and pictures, by file."""
    tables = {
        benchmark.name: [
            performance.Table(runs[0].device, runs[0].date, rows_of(benchmark, runs))
            for runs in devices_of(benchmark)
        ]
        for benchmark in BENCHMARKS
    }
    made = {PAGE: page(), PERFORMANCE: performance.page(tables)}
    for benchmark in BENCHMARKS:
        if benchmark.chart is None or not tables[benchmark.name]:
            continue
        newest = tables[benchmark.name][0]
        title = f"{benchmark.name}, {newest.device}"
        picture = charts.draw(benchmark.chart, newest.rows, title)
        if picture is not None:
            made[FOLDER / benchmark.name / PICTURE] = picture
    return made


def page() -> str:
    """Return RESULTS.md."""
    parts = [_HEAD]
    for benchmark in BENCHMARKS:
        devices = devices_of(benchmark)
        if devices:
            parts.append(section(benchmark, devices))
    missing = [benchmark for benchmark in BENCHMARKS if not devices_of(benchmark)]
    if missing:
        lines = [f"| {each.question} | `{each.command}` |" for each in missing]
        parts.append("## Not recorded yet\n\n| question | command |\n|---|---|")
        parts[-1] += "\n" + "\n".join(lines) + "\n"
    known = {benchmark.name for benchmark in BENCHMARKS}
    for stray in sorted(each.name for each in FOLDER.iterdir() if each.is_dir()):
        if stray not in known:
            raise SystemExit(f"benchmarks/results/{stray} has no entry in benchmarks/catalogue.py")
    for written in sorted(FOLDER.glob("*.md"), reverse=True):
        title = written.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        parts.append(f"## Before\n\n[{title}](results/{written.name})\n")
    return "\n".join(parts)


def section(benchmark: Benchmark, devices: Sequence[Sequence[Run]]) -> str:
    """Return one benchmark: question, a table a device, aims, picture, command."""
    lines = [f"## `{benchmark.script or benchmark.name + '.py'}`\n", f"{benchmark.question}\n"]
    for runs in devices:
        newest = runs[0]
        versions = ", ".join(f"{name} {version}" for name, version in newest.versions.items())
        dates = sorted({run.date for run in runs})
        when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        about = f"{when}, {plural(len(runs), 'run')}, {versions}.{busy(runs)}"
        lines.append(f"**{newest.device}**, {about}\n")
        table = rows_of(benchmark, runs)
        lines += [*table_lines(benchmark, table), ""]
        for aim in benchmark.aims:
            spoken = [cells for cells in table if aim.applies(cells[-1])]
            if spoken:
                good = sum(all(aim.met(each) for each in cells) for cells in spoken)
                verdict = "met" if good == len(spoken) else f"met in {good} of {len(spoken)}"
                lines.append(f"- Aim, {aim.words}: **{verdict}**.")
        lines += [""] if benchmark.aims else []
    newest = rows_of(benchmark, devices[0])
    if benchmark.chart is not None and charts.draw(benchmark.chart, newest, "") is not None:
        lines.append(f"![{benchmark.name}](results/{benchmark.name}/{PICTURE})\n")
    lines.append(f"    {benchmark.command}\n")
    return "\n".join(lines)


def busy(runs: Sequence[Run]) -> str:
    """Say how busy a CPU was beside the benchmark, where that is known."""
    loads = [run.settings["load"] for run in runs if "load" in run.settings]
    if not loads or "threads" not in runs[0].device:
        return ""
    return f" Processes that wanted a processor meanwhile: {spread(loads, 1)}."


def rows_of(benchmark: Benchmark, runs: Sequence[Run]) -> list[list[Cells]]:
    """Return the rows of a table, each with what every run found for it, oldest run first."""
    keys = [column.title for column in benchmark.columns if column.key]
    found: dict[tuple[object, ...], list[Cells]] = {}
    for run in reversed(runs):
        for cells in benchmark.cells(run):
            key = tuple(
                round(cells[title], 3) if isinstance(cells[title], float) else cells[title]
                for title in keys
            )
            found.setdefault(key, []).append(cells)
    return list(found.values())


def table_lines(benchmark: Benchmark, rows: Sequence[Sequence[Cells]]) -> list[str]:
    """Return a table in Markdown."""
    titles = [column.title for column in benchmark.columns]
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for cells in rows:
        words = []
        for column in benchmark.columns:
            values = [each[column.title] for each in cells]
            named = column.key and isinstance(values[-1], str)
            numbers = [] if named else [float(value) for value in values]
            words.append(str(values[-1]) if named else spread(numbers, column.digits))
        lines.append(f"| {' | '.join(words)} |")
    return lines


def plural(count: int, word: str) -> str:
    """Write a count."""
    return f"{count} {word}{'s' if count != 1 else ''}"


def main() -> int:
    """Keep runs, write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--add", type=Path, nargs="+", default=[], metavar="RECORD")
    for path in parser.parse_args().add:
        if kept := add(path):
            print(kept.relative_to(ROOT))
    for path, text in pages().items():
        write_text(path, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
