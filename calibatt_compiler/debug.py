"""Numbered dumps of the graph before the first pass and after each (`CALIBATT_DEBUG_DIR`)."""

from __future__ import annotations

import itertools

from torch.fx import GraphModule

from calibatt_compiler.files import write_text
from calibatt_compiler.logs import logger
from calibatt_compiler.options import debug_dir

log = logger("passes")
_numbers = itertools.count()


def dump_graph(gm: GraphModule, stage: str) -> None:
    """Write the graph's source to `<debug dir>/<number>-<stage>.py`, if dumps are on."""
    folder = debug_dir()
    if folder is None:
        return
    path = folder / f"{next(_numbers):04d}-{stage}.py"
    write_text(path, gm.print_readable(print_output=False))
    log.info("graph dumped to %s", path)
