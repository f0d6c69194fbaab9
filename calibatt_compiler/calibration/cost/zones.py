"""What a calibration for zones takes on disk and on the host, from the sizes of its first step."""

from __future__ import annotations

import math

from calibatt_compiler.calibration.config import CalibrationConfig
from calibatt_compiler.calibration.select.zones.price import MEMORY
from calibatt_compiler.calibration.store.records import InputRecord, SiteSize
from calibatt_compiler.calibration.store.zone_sums import KINDS

UNIT_BYTES = 8
"""Of a sum."""

HEADER = 4096
"""Bytes of a file's header beside what is counted here."""


def sums_bytes(record: InputRecord, groups: int, ranks: int) -> int:
    """Return the bytes of the sums of a run, at most: text counts as if it were summed, too.

    Args:
        record: of an input.
        groups: step groups.
        ranks: processes, each of which has sums of its own.
    """
    of_sites = [_site_bytes(record, size, groups) + HEADER for size in record.sites]
    return ranks * sum(of_sites)


def host_bytes(record: InputRecord, groups: int) -> int:
    """Return the most host memory that adding an input and then the fit take.

    Args:
        record: of an input.
        groups: step groups.
    """
    largest = max(_site_bytes(record, size, groups) for size in record.sites)
    # What is added, a copy of it, and what it is added to; then sums that are held, and one site's.
    return max(3 * largest, MEMORY + largest)


def plan_bytes(record: InputRecord, config: CalibrationConfig) -> int:
    """Return the bytes of the plan's file, at most: each site takes all its numbers, none shorter.

    Args:
        record: of an input.
        config: settings.
    """
    groups = min(config.step_groups, record.schedule_steps)
    total = HEADER + 40 * len(record.timesteps)
    for size in record.sites:
        rows, columns = _blocks(record, size)
        numbers = min(config.zone_numbers, 2 * size.heads * rows * columns)
        # A run has a cut and an octave, a group a lead, its coordinates and its count of runs.
        arrays = 4 * size.heads + 9 * numbers
        # The record's digest and the index's six entries of each; density and group of each step.
        total += groups * (arrays + 400) + 30 * len(record.timesteps) + 4 * len(size.name) + 640
    return total


def _site_bytes(record: InputRecord, size: SiteSize, groups: int) -> int:
    return len(KINDS) * UNIT_BYTES * groups * size.heads * math.prod(_blocks(record, size))


def _blocks(record: InputRecord, size: SiteSize) -> tuple[int, int]:
    return -(-size.query_length // record.block[0]), -(-size.key_length // record.block[1])
