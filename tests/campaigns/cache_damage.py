"""Damages the kernel cache at random, also while others use it; prints what goes wrong.

Whatever lies there: an entry that is found is whole, and one that is asked for is made again. A
record that is changed has a checksum that fits.

python tests/campaigns/cache_damage.py --minutes 5 --seed 7
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from campaign import finish, parser_of

from calibatt_compiler.errors import CalibattError
from calibatt_compiler.kernels.baked import cache
from calibatt_compiler.kernels.baked.cover import EXACT, CoverError, denotes
from calibatt_compiler.plan import BlockPattern

CHILD = """
import sys
from calibatt_compiler.kernels.baked.cache import get_entry
from calibatt_compiler.plan import BlockPattern
import torch
draw = torch.Generator().manual_seed(int(sys.argv[1]))
patterns = [BlockPattern.from_mask((torch.rand(1, 5, 5, generator=draw) < 0.5)
            | torch.eye(5).bool()) for _ in range(3)]
print("go", flush=True)
while True:
    for pattern in patterns:
        get_entry(pattern).source_path.write_text("damaged")
"""
VALUES: list[Any] = [
    None, True, -1, 0, 1, 7, 10**6, 10**12, 10**30, 0.5, float("nan"), float("inf"), "", "x",
    "0" * 64, [], {}, [[]], [[[0, 4, [[0, 0, 0, 4]]]]], {"declined": "x"},
]  # fmt: skip


def patterns(seed: int) -> list[BlockPattern]:
    """The patterns that CHILD takes, too."""
    draw = torch.Generator().manual_seed(seed)
    eye = torch.eye(5, dtype=torch.bool)
    return [
        BlockPattern.from_mask((torch.rand(1, 5, 5, generator=draw) < 0.5) | eye) for _ in range(3)
    ]


def change(value: Any, draw: random.Random) -> None:
    """Change one place within a JSON value."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = draw.choice(keys)
        inner = value[key]
        if isinstance(inner, (dict, list)) and inner and draw.random() < 0.8:
            value = inner
        elif draw.random() < 0.2:
            del value[key]
            return
        elif isinstance(inner, int) and draw.random() < 0.5:
            value[key] = inner + draw.choice((-1, 1, 2, 100, -(10**9)))
            return
        else:
            value[key] = copy.deepcopy(draw.choice(VALUES))
            return


def damage(folder: Path, draw: random.Random) -> str:  # noqa: PLR0912
    """Damage an entry; return how."""
    name = draw.choice((cache.ENTRY, "kernel.py"))
    path = folder / name
    how = draw.choice(
        ("record", "record", "record", "bits", "cut", "more", "deep", "delete", "delete all",
         "link", "pipe", "folder", "file", "mode", "byte code", "empty folder")
    )  # fmt: skip
    content = path.read_bytes()
    if how == "record":
        outer = json.loads((folder / cache.ENTRY).read_text())
        record = json.loads(outer["record"])
        for _ in range(draw.randint(1, 3)):
            change(record, draw)
        if "declined" in record:
            return "nothing"  # which is what an entry may say
        text = json.dumps(record)
        checksum = hashlib.sha256(text.encode()).hexdigest()
        (folder / cache.ENTRY).write_text(json.dumps({"sha256": checksum, "record": text}))
    elif how == "bits":
        data = bytearray(content)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
    elif how == "cut":
        path.write_bytes(content[: draw.randrange(len(content))])
    elif how == "more":
        path.write_bytes(content + draw.randbytes(9))
    elif how == "deep":
        path.write_bytes(draw.choice((b"[", b'{"a":', b"9")) * draw.choice((10**3, 10**6)))
    elif how == "delete":
        path.unlink()
    elif how == "mode":
        draw.choice((folder, path)).chmod(draw.choice((0o777, 0o666, 0o702)))
    elif how == "byte code":
        (folder / "__pycache__").mkdir(exist_ok=True)
        (folder / "__pycache__" / "kernel.cpython-311.pyc").write_bytes(draw.randbytes(100))
    else:
        target = draw.choice((path, folder))
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        if how == "link":
            target.symlink_to(draw.choice(("nowhere", "/dev/zero", str(target))))
        elif how == "pipe":
            os.mkfifo(target)
        elif how in ("folder", "empty folder"):
            target.mkdir()
        elif how == "file":
            target.write_bytes(draw.randbytes(30))
    return f"{how} {name}"


def check(pattern: BlockPattern, whole: dict[str, bytes]) -> None:
    """Ask for an entry and see that it is whole.

    Raises:
        AssertionError: it is not.
    """
    entry = cache.get_entry(pattern)
    source = (entry.folder / "kernel.py").read_bytes()
    assert source == whole["kernel.py"], "the source is another"
    assert denotes(entry.cover, pattern), "the mask is another"
    assert cache.load_kernel(entry) is not None
    found = cache.find_entry(pattern, EXACT)
    assert found is not None
    assert found.cover == entry.cover


def killed(seed: int, root: Path, draw: random.Random) -> None:
    """Let another process damage and mend for a while, and kill it."""
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", CHILD, str(seed)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert child.stdout is not None
    child.stdout.readline()
    time.sleep(draw.random())
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    for left in root.glob(".*"):  # which a later process sweeps, when they are old
        shutil.rmtree(left, ignore_errors=True)


def main() -> None:
    arguments = parser_of(__doc__).parse_args()
    logging.getLogger("calibatt.kernels").setLevel(logging.ERROR)
    seed = arguments.seed
    draw, counts = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "cache"
        os.environ["CALIBATT_CACHE_DIR"] = str(root)
        whole: list[tuple[BlockPattern, dict[str, bytes], Path]] = []
        for pattern in patterns(seed):
            entry = cache.get_entry(pattern)
            content = {n: (entry.folder / n).read_bytes() for n in (cache.ENTRY, "kernel.py")}
            whole.append((pattern, content, entry.folder))
        end = time.monotonic() + 60 * arguments.minutes
        while time.monotonic() < end:
            pattern, content, place = draw.choice(whole)
            how = "a kill"
            try:
                if draw.random() < 0.01:
                    killed(seed, root, draw)
                else:
                    how = damage(place, draw)
                began = time.monotonic()
                if draw.random() < 0.2:
                    with ThreadPoolExecutor(4) as pool:
                        list(pool.map(lambda _: cache.get_entry(pattern), range(4)))  # noqa: B023
                    counts["mended by four at once"] += 1
                check(pattern, content)
                for other, its, _ in whole if how == "a kill" else ():
                    check(other, its)
                assert time.monotonic() - began < 30, "it took more than 30 s"
                left = [path.name for path in root.iterdir() if path.name.startswith(".")]
                assert not left, f"left over: {left}"
            except (Exception, CoverError) as error:
                counts["WRONG"] += 1
                frame = traceback.extract_tb(error.__traceback__)[-1]
                ours = "ours, " if isinstance(error, CalibattError) else ""
                where = f"{Path(frame.filename).name}:{frame.lineno}"
                said = str(error)[:200]
                print(f"WRONG {how}: {ours}{type(error).__name__}: {said} at {where}", flush=True)
                shutil.rmtree(root)
                for again, *_ in whole:
                    cache.get_entry(again)
            counts["cases"] += 1
            counts[how.split()[0] if how != "a kill" else "kills"] += 1
    counts["failures"] = counts["WRONG"]
    raise SystemExit(finish("cache_damage", arguments, counts, arguments.minutes))


if __name__ == "__main__":
    main()
