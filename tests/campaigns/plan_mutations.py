"""Changes plan files at random, with digests that fit, and reads them; prints what goes wrong.

Each file must be refused by an error of ours or be read, shown, drawn and written again alike, in
bounded memory and time.

python tests/campaigns/plan_mutations.py --minutes 5 --seed 7
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import random
import re
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from campaign import finish, parser_of
from plan_files import deflate, read_plan, write_plan

from calibatt_compiler.errors import CalibattError, PlanFormatError
from calibatt_compiler.plan import BlockPattern, Plan, Sampler, SitePatterns, file
from calibatt_compiler.plan.copies import AnchorRows
from calibatt_compiler.plan.order import TokenOrder
from calibatt_compiler.plan.stored import StoredPatterns, pattern_of
from calibatt_compiler.plan.zones import ZonePattern
from calibatt_compiler.report import inspect
from calibatt_compiler.terminal import PlainConsole

MOST_MEGABYTES, MOST_SECONDS = 900, 60.0
"""What a file may take. Patterns drawn from zones take most: their files are small by nature."""

GRID = (3, 4, 8)
Content = tuple[dict[str, Any], dict[str, Any], dict[str, bytes]]


def plans() -> Iterator[Plan]:
    """A plan of each form."""
    torch.manual_seed(3)

    def mask(heads: int = 2, blocks: int = 6) -> torch.Tensor:
        draw = torch.rand(heads, blocks, blocks) < 0.5
        return draw | torch.eye(blocks, dtype=torch.bool)

    def patterns(**more: Any) -> list[BlockPattern]:
        return [BlockPattern.from_mask(mask(), block=(16, 16), **more) for _ in range(3)]

    def plan(sites: dict[str, SitePatterns], **more: Any) -> Plan:
        sampler = Sampler(name="Euler", timesteps=(900.0, 500.0, 100.0), sigmas=(1.0, 0.5, 0.1))
        return Plan.create(sites, grid=GRID, sampler=sampler, quality={"psnr": 30.0}, **more)

    plain = patterns()
    two = {"a": SitePatterns.share(plain), "b": SitePatterns.share([plain[1], plain[1], plain[0]])}
    yield plan(two)
    weight = 1 + 3 * torch.rand(2, 6, 6)
    yield plan({"a": SitePatterns.share(patterns(weight=weight))})
    yield plan({"a": SitePatterns.share(patterns(pooled=4), head_dim=64)})
    order = TokenOrder.parse("1x2x4")
    copies = AnchorRows(GRID, 2, 0, order)
    flags = np.array([True, False])
    rows = patterns(repetitive=flags, copies=copies)
    yield plan({"a": SitePatterns.share(rows)}, token_order=order)
    text = [BlockPattern.from_mask(mask(2, 7), query_length=105, key_length=105, block=(16, 16))]
    yield plan({"a": SitePatterns.share(text * 3)}, text_policy="dense_last")
    octaves = torch.randint(0, 4, (2, 6, 6))
    octaves[:, torch.arange(6), torch.arange(6)] = 0
    zones = [ZonePattern.from_octaves(octaves, block=(16, 16), seed=seed) for seed in (5, 5)]
    yield plan({"a": SitePatterns.of_zones(zones, (0, 1, 1))})


VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 15, 16, 17, 255, 256, 1024, 4096, 1 << 20, 1 << 24, 1 << 31,
    1 << 63, 10**30, 0.5, 1.5, -0.0, 1e-300, 1e308, float("nan"), float("inf"), "", "a", "b", "raw",
    "deflate", "gaps", "bits", "kept_weights", "repetitive", "mixed", "blocks", "raster", "2x8x8",
    "2xallx8", "dense_first", "dense_last", "in_mask", "0" * 64, "[/]", "\x1b]52;c;x\x07",
    "\ud800", "x" * 501, "x" * 10_000, [], {}, [[]], [0] * 100, {"a": {}}, [1.0, float("nan")],
]  # fmt: skip


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Ways to all values within a JSON value."""
    if way:
        yield way
    steps = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in steps:
        if isinstance(inner, (dict, list)):
            yield from places(inner, (*way, key))
        else:
            yield (*way, key)


def change_value(value: Any, draw: random.Random) -> str:
    """Change one place of a JSON value; return what was done."""
    ways = list(places(value))
    if not ways:
        return "nothing"
    *way, last = draw.choice(ways)
    holder = value
    for key in way:
        holder = holder[key]
    old = holder[last]
    how = draw.choice(("set", "set", "delete", "double", "near", "swap"))
    if how == "delete":
        del holder[last]
    elif how == "double" and isinstance(holder, list):
        holder.insert(last, copy.deepcopy(old))
    elif how == "near" and isinstance(old, (int, float)) and not isinstance(old, bool):
        holder[last] = draw.choice((old + 1, old - 1, old * 2, -old, old // 2, old * 1000))
    elif how == "swap" and isinstance(holder, list) and len(holder) > 1:
        holder[last], holder[0] = holder[0], holder[last]
    else:
        holder[last] = copy.deepcopy(draw.choice(VALUES))
    return f"{how} {'.'.join(map(str, (*way, last)))}"


def change_code(content: Content, draw: random.Random) -> str:
    """Change a tensor, mostly so that its parts still are as long as the index says."""
    _, entries, codes = content
    name = draw.choice(sorted(codes)) if codes else None
    if name is None or not isinstance(entries.get(name), list):
        return "nothing"
    how = draw.choice(("bits", "bits", "bytes", "other code", "large code", "cut", "more"))
    data = bytearray(codes[name])
    if how == "bits" and data:
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif how == "bytes" and data:
        data[draw.randrange(len(data))] = draw.randrange(256)
    elif how in ("other code", "large code"):
        return f"{how} {recode(content, name, draw, large=how == 'large code')}"
    elif how == "cut":
        del data[draw.randrange(len(data) + 1) :]
    else:
        data += draw.randbytes(draw.randint(1, 40))
    codes[name] = bytes(data)
    return f"{how} of {name}"


def recode(content: Content, name: str, draw: random.Random, *, large: bool) -> str:
    """Write one array in another code, of other bytes, with its length in the index."""
    _, entries, codes = content
    at, parts = 0, []
    for pattern in entries[name]:
        for entry in pattern:
            length = entry[2] if isinstance(entry, list) and len(entry) == 3 else None
            if not isinstance(length, int) or not 0 <= length <= len(codes[name]):
                return "nothing"
            parts.append((entry, codes[name][at : at + length]))
            at += length
    if not parts:
        return "nothing"
    chosen = draw.randrange(len(parts))
    entry, old = parts[chosen]
    size = draw.choice((1 << 20, 1 << 26)) if large else draw.randint(0, 2 * len(old) + 8)
    fill = bytes([draw.choice((0, 1, 254, 255))]) * size if large else draw.randbytes(size)
    new = draw.choice((deflate, bytes) if not large else (deflate,))(fill)
    entry[1] = draw.choice(("raw", "deflate", "gaps", "deflate/previous", "gaps/previous"))
    entry[2] = len(new)
    parts[chosen] = (entry, new)
    codes[name] = b"".join(code for _, code in parts)
    return f"{entry[1]} of {name}"


def fit_digests(content: Content) -> None:
    """Make digests and densities of the record those of the patterns, where these decode."""
    record, entries, codes = content
    for site in record["sites"]:
        name = site["name"]
        stored = StoredPatterns(
            file._size(file.PlanMetadata.model_validate_json(json.dumps(record)), _record(site)),
            np.frombuffer(codes[name], np.uint8),
            tuple(tuple(map(tuple, pattern)) for pattern in entries[name]),
            (), (), (),
        )  # fmt: skip
        arrays: dict[str, Any] = {}
        digests, densities = [], []
        for index in range(len(stored)):
            arrays = stored._arrays(index, arrays if stored._relative(index) else {})
            shapes = file.layout(stored.size)
            shaped = {
                each: data.view(shapes[each][0]).reshape(shapes[each][1])
                for each, data in arrays.items()
            }
            pattern = pattern_of(stored.size, shaped)
            digests.append(pattern.digest)
            densities.append(pattern.density)
        site["digests"] = digests
        site["density"] = [densities[step] for step in site["steps"]]


def _record(site: dict[str, Any]) -> file.SiteRecord:
    return file.SiteRecord.model_validate_json(json.dumps(site))


def write(path: Path, content: Content, draw: random.Random) -> str:
    """Write a plan file, now and then with a header of another form; return what was done."""
    record, entries, codes = content
    more = draw.choice(
        [""] * 12 + ['"a":1,', '"x":{"dtype":"F64","shape":[0],"data_offsets":[0,0]},']
    )
    text: Any = json.dumps(record)
    how = draw.choice(["plain"] * 20 + ["twice", "deep", "cut", "spaces"])
    if how == "twice":
        text = text[:-1] + ',"schema_version":3}'
    elif how == "deep":
        text = text[:-1] + ',"x":' + "[" * 3000 + "]" * 3000 + "}"
    elif how == "cut":
        text = text[: draw.randrange(len(text))]
    elif how == "spaces":
        text = text.replace(",", " , ").replace("[", "\n[")
    index = json.dumps({name: {"sha256": "?", "patterns": each} for name, each in entries.items()})
    if how == "plain":
        write_plan(path, text, codes, entries, more)
    else:
        write_plan(path, text, codes, entries if draw.random() < 0.8 else index, more)
    return "" if how == "plain" and not more else f"{how} {more}"


def peak(name: str) -> int:
    """Megabytes of this process."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{name}:\s+(\d+) kB", status)
    return int(found[1]) // 1024 if found else 0


def use(path: Path) -> str:
    """Read a plan and do all that needs no model with it; return what became of it.

    Raises:
        CalibattError: it was refused.
        AssertionError: it contradicts itself.
    """
    plan = Plan.load(path)
    again = path.with_name("again")
    try:
        for site in plan.sites.values():
            for step in range(plan.steps):
                pattern = site.at(step)
                assert math.isclose(pattern.density, site.density_at(step), abs_tol=1e-12)
                assert pattern.kept == site.kept_at(step) > 0
                assert (pattern.numpy_mask().any(-1) == pattern.computed_rows()).all()
                if pattern.kept < 1 << 16:
                    runs = pattern.intervals()
                    assert int((runs.ends - runs.starts).sum()) == pattern.kept
    except PlanFormatError:
        return "refused when decoded"
    except CalibattError:
        return "refused when made"
    console = PlainConsole()
    console.file = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    with console.file:
        console.print(inspect.terminal(plan))
        json.dumps(inspect.to_dict(plan))
    plan.save(again)
    assert Plan.load(again) == plan, "it comes back as another"
    return "read"


def main() -> None:
    arguments = parser_of(__doc__).parse_args()
    logging.getLogger("calibatt").setLevel(logging.ERROR)
    seed = arguments.seed
    draw, counts = random.Random(seed), Counter[str]()
    most_megabytes, most_seconds = 0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "p"
        bases: list[Content] = []
        for plan in plans():
            plan.save(path)
            bases.append(read_plan(path))
        end = time.monotonic() + 60 * arguments.minutes
        while time.monotonic() < end:
            content = copy.deepcopy(draw.choice(bases))
            record, entries, _ = content
            done = []
            for _ in range(draw.choice((1, 1, 1, 2, 3))):
                changes: list[Callable[[], str]] = [
                    lambda record=record: change_value(record, draw),
                    lambda entries=entries: change_value(entries, draw),
                    lambda content=content: change_code(content, draw),
                ]
                try:
                    done.append(draw.choices(changes, (3, 1, 5))[0]())
                except (TypeError, KeyError, IndexError, AttributeError, ValueError, OverflowError):
                    done.append("what was changed before does not fit")
            if draw.random() < 0.7:
                try:
                    fit_digests(content)
                    counts["with digests of its patterns"] += 1
                except Exception:
                    counts["patterns that don't decode"] += 1
            try:
                done.append(write(path, content, draw))
            except (TypeError, ValueError, AttributeError, UnicodeError, KeyError, zlib.error):
                counts["can't be written"] += 1
                continue
            counts["files"] += 1
            Path("/proc/self/clear_refs").write_text("5")
            before, began = peak("VmRSS"), time.monotonic()
            wrong = None
            try:
                outcome = use(path)
            except CalibattError as error:
                outcome = f"refused: {type(error).__name__}"
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                outcome = "wrong"
                frame = traceback.extract_tb(error.__traceback__)[-1]
                place = f"{Path(frame.filename).name}:{frame.lineno}"
                wrong = f"{type(error).__name__}: {str(error)[:200]} at {place}"
            counts[outcome] += 1
            megabytes, seconds = peak("VmHWM") - before, time.monotonic() - began
            most_megabytes, most_seconds = (
                max(most_megabytes, megabytes),
                max(most_seconds, seconds),
            )
            if megabytes > MOST_MEGABYTES or seconds > MOST_SECONDS:
                wrong = (
                    f"{megabytes} MB, {seconds:.1f} s for {path.stat().st_size} bytes ({outcome})"
                )
            if wrong is not None:
                counts["WRONG"] += 1
                kept = Path(tempfile.gettempdir()) / f"plan-mutation-{seed}-{counts['files']}"
                kept.write_bytes(path.read_bytes())
                print(f"WRONG {wrong}\n  by {'; '.join(filter(None, done))}\n  {kept}", flush=True)
    print(f"at most {most_megabytes} MB, {most_seconds:.1f} s a file")
    counts["cases"], counts["failures"] = counts["files"], counts["WRONG"]
    raise SystemExit(finish("plan_mutations", arguments, counts, arguments.minutes))


if __name__ == "__main__":
    main()
