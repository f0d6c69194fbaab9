"""Generated sources and what is known of their compiled kernels, on disk.

`<cache dir>/<digest>/` holds `kernel.py`, `entry.json` (the cover, checksums)
and one small file for each compiled variant. The digest is of the pattern, the budget and the
generator's own source, so entries never go stale. A folder is filled under a temporary name and
renamed into place: processes that race make the same bytes, and a kill leaves no half entry. Whose
entries are taken is said in `cache_folder`. The
machine code itself lies in Triton's cache (`TRITON_CACHE_DIR`), where the launch looks for it.
"""

from __future__ import annotations

import hashlib
import json
import linecache
import os
import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from calibatt_compiler.errors import FileError
from calibatt_compiler.files import naming, umask, write_text
from calibatt_compiler.kernels.baked.cache_folder import (
    FOREIGN_WRITE,
    distrust,
    locked,
    places,
    private_dir,
    remove,
    sweep,
    writable,
)
from calibatt_compiler.kernels.baked.cover import (
    EXACT,
    PORTABLE_INTERVALS,
    CoverError,
    CoverLimits,
    cover_pattern,
    denotes,
)
from calibatt_compiler.kernels.baked.cover_template import Cover
from calibatt_compiler.kernels.baked.source import ENTRY_POINT, generate
from calibatt_compiler.kernels.portable.launch import LaunchConfig
from calibatt_compiler.kernels.request import Target
from calibatt_compiler.logs import logger
from calibatt_compiler.options import cache_dir
from calibatt_compiler.plan.pattern import BlockPattern

log = logger("kernels")

ENTRY = "entry.json"

LARGEST = 1 << 24
"""Bytes above which a file of an entry is taken for damage: the longest sources take 0.2 MB."""

_GENERATOR = (
    "common/row_copies.py",
    "baked/cover.py",
    "baked/cover_merge.py",
    "baked/cover_template.py",
    "baked/source_templates.py",
    "baked/source.py",
    "baked/source_zones.py",
    "common/zone_table.py",
    "portable/index_tables.py",
    "portable/primitives.py",
    "portable/kernel.py",
    "portable/zone_walk.py",
    "hopper/primitives.py",
    "hopper/arguments.py",
    "hopper/aggregates.py",
    "hopper/consumer.py",
    "hopper/loads.py",
    "hopper/transport.py",
    "hopper/kernel.py",
)
"""What generated source is made by or calls, below `kernels/`."""


@dataclass(frozen=True)
class SourceEntry:
    """One generated module.

    Attributes:
        digest: key of the entry.
        folder: where it lies.
        source_sha256: checksum of the generated module.
        target: whose source it is.
        entry_point: name of the function that is taken from it.
    """

    digest: str
    folder: Path
    source_sha256: str
    target: Target
    entry_point: str

    @property
    def source_path(self) -> Path:
        """The generated module."""
        return self.folder / "kernel.py"


@dataclass(frozen=True)
class CacheEntry(SourceEntry):
    """One generated kernel.

    Attributes:
        cover: the pattern as intervals.
    """

    cover: Cover


@cache
def generator_version() -> str:
    """Hash of the source that covers, generates and is called from generated code."""
    h = hashlib.sha256()
    kernels = Path(__file__).parents[1]
    for name in _GENERATOR:
        h.update((kernels / name).read_bytes())
    return h.hexdigest()


def entry_digest(pattern: BlockPattern, limits: CoverLimits, target: Target = "portable") -> str:
    """Key of the entry that serves `pattern` under these limits."""
    key = f"{target} {pattern.digest} {limits} {generator_version()}"
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def find_entry(
    pattern: BlockPattern, limits: CoverLimits, target: Target = "portable"
) -> CacheEntry | None:
    """Return the entry of `pattern` if a whole one lies in the cache.

    Raises:
        CoverError: what lies there says that the pattern can't be covered within the limits.
    """
    digest = entry_digest(pattern, limits, target)
    for place in places():
        entry = _load(pattern, digest, place / digest, target)
        if entry is not None:
            return entry
    return None


def get_entry(
    pattern: BlockPattern, limits: CoverLimits = EXACT, target: Target = "portable"
) -> CacheEntry:
    """Return the entry of `pattern`, generated now unless a whole one lies in the cache.

    Raises:
        KernelError: the pattern can't be covered within the limits.
        FileError: no cache folder can be written.
    """
    found = find_entry(pattern, limits, target)
    if found is not None:
        return found
    digest = entry_digest(pattern, limits, target)
    if target == "portable":
        limits = replace(limits, intervals=min(limits.intervals, PORTABLE_INTERVALS))
    try:
        cover = cover_pattern(pattern, limits)
    except CoverError as error:
        _keep(pattern, digest, target, {"declined": error.problem}, "")
        raise
    source = generate(cover, pattern, target)
    record: dict[str, object] = {
        "source_sha256": hashlib.sha256(source.encode()).hexdigest(),
        "cover": cover.to_json(),
    }
    entry = _keep(pattern, digest, target, record, source)
    assert entry is not None
    return entry


def _keep(
    pattern: BlockPattern, digest: str, target: Target, record: dict[str, object], source: str
) -> CacheEntry | None:
    """Write an entry, whole or not at all, to the first folder that takes it; return what is there.

    None for one that is declined.
    """
    text = json.dumps(record)
    text = json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "record": text})
    failure: FileError | None = None
    for place in writable():
        try:
            with naming(place / digest):
                return _put(pattern, digest, place, target, {"kernel.py": source, ENTRY: text})
        except CoverError:
            return None
        except FileError as error:
            failure = error
    raise failure or FileError("no kernel cache can be written", got=cache_dir())


def _put(
    pattern: BlockPattern, digest: str, place: Path, target: Target, files: dict[str, str]
) -> CacheEntry | None:
    """Put an entry in a folder unless another process has put a whole one there.

    Raises:
        CoverError: the entry is one that is declined.
        OSError: the folder does not take it.
    """
    folder = place / digest
    temporary = Path(tempfile.mkdtemp(dir=place, prefix=f".{digest}-"))
    aside = temporary.with_name(f"{temporary.name}.damaged")
    try:
        for name, text in files.items():
            (temporary / name).write_text(text, encoding="utf-8")
            (temporary / name).chmod(0o666 & ~umask() & ~FOREIGN_WRITE)
        # For all who may read the cache: it may be filled for others.
        temporary.chmod(0o777 & ~umask() & ~FOREIGN_WRITE)
        with locked(place):
            existing = _load(pattern, digest, folder, target)
            if existing is not None:  # another process was faster
                return existing
            if os.path.lexists(folder):
                folder.rename(aside)
            temporary.rename(folder)
        return _load(pattern, digest, folder, target)
    finally:
        for left in (temporary, aside):
            remove(left)


def _load(pattern: BlockPattern, digest: str, folder: Path, target: Target) -> CacheEntry | None:
    """Read an entry; None, with the reason logged, unless it is there, whole and to be trusted."""
    try:
        for path in (folder, folder / ENTRY, folder / "kernel.py"):
            if (reason := distrust(path)) is not None:
                log.warning("kernel cache: %s is not used (%s)", path, reason)
                return None
        record = _record(folder / ENTRY)
        if "declined" in record:
            raise CoverError(str(record["declined"]))
        _source(folder / "kernel.py", record["source_sha256"])
        cover = Cover.from_json(record["cover"])
        if cover.to_json() != record["cover"]:
            raise ValueError("the cover is not written as covers are")
        _check_cover(cover, pattern)
        if not denotes(cover, pattern):
            raise ValueError("the cover is of another mask")
        checksum = record["source_sha256"]
        return CacheEntry(digest, folder, checksum, target, ENTRY_POINT, cover)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except CoverError:
        raise
    except PermissionError as error:
        log.warning("kernel cache: %s can't be read (%s); another folder serves", folder, error)
        return None
    except Exception as error:  # whatever is made of damaged bytes
        said = f"{type(error).__name__}: {str(error)[:200]}"
        log.warning("kernel cache: %s is damaged (%s); it is generated again", folder, said)
        return None


def _record(path: Path) -> dict[str, Any]:
    """Read the record of an entry.

    Raises:
        OSError: it can't be read.
        ValueError: it is damaged.
    """
    if path.stat().st_size > LARGEST:
        raise ValueError("too large")
    outer = json.loads(path.read_text(encoding="utf-8"))
    text = outer["record"]
    if hashlib.sha256(text.encode()).hexdigest() != outer["sha256"]:
        raise ValueError("the record does not have its checksum")
    record: dict[str, Any] = json.loads(text)
    return record


def _source(path: Path, checksum: str) -> str:
    """Read a generated module and check that it is the one that was written."""
    if path.stat().st_size > LARGEST:
        raise ValueError("too large")
    source = path.read_bytes()
    if hashlib.sha256(source).hexdigest() != checksum:
        raise ValueError("the source does not have its checksum")
    return source.decode()


def _check_cover(cover: Cover, pattern: BlockPattern) -> None:
    """Raise `ValueError` unless a cover is one of this pattern's size: its mask takes memory."""
    size = (cover.query_blocks, cover.key_blocks, len(cover.head_forms))
    if size != (pattern.query_blocks, pattern.key_blocks, pattern.heads):
        raise ValueError("the cover is of another size")
    if not set(cover.head_forms) == set(range(len(cover.forms))):
        raise ValueError("the cover has other forms than heads")
    for form in cover.forms:
        ends = [0, *(segment.last for segment in form)]
        if [segment.first for segment in form] != ends[:-1] or ends != sorted(set(ends)):
            raise ValueError("the cover has holes")
        if ends[-1] != pattern.query_blocks:
            raise ValueError("the cover ends elsewhere")


@cache
def _load_module(path: Path, checksum: str) -> Any:
    """Run a generated module from its checked text: what Python has compiled of it is not read."""
    source = _source(path, checksum)
    module = ModuleType(f"calibatt_generated_{path.parent.name}")
    module.__file__ = str(path)
    # Triton asks for the text of its functions: it gets the checked one, not the file's.
    linecache.cache[str(path)] = (len(source), None, source.splitlines(keepends=True), str(path))
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module


def load_kernel(entry: SourceEntry) -> Any:
    """The jit function of an entry; one object a process, so that it compiles once.

    Raises:
        OSError: the source can't be read.
        ValueError: it is not the one that was checked.
    """
    return getattr(_load_module(entry.source_path, entry.source_sha256), entry.entry_point)


def variant_name(config: LaunchConfig, *, arch: int, dtype: torch.dtype) -> str:
    """Name of what one source is compiled for, or of the table kernel that recomputes its calls."""
    import triton

    tiles, head_dim = config.settings, config.constexprs["HEAD_DIM"]
    registers = "" if tiles.registers is None else f"-r{tiles.registers}"
    return (
        f"sm_{arch}-{str(dtype).removeprefix('torch.')}-d{head_dim}-{tiles.m}x{tiles.n}-"
        f"w{tiles.warps}-s{tiles.stages}{registers}{'-tma' * config.descriptors}-{config.softmax}-"
        f"triton{triton.__version__}"
    )


def record_compiled(entry: SourceEntry, variant: str, compiled: Any, seconds: float) -> None:
    """Note that Triton's cache holds this variant, beside the entry or in a folder of the user's.

    Raises:
        FileError: no cache folder can be written.
    """
    record = {
        "hash": compiled.hash,
        "name": compiled.metadata.name,
        "shared": compiled.metadata.shared,
        "seconds": seconds,
    }
    try:
        write_text(entry.folder / f"{variant}.json", json.dumps(record))
        sweep(entry.folder)
    except FileError:
        write_text(private_dir() / entry.digest / f"{variant}.json", json.dumps(record))


def is_compiled(entry: SourceEntry, variant: str) -> bool:
    """Whether a launch of this variant would find its machine code."""
    folders = dict.fromkeys((entry.folder, private_dir() / entry.digest))
    return any(_is_compiled(folder / f"{variant}.json") for folder in folders)


def _is_compiled(path: Path) -> bool:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        from triton.runtime.cache import get_cache_manager

        key, name = record["hash"], f"{record['name'][:150]}.json"
        if not (key.replace("-", "").replace("_", "").isalnum() and os.sep not in name):
            return False
        group = get_cache_manager(key).get_group(name)
        return bool(group) and all(os.path.exists(path) for path in group.values())
    except Exception:  # whatever is made of damaged bytes: it is compiled again
        return False
