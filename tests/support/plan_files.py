"""Plan files of any content, with checksums that fit it."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from pathlib import Path
from typing import Any

from calibatt_compiler.plan import Plan, file


def write_plan(
    path: Path, record: Any, codes: dict[str, bytes], patterns: dict[str, Any], more: str = ""
) -> None:
    """Write a plan file of any content with checksums that fit it.

    Args:
        path: file to write.
        record: the record, or its text.
        codes: bytes of each tensor.
        patterns: of the index, for each site; or the text of the index.
        more: goes into the header as it is, before the tensors.
    """
    if not isinstance(patterns, str):
        sites = {
            name: {"sha256": hashlib.sha256(codes.get(name, b"")).hexdigest(), "patterns": entries}
            for name, entries in patterns.items()
        }
        patterns = json.dumps(sites)
    rest = f"{patterns}\n{record if isinstance(record, str) else json.dumps(record)}"
    parts, at = (
        [f'"__metadata__":{json.dumps({file.FORMAT: f"{file.digest(rest)}{chr(10)}{rest}"})}'],
        0,
    )
    for name, code in codes.items():
        end = at + len(code)
        place = {"dtype": "U8", "shape": [len(code)], "data_offsets": [at, end]}
        parts.append(f"{json.dumps(name)}:{json.dumps(place)}")
        at = end
    header = ("{" + more + ",".join(parts) + "}").encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"".join(codes.values()))


def deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


def read_plan(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, bytes]]:
    """Return record, entries of the index by site, and the bytes of each tensor of a plan file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    _, index, record = header.pop("__metadata__")[file.FORMAT].split("\n", 2)
    data = content[8 + length :]
    codes = {name: data[slice(*place["data_offsets"])] for name, place in header.items()}
    entries = {name: site["patterns"] for name, site in json.loads(index).items()}
    return json.loads(record), entries, codes


def decode_all(plan: Plan) -> int:
    """Decode every pattern of a plan; return how many."""
    return sum(len(tuple(site.patterns)) for site in plan.sites.values())
