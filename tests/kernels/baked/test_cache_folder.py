"""Whose cached kernels are run, who can read them, and what becomes of damage and leftovers."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import marshal
import os
import pwd
import shutil
import stat
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from calibatt_compiler import options
from calibatt_compiler.errors import FileError
from calibatt_compiler.kernels.baked import cache, cache_folder
from calibatt_compiler.kernels.baked.cover import EXACT, CoverError, CoverLimits
from calibatt_compiler.plan.pattern import BlockPattern

NOBODY = 65534
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="plays two users")


@pytest.fixture(autouse=True)
def folders(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path]]:
    """The chosen and the private folder, and nothing remembered of others."""
    # Where other users come, too.
    common = Path(tempfile.mkdtemp())
    common.chmod(0o755)
    chosen, private = common / "cache", common / "private"
    monkeypatch.setenv("CALIBATT_CACHE_DIR", str(chosen))
    monkeypatch.setattr(cache_folder, "fallback_dir", lambda: private)
    memories = (cache_folder.private_dir, cache_folder._say, cache_folder._sweep_once)
    for memory in (*memories, cache._load_module):
        memory.cache_clear()
    yield chosen, private
    shutil.rmtree(common)
    for memory in (*memories, cache._load_module):
        memory.cache_clear()


@pytest.fixture
def pattern() -> BlockPattern:
    return BlockPattern.from_mask(torch.eye(8, dtype=torch.bool)[None], block=(128, 128))


@pytest.fixture
def masked() -> Iterator[Callable[[int], None]]:
    """Set the mask of permissions for a test."""
    before = os.umask(0o022)
    yield lambda mask: os.umask(mask) and None
    os.umask(before)


def as_user(user: int, work: Callable[[], object]) -> str:
    """Do something as another user, in a process of its own; return what it returns as text."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setegid(user)
            os.seteuid(user)
            said = str(work())
        except BaseException as error:  # it must not return into the tests
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as opened:
        return opened.read()


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o000, 0o077])
def test_entries_are_for_all_who_may_read_and_nobody_else_writes(
    pattern: BlockPattern, masked: Callable[[int], None], mask: int, folders: tuple[Path, Path]
) -> None:
    masked(mask)
    entry = cache.get_entry(pattern)
    for path in (folders[0], entry.folder, entry.source_path, entry.folder / cache.ENTRY):
        mode = stat.S_IMODE(path.stat().st_mode)
        wanted = 0o777 if path.is_dir() else 0o666
        assert mode == wanted & ~mask & ~0o022, f"{path.name} {mode:o}"


@root_only
def test_a_cache_that_root_filled_serves_other_users(pattern: BlockPattern) -> None:
    entry = cache.get_entry(pattern)
    found = as_user(NOBODY, lambda: cache.find_entry(pattern, EXACT).folder)  # type: ignore[union-attr]
    assert found == str(entry.folder)


@root_only
def test_what_another_user_wrote_is_not_run(
    pattern: BlockPattern, folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    chosen, private = folders
    chosen.mkdir()
    os.chown(chosen, NOBODY, NOBODY)
    planted = as_user(NOBODY, lambda: cache.get_entry(pattern).folder)
    assert planted.startswith(str(chosen))
    with caplog.at_level(logging.WARNING, "calibatt"):
        entry = cache.get_entry(pattern)
    assert entry.folder.parent == private
    assert f"{chosen} is not used (it belongs to user {NOBODY}); {private} is" in caplog.text
    # Nor is an entry of theirs in a folder of root's.
    os.chown(chosen, 0, 0)
    cache_folder._say.cache_clear()
    again = cache.get_entry(pattern)
    assert again.folder.parent == private


@root_only
def test_an_entry_that_can_t_be_read_is_made_elsewhere(
    pattern: BlockPattern, folders: tuple[Path, Path]
) -> None:
    chosen, private = folders
    cache.get_entry(pattern).folder.chmod(0o700)
    private.mkdir()
    os.chown(private, NOBODY, NOBODY)
    place = as_user(NOBODY, lambda: cache.get_entry(pattern).folder.parent)
    assert place == str(private)
    assert as_user(NOBODY, lambda: cache.get_entry(pattern).folder.parent) == str(private)
    assert cache.get_entry(pattern).folder.parent == chosen


@pytest.mark.parametrize("mode", [0o777, 0o757, 0o775])
@pytest.mark.parametrize("which", ["folder", "entry", "source"])
def test_what_others_can_write_is_not_run(
    pattern: BlockPattern,
    folders: tuple[Path, Path],
    which: str,
    mode: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cache_folder, "_own_group", lambda group: False)
    entry = cache.get_entry(pattern)
    path = {"folder": folders[0], "entry": entry.folder, "source": entry.source_path}[which]
    path.chmod(mode)
    made = cache.get_entry(pattern)
    # In a folder that is trusted the entry is made anew, else in another folder.
    assert made.folder.parent == folders[which == "folder"]
    assert all(cache_folder.distrust(p) is None for p in (made.folder, made.source_path))


def test_a_group_of_the_user_s_own_may_write(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders[0].mkdir()
    folders[0].chmod(0o775)
    monkeypatch.setattr(cache_folder, "_own_group", lambda group: True)
    assert cache_folder.distrust(folders[0]) is None
    folders[0].chmod(0o777)
    assert cache_folder.distrust(folders[0]) is not None


def test_byte_code_beside_a_source_is_not_run(pattern: BlockPattern, tmp_path: Path) -> None:
    entry = cache.get_entry(pattern)
    code = compile(f"open({str(tmp_path / 'ran')!r}, 'w').write('x')", "kernel.py", "exec")
    found = entry.source_path.stat()
    place = Path(importlib.util.cache_from_source(os.fspath(entry.source_path)))
    place.parent.mkdir()
    head = struct.pack("<III", 0, int(found.st_mtime), found.st_size)
    place.write_bytes(importlib.util.MAGIC_NUMBER + head + marshal.dumps(code))
    assert cache.load_kernel(entry) is not None
    assert not (tmp_path / "ran").exists()


def test_a_source_changed_after_its_check_is_not_run(pattern: BlockPattern) -> None:
    entry = cache.get_entry(pattern)
    text = entry.source_path.read_text()
    entry.source_path.write_text(text + "\nraise SystemExit\n")
    with pytest.raises(ValueError, match="checksum"):
        cache.load_kernel(entry)
    entry.source_path.write_text(text)
    kernel = cache.load_kernel(entry)
    entry.source_path.write_text("x = 1\n")
    assert kernel.src in text, "Triton compiles the text that was checked"


def rewrite(entry: cache.CacheEntry, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the record of an entry, with a checksum that fits."""
    path = entry.folder / cache.ENTRY
    record = json.loads(json.loads(path.read_text())["record"])
    text = json.dumps(change(record) or record)
    path.write_text(
        json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "record": text})
    )


def deep(record: dict[str, Any]) -> None:
    record["cover"]["forms"] = [[[0, 8, [[0, 0, 0, 10**40]]]]]


DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "numbers past 64 bits": deep,
    "no cover": lambda r: r.update(cover=None),
    "a list": lambda r: [1],
    "a text": lambda r: "declined",
    "many rows": lambda r: r["cover"].update(query_blocks=10**9),
    "many columns": lambda r: r["cover"].update(key_blocks=10**9),
    "many forms": lambda r: r["cover"].update(forms=r["cover"]["forms"] * 10_000),
    "infinite rows": lambda r: r["cover"].update(query_blocks=float("inf")),
    "a segment without end": lambda r: r["cover"].update(forms=[[[0, 10**12, []]]]),
    "no head": lambda r: r["cover"].update(head_forms=[]),
    "another head": lambda r: r["cover"].update(head_forms=[5]),
    "another mask": lambda r: r["cover"]["forms"][0][0][2].pop(),
    "a checksum that is none": lambda r: r.update(source_sha256=7),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_with_a_right_checksum_is_mended(pattern: BlockPattern, damage: str) -> None:
    entry = cache.get_entry(pattern)
    whole = (entry.folder / cache.ENTRY).read_bytes()
    rewrite(entry, DAMAGE[damage])
    assert cache.find_entry(pattern, EXACT) is None
    again = cache.get_entry(pattern)
    assert (again.folder / cache.ENTRY).read_bytes() == whole
    assert [path.name for path in again.folder.parent.iterdir()] == [again.digest]


@pytest.mark.parametrize(
    "content", [b"[" * 10**6, b'{"a":' * 10**6, b"9" * 10**6, b"\xff\xfe", b"1e999", b"null", b""]
)
@pytest.mark.parametrize("name", [cache.ENTRY, "kernel.py"])
def test_files_of_anything_are_mended(pattern: BlockPattern, name: str, content: bytes) -> None:
    entry = cache.get_entry(pattern)
    (entry.folder / name).write_bytes(content)
    assert cache.find_entry(pattern, EXACT) is None
    assert cache.load_kernel(cache.get_entry(pattern)) is not None


@pytest.mark.parametrize("kind", ["file", "link", "pipe", "pipe for a file", "folder for a file"])
def test_what_is_no_entry_is_replaced(
    pattern: BlockPattern, kind: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    entry = cache.get_entry(pattern)
    entry.folder.rename(tmp_path / "moved")
    if kind == "file":
        entry.folder.write_text("x")
    elif kind == "link":
        entry.folder.symlink_to(tmp_path / "nowhere")
    elif kind == "pipe":
        os.mkfifo(entry.folder)
    elif kind == "pipe for a file":
        entry.folder.mkdir()
        os.mkfifo(entry.folder / cache.ENTRY)
        (entry.folder / "kernel.py").write_text("x")
    else:
        (entry.folder / cache.ENTRY).mkdir(parents=True)
        (entry.folder / "kernel.py").write_text("x")
    again = cache.get_entry(pattern)
    assert cache.load_kernel(again) is not None
    assert [path.name for path in folders[0].iterdir()] == [entry.digest]


def test_declined_masks_stay_declined(random_pattern: Callable[..., BlockPattern]) -> None:
    limits = CoverLimits(9, 3)
    pattern = random_pattern(heads=2, query_length=900, key_length=900)
    for _ in range(2):
        with pytest.raises(CoverError):
            cache.get_entry(pattern, limits)
    with pytest.raises(CoverError):
        cache.find_entry(pattern, limits)


def test_all_that_repair_one_entry_get_it_whole(pattern: BlockPattern) -> None:
    entry = cache.get_entry(pattern)

    def repair(_: int) -> str:
        got = cache.get_entry(pattern)
        assert (got.folder / "kernel.py").read_bytes()
        return cache._source(got.source_path, got.source_sha256)

    with ThreadPoolExecutor(8) as pool:
        for _ in range(25):
            (entry.folder / "kernel.py").write_bytes(b"damaged")
            assert len(set(pool.map(repair, range(8)))) == 1
    assert [path.name for path in entry.folder.parent.iterdir()] == [entry.digest]


def test_leftovers_of_kills_are_swept(pattern: BlockPattern, folders: tuple[Path, Path]) -> None:
    chosen = folders[0]
    chosen.mkdir(mode=0o755)
    old, young, whole = chosen / ".abc-x", chosen / ".abc-y", chosen / "0"
    for folder in (old, young, whole):
        folder.mkdir(parents=True)
        (folder / "kernel.py").write_text("")
    (chosen / ".x.tmp.json").write_text("")
    before = time.time() - 2 * cache_folder.STALE
    for path in (old, whole, chosen / ".x.tmp.json"):
        os.utime(path, (before, before))
    entry = cache.get_entry(pattern)
    assert sorted(p.name for p in chosen.iterdir()) == sorted([".abc-y", "0", entry.digest])
    left = entry.folder / ".sm_90-abc.tmp.json"
    left.write_text("")
    os.utime(left, (before, before))
    cache_folder.sweep(entry.folder)
    assert sorted(p.name for p in entry.folder.iterdir()) == [cache.ENTRY, "kernel.py"]


def test_a_cache_that_can_t_be_written_gives_way_to_a_private_one(
    pattern: BlockPattern, folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    folders[0].write_text("a file")
    with caplog.at_level(logging.WARNING, "calibatt"):
        for _ in range(2):
            entry = cache.get_entry(pattern)
            assert entry.folder.parent == folders[1]
    assert caplog.text.count(f"{folders[0]} is not used") == 1
    assert cache.find_entry(pattern, EXACT) is not None


def test_without_any_folder_it_is_an_error_of_ours(
    pattern: BlockPattern, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders[0].write_text("a file")
    monkeypatch.setattr(cache, "private_dir", lambda: folders[0])
    monkeypatch.setattr(cache_folder, "private_dir", lambda: folders[0])
    with pytest.raises(FileError, match="cache"):
        cache.get_entry(pattern)


def test_without_a_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("HOME", "CALIBATT_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(user: int) -> object:
        raise KeyError(user)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(options, "fallback_dir", lambda: tmp_path / "fallback")
    options._say_homeless.cache_clear()
    with caplog.at_level(logging.WARNING, "calibatt"):
        assert options.cache_dir() == tmp_path / "fallback"
        assert options.cache_dir() == tmp_path / "fallback"
    assert caplog.text.count("kernels are kept in") == 1
    monkeypatch.setenv("CALIBATT_DEBUG_DIR", "~/dumps")
    assert options.debug_dir() == Path("~/dumps")


def test_records_of_variants_that_are_none(pattern: BlockPattern) -> None:
    pytest.importorskip("triton")
    entry = cache.get_entry(pattern)
    for text in (
        "",
        "[]",
        "{}",
        '{"hash": 7, "name": "x"}',
        '{"hash": "../..", "name": "x"}',
        '{"hash": "a", "name": "../x"}',
        "[" * 10**5,
        '{"hash": "a", "name": "x"}',
    ):
        (entry.folder / "v.json").write_text(text)
        assert not cache.is_compiled(entry, "v")
