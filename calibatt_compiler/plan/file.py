"""The plan file: safetensors, encoded patterns as tensors, the rest as JSON in the header.

The header's metadata holds one entry, `calibatt-plan`, of three lines: a checksum of the other two,
the index (what the tensors hold, and their checksums), the record (the plan's metadata). So a
flipped bit anywhere is noticed when a plan is opened. Several entries would be written in random
order by safetensors; with one, equal plans make equal files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pydantic
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from calibatt_compiler.errors import CalibattError, PlanError, PlanFormatError
from calibatt_compiler.files import replacing
from calibatt_compiler.plan import bounds
from calibatt_compiler.plan.schema import KNOWN_FEATURES, SCHEMA_VERSION, PlanMetadata, SiteRecord
from calibatt_compiler.plan.stored import (
    KEPT_WEIGHTS,
    Entries,
    PatternSize,
    StoredPatterns,
    layout,
)
from calibatt_compiler.plan.zones.checks import ARRAYS
from calibatt_compiler.plan.zones.drawn import DrawnPatterns
from calibatt_compiler.plan.zones.stored import StoredZones, ZoneSize

T = TypeVar("T")

FORMAT = "calibatt-plan"
HEADER_OF_SITE = 3_200
"""Most bytes that a site's name and place take in a file's header, beside index and record."""

CLIP = 200
"""Characters of a file's own text that a message quotes."""

ATTEMPTS = 100
"""How often a file is opened anew that is replaced while it is being opened."""

_MALFORMED = (ValueError, TypeError, KeyError, AttributeError)
Codes = npt.NDArray[np.uint8]
Stored = StoredPatterns | StoredZones


class StoredSite(pydantic.BaseModel):
    """What the tensor of one site holds.

    Attributes:
        sha256: of its bytes.
        patterns: for each pattern its arrays; see `StoredPatterns.entries`.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    sha256: str
    patterns: Entries


_INDEX = pydantic.TypeAdapter(dict[str, StoredSite])


def to_json(metadata: PlanMetadata) -> str:
    """Return the metadata as canonical JSON: sorted keys, no spaces."""
    return json.dumps(metadata.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))


def digest(text: str) -> str:
    """SHA-256 (hex) of a text; that of a plan's record is the digest of the plan."""
    return hashlib.sha256(text.encode()).hexdigest()


def header(record: str, sites: Mapping[str, Stored]) -> str:
    """Return the entry of metadata of a plan file.

    Args:
        record: what `to_json` returned.
        sites: patterns by site name.
    """
    parts = {
        name: (hashlib.sha256(site.code.data).hexdigest(), site.entries)
        for name, site in sites.items()
    }
    rest = f"{index(parts)}\n{record}"
    return f"{digest(rest)}\n{rest}"


def index(parts: Mapping[str, tuple[str, Entries]]) -> str:
    """Return the index: by site name SHA-256 and entries, as canonical JSON."""
    sites = {name: {"sha256": sha, "patterns": entries} for name, (sha, entries) in parts.items()}
    return json.dumps(sites, sort_keys=True, separators=(",", ":"))


def write(
    path: str | os.PathLike[str], metadata: PlanMetadata, sites: Mapping[str, Stored]
) -> None:
    """Write a plan file atomically.

    Args:
        path: the file to write or replace.
        metadata: everything but the patterns.
        sites: patterns by site name.

    Raises:
        PlanError: it would be more than `read` takes.
    """
    if bounds.sizes_problem(_parts(metadata, sites)):
        sites = {
            name: site.written_out() if isinstance(site, StoredPatterns) else site
            for name, site in sites.items()
        }
    entry = {FORMAT: header(to_json(metadata), sites)}
    problem = bounds.sizes_problem(_parts(metadata, sites))
    text = json.dumps(entry).encode()
    if len(text) + HEADER_OF_SITE * len(sites) > bounds.HEADER_BYTES:
        problem = f"its header would be longer than {bounds.HEADER_BYTES} bytes"
    problem = problem or bounds.text_problem(text)
    if problem is not None:
        raise PlanError(
            "the plan is too large for a file",
            expected="at most 100 sites of 500 steps, patterns of at most "
            f"{bounds.MAX_BYTES} blocks",
            got=problem,
            remedy="let steps share patterns (share_steps), or take larger blocks",
        )
    size = sum(site.code.nbytes for site in sites.values())
    with replacing(path, size=size) as temporary:
        save_file({name: site.code for name, site in sites.items()}, temporary, metadata=entry)


def read(
    path: str | os.PathLike[str],
) -> tuple[PlanMetadata, dict[str, StoredPatterns | DrawnPatterns]]:
    """Open a plan file; the inverse of `write`. The patterns are views of the mapped file.

    Raises:
        PlanFormatError: not a plan, cut short, changed, or of another schema.
    """
    path = Path(path)
    if not path.is_file():
        raise PlanFormatError(
            "there is no plan file",
            expected="a file written by `calibatt calibrate` or Plan.save",
            got=path,
            remedy="check the path, or calibrate the model first",
        )
    for _ in range(ATTEMPTS):
        before = _identity(path)
        try:
            return _guarded(path, _read)
        except PlanFormatError:
            # safetensors opens the path twice, and another file may have come to stand there.
            if _identity(path) == before:
                raise
    raise _damaged(path, "it is replaced all the time")


def _parts(metadata: PlanMetadata, sites: Mapping[str, Stored]) -> Iterator[bounds.Part]:
    return (_part(metadata, site, len(sites[site.name].code)) for site in metadata.sites)


def _part(metadata: PlanMetadata, site: SiteRecord, codes: int) -> bounds.Part:
    drawn = None if site.zones is None else max(_kept(site, share) for share in site.density)
    return bounds.Part(site.name, _size(metadata, site), site.weighted, codes, drawn)


def _guarded(path: Path, read: Callable[[Path], T]) -> T:
    """Read a file whose header is not too large; every failure is that of the file."""
    try:
        problem = bounds.header_problem(path)
        if problem is not None:
            raise _damaged(path, problem)
        return read(path)
    except CalibattError:
        raise
    except Exception as error:
        raise _damaged(path, f"{type(error).__name__}: {str(error)[:CLIP]}") from error


def _identity(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def record_digest(path: Path) -> str:
    """Return the digest of the plan in a file; of the file only the header is read.

    Raises:
        PlanFormatError: not a plan, or its header is damaged.
    """

    def record(path: Path) -> str:
        with _opened(path) as opened:
            return _lines(path, _entry(path, opened))[1]

    return digest(_guarded(path, record))


def _entry(path: Path, opened: Any) -> str:
    entry: dict[str, str] = opened.metadata() or {}
    if set(entry) != {FORMAT}:
        raise PlanFormatError(
            f"{path} is not a plan",
            expected=f"a safetensors file with one entry of metadata, {FORMAT!r}",
            got=f"metadata {[name[:CLIP] for name in sorted(entry)[:4]]}",
            remedy="give the file that `calibatt calibrate` wrote",
        )
    return entry[FORMAT]


def _read(path: Path) -> tuple[PlanMetadata, dict[str, StoredPatterns | DrawnPatterns]]:
    # The header is judged before any tensor is read: weights of a model may be given by mistake.
    with _opened(path) as opened:
        entry = _entry(path, opened)
        # As torch tensors they are views of the mapped file; as numpy arrays they would be copies.
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    listing, record = _lines(path, entry)
    for text in (listing, record):
        # Once more: in the header, braces and brackets of these may have been written otherwise.
        if (problem := bounds.text_problem(text.encode())) is not None:
            raise _damaged(path, problem)
    metadata = _parse(path, record)
    stored = _parse_index(path, listing)
    codes = _codes(path, metadata, stored, tensors)
    return metadata, {
        site.name: _patterns(path, metadata, site, codes[site.name], stored[site.name].patterns)
        for site in metadata.sites
    }


def _patterns(
    path: Path, metadata: PlanMetadata, site: SiteRecord, code: Codes, entries: Entries
) -> StoredPatterns | DrawnPatterns:
    source, size = f"site {site.name!r} in {path}", _size(metadata, site)
    if site.zones is None:
        return StoredPatterns(size, code, entries, site.digests, *_figures(site), source)
    common = ZoneSize(size, *metadata.zone_text(site), site.zones.seed, site.zones.formula)
    zones = StoredZones(common, code, entries, site.digests, source)
    return DrawnPatterns(zones, site.steps, tuple(_kept(site, share) for share in site.density))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError, RuntimeError, *_MALFORMED) as error:
        raise _damaged(path, f"safetensors can't read it: {str(error)[:CLIP]}") from error


def _lines(path: Path, text: str) -> tuple[str, str]:
    """Return index and record of an intact header."""
    checksum, _, rest = text.partition("\n")
    listing, found, record = rest.partition("\n")
    if checksum != digest(rest):
        if not found and '"schema_version":1' in rest:
            raise _other_schema(path, f"schema_version 1, of versions before {SCHEMA_VERSION}")
        raise _damaged(path, "the checksum does not match the content")
    return listing, record


def _parse(path: Path, text: str) -> PlanMetadata:
    try:
        raw: Any = json.loads(text)
        version, requires = raw["schema_version"], frozenset(raw["requires"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, f"its JSON header does not parse: {repr(error)[:CLIP]}") from error
    del raw  # which may be large, and is parsed once more
    # The schema comes before the fields: one of another version may have others.
    if version != SCHEMA_VERSION or not requires <= KNOWN_FEATURES:
        unknown = sorted(str(name)[:CLIP] for name in requires - KNOWN_FEATURES)[:4]
        raise _other_schema(
            path,
            f"schema_version {repr(version)[:CLIP]}" + (f", features {unknown}" if unknown else ""),
        )
    try:
        return PlanMetadata.model_validate_json(text)
    except pydantic.ValidationError as error:
        raise PlanFormatError(
            f"{path} holds values out of range",
            expected="finite numbers, sizes in range, one entry a step",
            got=describe(error),
            remedy="calibrate again, or ask whoever wrote the plan",
        ) from error


def _parse_index(path: Path, text: str) -> dict[str, StoredSite]:
    try:
        return _INDEX.validate_json(text)
    except pydantic.ValidationError as error:
        raise _damaged(path, f"its index does not parse: {describe(error)}") from error


def _codes(
    path: Path,
    metadata: PlanMetadata,
    stored: Mapping[str, StoredSite],
    tensors: Mapping[str, torch.Tensor],
) -> dict[str, Codes]:
    """Return the bytes of each site's tensor, after a check that it is what the index says."""
    sites = {site.name: site for site in metadata.sites}
    names = set(sites)
    wrong = sorted(names ^ set(stored) | names ^ set(tensors))[:4]
    if not wrong:
        wrong = [
            f"{name}: {tensors[name].dtype} {tuple(tensors[name].shape)}"
            for name in sorted(names)
            if not _fits(metadata, sites[name], stored[name].patterns, tensors[name])
        ][:4]
    if not wrong:
        problem = bounds.sizes_problem(
            _part(metadata, site, len(tensors[site.name])) for site in metadata.sites
        )
        wrong = [] if problem is None else [problem]
    if wrong:
        raise PlanFormatError(
            f"{path} holds tensors that don't fit its sites",
            expected="for each site uint8 (bytes,), as long as its index says, of all its patterns",
            got=wrong,
            remedy="calibrate again, or ask whoever wrote the plan",
        )
    codes = {name: tensor.numpy() for name, tensor in tensors.items()}
    for name, code in codes.items():
        code.setflags(write=False)
        if hashlib.sha256(code.data).hexdigest() != stored[name].sha256:
            raise _damaged(path, f"the checksum of {name!r} does not match its content")
    return codes


def _fits(metadata: PlanMetadata, site: SiteRecord, entries: Entries, tensor: torch.Tensor) -> bool:
    """Whether a tensor may hold the codes of these entries, and they the patterns of a site."""
    length = sum(length for entry in entries for *_, length in entry)
    if len(entries) != site.patterns or tensor.dtype != torch.uint8:
        return False
    if tuple(tensor.shape) != (length,):
        return False
    if site.zones is not None:
        return all(tuple(name for name, *_ in entry) == tuple(ARRAYS) for entry in entries)
    known = set(layout(_size(metadata, site)))
    weighted, mixed = False, []
    for entry in entries:
        names = [name for name, *_ in entry]
        # What the others mean depends on the bits.
        if names[:1] != ["bits"] or not set(names) <= known or len(set(names)) != len(names):
            return False
        weighted |= KEPT_WEIGHTS in names
        mixed.append("repetitive" in names)
    return weighted == site.weighted and mixed == [count > 0 for count in _figures(site)[1]]


def _size(metadata: PlanMetadata, site: SiteRecord) -> PatternSize:
    return PatternSize(
        site.heads,
        site.query_length,
        site.key_length,
        site.block_m,
        site.block_n,
        site.pooled,
        metadata.copies(site),
    )


def _figures(site: SiteRecord) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Kept blocks and row-shared heads of each pattern, from those of the steps that use it."""
    of_step = zip(site.density, site.repetitive or [0] * len(site.steps), strict=True)
    by_pattern = dict(zip(site.steps, of_step, strict=True))
    figures = [by_pattern[index] for index in range(site.patterns)]
    kept = tuple(_kept(site, density) for density, _ in figures)
    return kept, tuple(repetitive for _, repetitive in figures)


def _kept(site: SiteRecord, density: float) -> int:
    """Kept blocks of a density."""
    rows, columns = -(-site.query_length // site.block_m), -(-site.key_length // site.block_n)
    return round(density * site.heads * rows * columns)


def _other_schema(path: Path, got: str) -> PlanFormatError:
    return PlanFormatError(
        f"{path} has a schema that this version can't read",
        expected=f"schema_version {SCHEMA_VERSION}, features {sorted(KNOWN_FEATURES)}",
        got=got,
        remedy="upgrade calibatt, or calibrate again with this version",
    )


def _damaged(path: Path, what: str) -> PlanFormatError:
    return PlanFormatError(
        f"{path} is damaged or not a plan",
        expected="a whole, unchanged plan file",
        got=what,
        remedy="copy or download it again, or calibrate again",
    )


def describe(error: pydantic.ValidationError) -> str:
    """Return the first few problems of a validation, one clause each."""
    # Names and values of the file may be of any length.
    clauses = [
        f"{'.'.join(str(part) for part in item['loc'])[:CLIP] or 'plan'}: {item['msg'][:CLIP]}"
        for item in error.errors(include_url=False, include_input=False, include_context=False)[:4]
    ]
    more = error.error_count() - len(clauses)
    return "; ".join(clauses) + (f"; and {more} more" if more > 0 else "")
