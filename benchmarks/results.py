"""Keep records of benchmarks, and write RESULTS.md from them.

    python benchmarks/results.py --add results/*.json    keep runs, then write the page
    python benchmarks/results.py                         write the page

A record lies in benchmarks/results/<benchmark>/<device>.json: the last runs on that device, newest
first. The page is made of these files and `catalogue.py` alone; a test holds them together.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from catalogue import BENCHMARKS, Benchmark, Cells
from record import Run, read_record

from calibatt_compiler.files import write_text

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "results"
PAGE = ROOT / "benchmarks" / "RESULTS.md"
KEPT = 5
"""Runs kept of a benchmark on a device."""

_HEAD = """\
# Results

Made from the records in `benchmarks/results` by `make results`; not to be edited. Ratios and times
are measured side by side in one process, medians of repeated rounds; where a benchmark was run more
than once on a device, the least and the greatest of the last runs. What misses its aim stands here.
"""


def add(path: Path) -> Path:
    """Keep a run with those before it; return the file that holds them."""
    run = read_record(path)
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


def page() -> str:
    """Return RESULTS.md."""
    parts = [_HEAD]
    for benchmark in BENCHMARKS:
        files = sorted((FOLDER / benchmark.name).glob("*.json"))
        if files:
            parts.append(section(benchmark, [runs_of(file) for file in files]))
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
    lines = [f"## `{benchmark.name}.py`\n", f"{benchmark.question}\n"]
    for runs in devices:
        newest = runs[0]
        versions = ", ".join(f"{name} {version}" for name, version in newest.versions.items())
        dates = sorted({run.date for run in runs})
        when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        lines.append(f"**{newest.device}**, {when}, {plural(len(runs), 'run')}, {versions}.\n")
        table = rows_of(benchmark, runs)
        lines += [*table_lines(benchmark, table), ""]
        for aim in benchmark.aims:
            spoken = [cells for cells in table if aim.applies(cells[-1])]
            if spoken:
                good = sum(all(aim.met(each) for each in cells) for cells in spoken)
                verdict = "met" if good == len(spoken) else f"met in {good} of {len(spoken)}"
                lines.append(f"- Aim, {aim.words}: **{verdict}**.")
        lines += [""] if benchmark.aims else []
    if benchmark.picture and (ROOT / benchmark.picture).is_file():
        lines.append(f"![{benchmark.name}](../{benchmark.picture})\n")
    lines.append(f"    {benchmark.command}\n")
    return "\n".join(lines)


def rows_of(benchmark: Benchmark, runs: Sequence[Run]) -> list[list[Cells]]:
    """Return the rows of a table, each with what every run found for it, oldest run first."""
    keys = [column.title for column in benchmark.columns if column.key]
    found: dict[tuple[object, ...], list[Cells]] = {}
    for run in reversed(runs):
        for row in run.rows:
            for cells in benchmark.cells(row):
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
            words.append(str(values[-1]) if column.key and isinstance(values[-1], str) else
                         spread([float(value) for value in values], column.digits))  # fmt: skip
        lines.append(f"| {' | '.join(words)} |")
    return lines


def spread(values: Sequence[float], digits: int) -> str:
    """Write the least and the greatest of numbers, or one if they look alike."""
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return ""
    low, high = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def plural(count: int, word: str) -> str:
    """Write a count."""
    return f"{count} {word}{'s' if count != 1 else ''}"


def main() -> int:
    """Keep runs, write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--add", type=Path, nargs="+", default=[], metavar="RECORD")
    for path in parser.parse_args().add:
        print(add(path))
    write_text(PAGE, page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
