"""Generated sources and what is known of their compiled kernels, on disk.

`<cache dir>/<digest>/` holds `kernel.py`, `entry.json` (the cover, the density it adds, checksums)
and one small file for each compiled variant. The digest is of the pattern, the budget and the
generator's own source, so entries never go stale. A folder is filled under a temporary name and
renamed into place: processes that race make the same bytes, and a kill leaves no half entry. The
machine code itself lies in Triton's cache (`TRITON_CACHE_DIR`), where the launch looks for it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from calibatt_compiler.errors import CalibattError
from calibatt_compiler.files import write_text
from calibatt_compiler.kernels.baked import source as codegen
from calibatt_compiler.kernels.baked import source_hopper as codegen_hopper
from calibatt_compiler.kernels.baked.cover import (
    EXACT,
    PORTABLE_INTERVALS,
    CoverError,
    Covering,
    CoverLimits,
    cover_pattern,
    denoted_pattern,
)
from calibatt_compiler.kernels.baked.cover_template import Cover
from calibatt_compiler.kernels.portable.launch import LaunchConfig
from calibatt_compiler.kernels.request import Target
from calibatt_compiler.logs import logger
from calibatt_compiler.options import cache_dir
from calibatt_compiler.plan.pattern import BlockPattern

log = logger("kernels")

_GENERATOR = (
    "common/row_copies.py",
    "baked/cover.py",
    "baked/cover_merge.py",
    "baked/cover_template.py",
    "baked/source_templates.py",
    "baked/source.py",
    "baked/source_hopper.py",
    "portable/index_tables.py",
    "portable/primitives.py",
    "portable/attention.py",
    "hopper/primitives.py",
    "hopper/consumer.py",
    "hopper/transport.py",
    "hopper/kernel.py",
)
"""What generated source is made by or calls, below `kernels/`."""


@dataclass(frozen=True)
class CacheEntry:
    """One generated kernel.

    Attributes:
        digest: key of the entry.
        folder: where it lies.
        covering: the cover, the mask it denotes, the density it adds.
        target: whose source it is.
    """

    digest: str
    folder: Path
    covering: Covering
    target: Target = "portable"

    @property
    def source_path(self) -> Path:
        """The generated module."""
        return self.folder / "kernel.py"


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
    return _load(pattern, digest, cache_dir() / digest, target)


def get_entry(
    pattern: BlockPattern, limits: CoverLimits = EXACT, target: Target = "portable"
) -> CacheEntry:
    """Return the entry of `pattern`, generated now unless a whole one lies in the cache.

    Raises:
        KernelError: the pattern can't be covered within the limits.
        OSError: the cache folder can't be written.
    """
    found = find_entry(pattern, limits, target)
    if found is not None:
        return found
    digest = entry_digest(pattern, limits, target)
    if target == "portable":
        limits = replace(limits, intervals=min(limits.intervals, PORTABLE_INTERVALS))
    try:
        covering = cover_pattern(pattern, limits)
    except CoverError as error:
        _keep(pattern, digest, target, {"declined": error.problem}, "")
        raise
    generate = codegen_hopper.generate_hopper if target == "hopper" else codegen.generate
    source = generate(covering.cover, pattern)
    record = {
        "source_sha256": hashlib.sha256(source.encode()).hexdigest(),
        "added_density": covering.added_density,
        "denoted": covering.pattern.digest,
        "cover": covering.cover.to_json(),
    }
    existing = _keep(pattern, digest, target, record, source)
    return existing or CacheEntry(digest, cache_dir() / digest, covering, target)


def _keep(
    pattern: BlockPattern, digest: str, target: Target, record: dict[str, object], source: str
) -> CacheEntry | None:
    """Write an entry, whole or not at all; return the one that another process has written."""
    folder = cache_dir() / digest
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{digest}-"))
    try:
        (temporary / "kernel.py").write_text(source, encoding="utf-8")
        (temporary / "entry.json").write_text(json.dumps(record), encoding="utf-8")
        if folder.exists():  # a damaged entry, or another process was faster
            existing = _load(pattern, digest, folder, target)
            if existing is not None:
                return existing
            shutil.rmtree(folder, ignore_errors=True)
        try:
            temporary.rename(folder)
        except OSError:
            existing = _load(pattern, digest, folder, target)
            if existing is None:
                raise
            return existing
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return None


def _load(pattern: BlockPattern, digest: str, folder: Path, target: Target) -> CacheEntry | None:
    """Read an entry; None, with the reason logged, unless it is there and whole."""
    try:
        record = json.loads((folder / "entry.json").read_text(encoding="utf-8"))
        if "declined" in record:
            raise CoverError(str(record["declined"]))
        source = (folder / "kernel.py").read_bytes()
        if hashlib.sha256(source).hexdigest() != record["source_sha256"]:
            raise ValueError("the source does not have its checksum")
        cover = Cover.from_json(record["cover"])
        denoted = denoted_pattern(cover, pattern)
        if denoted.digest != record["denoted"]:
            raise ValueError("the cover does not denote its mask")
        covering = Covering(cover, denoted, float(record["added_density"]))
        return CacheEntry(digest, folder, covering, target)
    except FileNotFoundError:
        return None
    except CoverError:
        raise
    except (OSError, KeyError, TypeError, ValueError, IndexError, CalibattError) as error:
        log.warning("kernel cache: %s is damaged (%s); it is generated again", folder, error)
        return None


@cache
def _load_module(path: Path, digest: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"calibatt_generated_{digest}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_kernel(entry: CacheEntry) -> Any:
    """The jit function of an entry; one object a process, so that it compiles once."""
    module = codegen_hopper if entry.target == "hopper" else codegen
    return getattr(_load_module(entry.source_path, entry.digest), module.ENTRY_POINT)


def variant_name(config: LaunchConfig, *, arch: int, dtype: torch.dtype) -> str:
    """Name of what one source is compiled for, or of the table kernel that repairs its calls."""
    import triton

    tiles, head_dim = config.settings, config.constexprs["HEAD_DIM"]
    registers = "" if tiles.registers is None else f"-r{tiles.registers}"
    return (
        f"sm_{arch}-{str(dtype).removeprefix('torch.')}-d{head_dim}-{tiles.m}x{tiles.n}-"
        f"w{tiles.warps}-s{tiles.stages}{registers}{'-tma' * config.descriptors}-{config.softmax}-"
        f"triton{triton.__version__}"
    )


def record_compiled(entry: CacheEntry, variant: str, compiled: Any, seconds: float) -> None:
    """Note that Triton's cache holds this variant."""
    record = {
        "hash": compiled.hash,
        "name": compiled.metadata.name,
        "shared": compiled.metadata.shared,
        "seconds": seconds,
    }
    write_text(entry.folder / f"{variant}.json", json.dumps(record))


def is_compiled(entry: CacheEntry, variant: str) -> bool:
    """Whether a launch of this variant would find its machine code."""
    try:
        record = json.loads((entry.folder / f"{variant}.json").read_text(encoding="utf-8"))
        from triton.runtime.cache import get_cache_manager

        name = f"{record['name'][:150]}.json"
        group = get_cache_manager(record["hash"]).get_group(name)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(group) and all(os.path.exists(path) for path in group.values())
