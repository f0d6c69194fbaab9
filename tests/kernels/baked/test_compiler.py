"""The kernel cache and the compiling processes: shared work, damage, deaths, kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.baked import cache, compiler
from calibatt_compiler.kernels.baked.compiler import KernelCompiler, KernelSpec
from calibatt_compiler.kernels.baked.cover import CoverLimits, denotes
from calibatt_compiler.kernels.baked.worker import decode_pattern, encode_pattern
from calibatt_compiler.kernels.portable.launch import launch_config
from calibatt_compiler.kernels.portable.tiles import TileSettings
from calibatt_compiler.plan.copies import AnchorRows
from calibatt_compiler.plan.order import TokenOrder
from calibatt_compiler.plan.pattern import BlockPattern

LIMITS = CoverLimits(512, 8)


@pytest.fixture
def pattern(random_pattern: Callable[..., BlockPattern]) -> BlockPattern:
    return random_pattern(heads=2, query_length=300, key_length=250)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CALIBATT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fake_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str
) -> Callable[[], list[str]]:
    """Put a script in the place of the compiling process; return a reader of its diary."""
    script, diary = tmp_path / "worker.py", tmp_path / "diary"
    script.write_text(
        "import json, os, sys, time\n"
        f"diary = open({str(diary)!r}, 'a', buffering=1)\n"
        "GOOD = dict(ok=True, digest='d', variant='v', source_path='p',\n"
        "            seconds=0.1, cached=False)\n"
        "for line in sys.stdin:\n"
        "    job = json.loads(line)\n"
        "    diary.write(f\"{job['head_dim']}\\n\")\n"
        f"    {body}\n"
        "    print(json.dumps(answer), flush=True)\n"
    )
    start = subprocess.Popen

    def popen(command: list[str], **settings: object) -> subprocess.Popen[bytes]:
        return start([command[0], str(script)], **settings)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(compiler.subprocess, "Popen", popen)
    return lambda: diary.read_text().split() if diary.exists() else []


def specs(pattern: BlockPattern, head_dims: list[int]) -> list[KernelSpec]:
    return [KernelSpec(pattern, torch.bfloat16, head_dim, 90) for head_dim in head_dims]


def test_an_entry_is_generated_once_and_read_again(pattern: BlockPattern) -> None:
    first = cache.get_entry(pattern, LIMITS)
    stamp = first.source_path.stat().st_mtime_ns
    again = cache.get_entry(pattern, LIMITS)
    assert again.source_path.stat().st_mtime_ns == stamp
    assert again.cover == first.cover
    assert cache.get_entry(pattern, CoverLimits(600, 8)).digest != first.digest


@pytest.mark.parametrize("name", ["kernel.py", "entry.json"])
@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_damaged_entry_is_generated_again(
    pattern: BlockPattern, name: str, damage: bytes | None
) -> None:
    entry = cache.get_entry(pattern, LIMITS)
    source = entry.source_path.read_text()
    if damage is None:
        (entry.folder / name).unlink()
    else:
        (entry.folder / name).write_bytes(damage)
    assert cache.get_entry(pattern, LIMITS).source_path.read_text() == source


def test_variants_have_names_of_their_own(pattern: BlockPattern) -> None:
    where: dict[str, Any] = {"arch": 90, "dtype": torch.bfloat16}
    names = []
    for head_dim in (64, 128):
        for softmax in ("auto", "exact"):
            config = launch_config(pattern, **where, head_dim=head_dim, softmax=softmax)
            names.append(cache.variant_name(config, **where))
        names.append(cache.variant_name(config.repair(), **where))
    tiles = TileSettings(128, 64, 8, 2, registers=128)
    for settings in (tiles, replace(tiles, descriptors=True), replace(tiles, registers=None)):
        config = launch_config(pattern, **where, head_dim=64, settings=settings)
        names.append(cache.variant_name(config, **where))
    assert len(set(names)) == len(names)


def test_no_temporary_folders_stay(pattern: BlockPattern, folder: Path) -> None:
    entry = cache.get_entry(pattern, LIMITS)
    assert [path.name for path in folder.iterdir()] == [entry.digest]


def test_patterns_travel_to_the_workers_unchanged(pattern: BlockPattern) -> None:
    data = json.loads(json.dumps(encode_pattern(pattern)))
    assert decode_pattern(data).digest == pattern.digest


def test_repetitive_heads_travel_to_the_workers_and_into_the_cache(
    random_pattern: Callable[..., BlockPattern],
) -> None:
    """What a cover keeps in rows that are not computed does not count."""
    copies = AnchorRows((1, 14, 20), 3, first=7, order=TokenOrder((1, 4, 4)))
    pattern = random_pattern(
        heads=3, query_length=300, density=0.7, repetitive=(False, True, True), copies=copies
    )
    again = decode_pattern(json.loads(json.dumps(encode_pattern(pattern))))
    assert again.digest == pattern.digest
    assert again.copies == copies
    entry = cache.get_entry(pattern, LIMITS)
    assert denotes(entry.cover, pattern)
    other = replace(pattern, copies=replace(copies, first=6))
    assert cache.get_entry(other, LIMITS).digest != entry.digest


def test_equal_specs_are_compiled_once(
    pattern: BlockPattern, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diary = fake_worker(tmp_path, monkeypatch, "answer = GOOD")
    progress: list[tuple[int, int]] = []
    with KernelCompiler(workers=2) as pool:
        report = pool.build(
            specs(pattern, [64, 64, 128]), on_progress=lambda *done: progress.append(done)
        )
    assert sorted(diary()) == ["128", "64"]
    assert len(report.compiled) == 2
    assert progress[-1] == (3, 3)


def test_a_failed_kernel_is_reported_and_the_rest_compiled(
    pattern: BlockPattern, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_worker(
        tmp_path,
        monkeypatch,
        "answer = GOOD if job['head_dim'] != 66 else "
        "dict(ok=False, reason='ptxas said no', trace='')",
    )
    with KernelCompiler(workers=1) as pool:
        report = pool.build(specs(pattern, [64, 66, 128]))
        assert len(report.compiled) == 2
        assert "ptxas said no" in report.failed[pattern.digest]
        assert "ptxas said no" in pool.failures[pattern.digest]
        with pytest.raises(KernelError, match="could not be compiled"):
            pool.submit(specs(pattern, [66])[0]).result()


def test_a_worker_that_dies_takes_one_kernel_with_it(
    pattern: BlockPattern, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_worker(tmp_path, monkeypatch, "answer = GOOD if job['head_dim'] != 66 else os._exit(9)")
    with KernelCompiler(workers=1) as pool:
        report = pool.build(specs(pattern, [66, 64]))
    assert len(report.compiled) == 1
    assert "status 9" in report.failed[pattern.digest]


def test_a_worker_that_hangs_is_given_up(
    pattern: BlockPattern, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_worker(
        tmp_path,
        monkeypatch,
        "answer = GOOD if job['head_dim'] != 66 else time.sleep(600)",
    )
    with KernelCompiler(workers=1, timeout=2) as pool:
        report = pool.build(specs(pattern, [66]))
    assert "longer than 2 s" in report.failed[pattern.digest]


def test_a_closed_compiler_cancels_its_queue_and_takes_no_more(
    pattern: BlockPattern, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_worker(tmp_path, monkeypatch, "time.sleep(0.3); answer = GOOD")
    pool = KernelCompiler(workers=1)
    first, *rest = (pool.submit(spec) for spec in specs(pattern, [64, 66, 68]))
    while not first.running() and not first.done():
        time.sleep(0.01)
    pool.close()
    assert first.result(timeout=30).digest == "d"
    assert all(future.cancelled() for future in rest)
    with pytest.raises(KernelError, match="closed"):
        pool.submit(specs(pattern, [70])[0])


def test_kill_9_while_entries_are_written_leaves_whole_ones_only(
    folder: Path, random_pattern: Callable[..., BlockPattern]
) -> None:
    script = (
        "import torch\n"
        "from calibatt_compiler.kernels.baked.cache import get_entry\n"
        "from calibatt_compiler.kernels.baked.cover import CoverLimits\n"
        "from calibatt_compiler.plan.pattern import BlockPattern\n"
        "print('go', flush=True)\n"
        "for seed in range(10**6):\n"
        "    draw = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(seed))\n"
        "    mask = (draw < 0.5) | torch.eye(4).bool()\n"
        "    get_entry(BlockPattern.from_mask(mask), CoverLimits(512, 8))\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env={**os.environ}
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"go\n"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(list(folder.glob("[!.]*"))) < 5:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    entries = list(folder.glob("[!.]*"))
    assert len(entries) >= 5
    for entry in entries:
        record = json.loads(json.loads((entry / "entry.json").read_text())["record"])
        assert len(record["source_sha256"]) == 64
        compile((entry / "kernel.py").read_text(), "kernel.py", "exec")
