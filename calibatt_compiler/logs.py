"""One switch for what is logged: `CALIBATT_LOGS=passes,kernels,calibration`, or `all`.

Each area has a logger below `calibatt`. Named areas are shown in full on stderr; without the
variable, Python's own settings of logging hold.
"""

from __future__ import annotations

import difflib
import logging
import os

from calibatt_compiler.printable import clean_record

VARIABLE = "CALIBATT_LOGS"

AREAS = {
    "passes": "what each pass of the backend found and did, and how long it took",
    "kernels": "which kernel serves and why, and what is compiled",
    "calibration": "what is observed, what a run's folder holds, what was chosen",
}


logging.getLogger("calibatt").addFilter(clean_record)


def logger(area: str) -> logging.Logger:
    """Return the logger of one of `AREAS`."""
    assert area in AREAS
    found = logging.getLogger(f"calibatt.{area}")
    found.addFilter(clean_record)  # those of a logger's parents are not asked
    return found


def start(areas: str | None = None) -> None:
    """Log areas in full, by names with commas; default: what `CALIBATT_LOGS` says.

    A name that is no area is warned of.
    """
    areas = os.environ.get(VARIABLE, "") if areas is None else areas
    wanted = [name.strip() for name in areas.split(",") if name.strip()]
    if not wanted:
        return
    top = logging.getLogger("calibatt")
    if not any(getattr(handler, "name", None) == VARIABLE for handler in top.handlers):
        handler = logging.StreamHandler()
        handler.name = VARIABLE
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s", "%H:%M:%S"))
        top.addHandler(handler)
        top.propagate = False
    for name in AREAS if "all" in wanted else wanted:
        if name in AREAS:
            logger(name).setLevel(logging.DEBUG)
            continue
        near = difflib.get_close_matches(name, AREAS, 1)
        top.warning(
            "%s has no area %r%s; there are: all, %s",
            VARIABLE,
            name,
            f" (did you mean {near[0]!r}?)" if near else "",
            ", ".join(AREAS),
        )
