"""Generated source of zones in the kernel cache; see `baked.cache`.

It is written again for each look-up, which takes milliseconds, and compared: so what lies in the
cache needs no record, and no file that was changed is run.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from calibatt_compiler.errors import FileError
from calibatt_compiler.files import umask, write_text
from calibatt_compiler.kernels.baked.cache import SourceEntry, generator_version
from calibatt_compiler.kernels.baked.cache_folder import FOREIGN_WRITE, distrust, places, writable
from calibatt_compiler.kernels.baked.source_zones import ENTRY_POINT, generate_zones
from calibatt_compiler.kernels.common.zone_table import zone_table
from calibatt_compiler.kernels.request import Target
from calibatt_compiler.options import cache_dir
from calibatt_compiler.plan.zones import ZonePattern


def get_zone_entry(zones: ZonePattern, target: Target) -> SourceEntry:
    """Return the entry of a pattern of zones, written now unless it lies in the cache.

    Raises:
        KernelError: the pattern has too many blocks.
        FileError: no cache folder can be written.
    """
    source = generate_zones(zones, zone_table(zones), target)
    checksum = hashlib.sha256(source.encode()).hexdigest()
    key = f"zones {target} {checksum} {generator_version()}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:32]
    for place in places():
        if _holds(place / digest, source):
            return SourceEntry(digest, place / digest, checksum, target, ENTRY_POINT)
    failure: FileError | None = None
    for place in writable():
        folder = place / digest
        try:
            write_text(folder / "kernel.py", source)
        except FileError as error:
            failure = error
            continue
        with contextlib.suppress(OSError):
            folder.chmod(0o777 & ~umask() & ~FOREIGN_WRITE)
            (folder / "kernel.py").chmod(0o666 & ~umask() & ~FOREIGN_WRITE)
        if _holds(folder, source):
            return SourceEntry(digest, folder, checksum, target, ENTRY_POINT)
    raise failure or FileError("no kernel cache can be written", got=cache_dir())


def _holds(folder: Path, source: str) -> bool:
    """Whether a folder is the user's own and holds this source."""
    path = folder / "kernel.py"
    try:
        trusted = distrust(folder) is None and distrust(path) is None
        return trusted and path.read_bytes() == source.encode()
    except OSError:
        return False
