"""What campaigns share: options, processes, progress, and figures that `make results` shows.

A campaign draws cases until its minutes are over. Each case has a seed of its own, `SEED-WORKER-N`,
and is repeated alone by `--case`. Cases run in child processes: one that dies or hangs is a failure
of the case that it was at.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

HANGS = 900
"""Seconds after which a case is taken to hang."""
SHOWN = 30
"""Seconds between lines of progress."""

Case = Callable[[random.Random, Counter[str], argparse.Namespace], str | None]
"""Runs a case and counts what it met; returns what is wrong, its kind before a colon, or None."""


def parser_of(about: str | None) -> argparse.ArgumentParser:
    """Return the options that all campaigns have."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--out", type=Path, help="folder of campaigns.json, the figures")
    return parser


def run(
    about: str | None,
    case: Case,
    parser: argparse.ArgumentParser | None = None,
    *,
    device: str | None = None,
) -> int:
    """Run a campaign as its command line says; return its exit status.

    Args:
        about: what the script says of itself.
        case: runs one case.
        parser: from `parser_of`, with options of the campaign's own.
        device: see `finish`.
    """
    parser = parser or parser_of(about)
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--cases", type=int, help="end after so many, whatever the time")
    parser.add_argument("--case", help="run this one alone, such as 7-0-35")
    parser.add_argument("--child", nargs=2, metavar=("WORKER", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        counts: Counter[str] = Counter()
        wrong = case(random.Random(options.case), counts, options)
        print(f"{wrong or 'right'}\n{dict(counts)}")
        return int(wrong is not None)
    if options.child is not None:
        _work(case, options)
        return 0
    return _watch(options, device)


def _work(case: Case, options: argparse.Namespace) -> None:
    worker, path = int(options.child[0]), Path(options.child[1])
    counts: Counter[str] = Counter()
    end, written = time.monotonic() + 60 * options.minutes, 0.0
    most = None if options.cases is None else -(-options.cases // options.workers)
    number = 0
    while time.monotonic() < end and number != most:
        name = f"{options.seed}-{worker}-{number}"
        path.with_suffix(".case").write_text(name)
        faulthandler.dump_traceback_later(HANGS, exit=True)
        try:
            wrong = case(random.Random(name), counts, options)
        except Exception as error:
            traceback.print_exc()
            wrong = f"broken case: {type(error).__name__}: {error}"
        counts["cases"] += 1
        number += 1
        if wrong is not None:
            counts["failures"] += 1
            counts[f"FAILED {wrong.partition(':')[0]}"] += 1
            _show_failure(name, wrong)
        if time.monotonic() > written + 5:
            _write(path, counts)
            written = time.monotonic()
    faulthandler.cancel_dump_traceback_later()
    _write(path, counts)


def _write(path: Path, counts: Mapping[str, int]) -> None:
    path.with_suffix(".new").write_text(json.dumps(counts))
    path.with_suffix(".new").replace(path)


def _show_failure(name: str, wrong: str) -> None:
    own = list(sys.argv[1:])
    for option, values in (("--child", 2), ("--seed", 1), ("--minutes", 1), ("--workers", 1),
                           ("--cases", 1), ("--out", 1)):  # fmt: skip
        while option in own:
            at = own.index(option)
            del own[at : at + 1 + values]
    again = shlex.join(["python", sys.argv[0], "--case", name, *own])
    print(f"WRONG {wrong}\n  {again}", flush=True)


def _watch(options: argparse.Namespace, device: str | None) -> int:
    start, name = time.monotonic(), Path(sys.argv[0]).stem
    with tempfile.TemporaryDirectory(prefix="calibatt-campaign-") as folder:
        files = [Path(folder) / f"{worker}.json" for worker in range(options.workers)]
        children = [
            subprocess.Popen(
                [
                    sys.executable,
                    *sys.argv,
                    "--seed",
                    str(options.seed),
                    "--child",
                    str(worker),
                    str(file),
                ]
            )
            for worker, file in enumerate(files)
        ]
        print(f"{name}, seed {options.seed}, {options.workers} processes", flush=True)
        stopped, shown = False, start
        try:
            while any(child.poll() is None for child in children):
                time.sleep(0.2)
                if time.monotonic() > shown + SHOWN:
                    shown = time.monotonic()
                    counts = _sum(files)
                    took = (shown - start) / 60
                    print(
                        f"  {took:.1f} min: {counts['cases']} cases, {counts['failures']} failures",
                        flush=True,
                    )
        except KeyboardInterrupt:
            stopped = True
            for child in children:
                child.send_signal(signal.SIGKILL)
        codes = [child.wait() for child in children]
        counts = _sum(files)
        for file, code in zip(files, codes, strict=True):
            if code and not stopped:
                counts["failures"] += 1
                counts["FAILED dead process"] += 1
                last = file.with_suffix(".case")
                at = last.read_text() if last.exists() else "before the first case"
                _show_failure(at, f"dead process: status {code}")
    minutes = (time.monotonic() - start) / 60
    return finish(name, options, counts, minutes, workers=options.workers, device=device)


def _sum(files: list[Path]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for file in files:
        if file.exists():
            counts.update(json.loads(file.read_text()))
    return counts


def finish(
    name: str,
    options: argparse.Namespace,
    counts: Mapping[str, int],
    minutes: float,
    *,
    workers: int = 1,
    device: str | None = None,
) -> int:
    """Print the figures of a campaign, write them where that is asked for, return its exit status.

    Args:
        name: of the campaign.
        options: with `seed` and `out`.
        counts: with `cases` and `failures`.
        minutes: that it ran.
        workers: processes.
        device: that was tested; None: the processor.
    """
    said = {key: value for key, value in sorted(counts.items()) if value}
    print(f"{name}, seed {options.seed}, {minutes:.1f} minutes:")
    print("\n".join(f"  {value:7d} {key}" for key, value in said.items()), flush=True)
    if options.out is not None:
        row = {
            "campaign": name,
            "cases": counts.get("cases", 0),
            "failures": counts.get("failures", 0),
            "minutes": round(minutes, 1),
            "workers": workers,
            "seed": options.seed,
            "counts": said,
        }
        _record(options.out / "campaigns.json", row, device)
    return int(counts.get("failures", 0) > 0)


def _record(path: Path, row: dict[str, Any], device: str | None) -> None:
    """Write a record, with the rows of other campaigns that are there."""
    import torch
    from record import read_record, write_record

    from calibatt_compiler.evaluation.comparison import device_name
    from calibatt_compiler.version import VERSION

    on = device or device_name(torch.device("cpu"))
    rows: list[dict[str, Any]] = []
    if path.is_file():
        before = read_record(path)
        if before.device == on:
            rows = [each for each in before.rows if each["campaign"] != row["campaign"]]
    write_record(path, on, [*rows, row], version=VERSION)
