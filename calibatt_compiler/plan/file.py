"""The plan file: safetensors, bits as tensors, the rest as JSON in the header.

The header's metadata holds one entry, `calibatt-plan`: the digest, a line break, the JSON text. The
digest covers the text and every tensor, so that a flipped bit anywhere is noticed. Several entries
would be written in random order by safetensors; with one, equal plans make equal files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydantic
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from calibatt_compiler.errors import PlanFormatError
from calibatt_compiler.files import replacing
from calibatt_compiler.plan.schema import KNOWN_FEATURES, SCHEMA_VERSION, PlanMetadata

FORMAT = "calibatt-plan"
Bits = npt.NDArray[np.uint8]

WEIGHTS = "/weights"
"""Ends the name of the tensor with the weights of a site."""


def to_json(metadata: PlanMetadata) -> str:
    """Return the metadata as canonical JSON: sorted keys, no spaces."""
    return json.dumps(metadata.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))


def digest(text: str, tensors: Mapping[str, Bits]) -> str:
    """SHA-256 (hex) over the JSON text and each tensor's name, shape and bytes."""
    h = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        h.update(f"\0{name}\0{array.dtype.str}{array.shape}\0".encode())
        h.update(array.data)
    return h.hexdigest()


def write(
    path: str | os.PathLike[str], metadata: PlanMetadata, tensors: Mapping[str, Bits]
) -> None:
    """Write a plan file atomically.

    Args:
        path: the file to write or replace.
        metadata: everything but the bits.
        tensors: by site name, uint8 (patterns, heads, query_blocks, ceil(key_blocks / 8)); of a
            weighted site also `<name>/weights`, uint8 (patterns, heads, query_blocks, key_blocks).
    """
    text = to_json(metadata)
    header = {FORMAT: f"{digest(text, tensors)}\n{text}"}
    with replacing(path) as temporary:
        save_file(dict(tensors), temporary, metadata=header)


def read(path: str | os.PathLike[str]) -> tuple[PlanMetadata, dict[str, Bits]]:
    """Read a plan file; the inverse of `write`.

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
    # The header is judged before any tensor is read: weights of a model may be given by mistake.
    with _opened(path) as opened:
        header: dict[str, str] = opened.metadata() or {}
        if set(header) != {FORMAT}:
            raise PlanFormatError(
                f"{path} is not a plan",
                expected=f"a safetensors file with one entry of metadata, {FORMAT!r}",
                got=f"metadata {sorted(header)}",
                remedy="give the file that `calibatt calibrate` wrote",
            )
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    recorded, _, text = header[FORMAT].partition("\n")
    metadata = _parse(path, text, intact=recorded == digest(text, tensors))
    _check_tensors(path, metadata, tensors)
    return metadata, tensors


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="numpy") as opened:
            yield opened
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(path, f"safetensors can't read it: {error}") from error


def _parse(path: Path, text: str, *, intact: bool) -> PlanMetadata:
    if not intact:
        raise _damaged(path, "the checksum does not match the content")
    try:
        raw: Any = json.loads(text)
        version, requires = raw["schema_version"], frozenset(raw["requires"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, f"its JSON header does not parse: {error!r}") from error
    # The schema comes before the fields: one of another version may have others.
    if version != SCHEMA_VERSION or not requires <= KNOWN_FEATURES:
        unknown = sorted(map(str, requires - KNOWN_FEATURES))
        raise PlanFormatError(
            f"{path} has a schema that this version can't read",
            expected=f"schema_version {SCHEMA_VERSION}, features {sorted(KNOWN_FEATURES)}",
            got=f"schema_version {version!r}" + (f", features {unknown}" if unknown else ""),
            remedy="upgrade calibatt, or calibrate again with this version",
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


def _check_tensors(path: Path, metadata: PlanMetadata, tensors: Mapping[str, Bits]) -> None:
    expected = {}
    for site in metadata.sites:
        columns = -(-site.key_length // site.block_n)
        rows = (site.patterns, site.heads, -(-site.query_length // site.block_m))
        expected[site.name] = (*rows, (columns + 7) // 8)
        if site.weighted:
            expected[f"{site.name}{WEIGHTS}"] = (*rows, columns)
    got = {name: tensor.shape for name, tensor in tensors.items()}
    if got != expected or any(tensor.dtype != np.uint8 for tensor in tensors.values()):
        wrong = sorted(set(expected.items()) ^ set(got.items()))[:4]
        raise PlanFormatError(
            f"{path} holds tensors that don't fit its sites",
            expected="uint8 (patterns, heads, query_blocks, ceil(key_blocks / 8)) for each site, "
            "and weights where they are recorded",
            got=wrong or "another dtype",
            remedy="calibrate again, or ask whoever wrote the plan",
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
    clauses = [
        f"{'.'.join(str(part) for part in item['loc']) or 'plan'}: {item['msg']}"
        for item in error.errors(include_url=False)[:4]
    ]
    more = error.error_count() - len(clauses)
    return "; ".join(clauses) + (f"; and {more} more" if more > 0 else "")
