"""What a calibration for zones takes on disk and on the host, from the sizes of its first step."""

from __future__ import annotations

import math
import os

from calibatt_compiler.calibration.config import CalibrationConfig
from calibatt_compiler.calibration.select.zones.price import MEMORY, THREADS
from calibatt_compiler.calibration.store.records import InputRecord, SiteSize
from calibatt_compiler.calibration.store.zone_sums import bytes_of_sums

UNIT_BYTES = 8
"""Of a sum in memory."""

FITTING = 3
"""Arrays of a step group that are in memory for each site that is being fitted."""

HEADER = 4096
"""Bytes of a plan's header beside what is counted here."""


def sums_bytes(record: InputRecord, groups: int, ranks: int, inputs: int) -> int:
    """Return the bytes of the sums of a run, at most: text counts as if it were summed, too.

    Args:
        record: of an input.
        groups: step groups.
        ranks: processes, each of which has sums of its own.
        inputs: of the run.
    """
    steps = -(-len(record.timesteps) // groups)
    total = 0
    for size in record.sites:
        votes = steps * -(-inputs // ranks) * max(record.votes[size.name])
        # Each tensor's place and digest; each input's name.
        header = 640 + 360 * groups + 10 * -(-inputs // ranks) + 2 * len(size.name)
        total += groups * _group_blocks(record, size) * bytes_of_sums(votes) + header
    return ranks * total


def input_bytes(record: InputRecord, groups: int, ranks: int, inputs: int) -> int:
    """Return the bytes that a rank writes for an input, at most.

    Those are the input's own sums of the step groups before the last one, once each, and then the
    rank's files. Arguments: see `sums_bytes`.
    """
    own = sum(UNIT_BYTES * (groups - 1) * _group_blocks(record, size) for size in record.sites)
    return own + sums_bytes(record, groups, ranks, inputs) // ranks


def host_bytes(record: InputRecord, groups: int) -> int:
    """Return the most host memory that summing an input, adding it and then the fit take.

    Args:
        record: of an input.
        groups: step groups.
    """
    sites = [UNIT_BYTES * _group_blocks(record, size) for size in record.sites]
    # The step group in progress of all sites; then the sums of a site and those of its file.
    summing = sum(sites) + (groups + FITTING) * max(sites)
    threads = min(THREADS, os.cpu_count() or 1)
    return max(summing, min(MEMORY, groups * sum(sites)) + threads * FITTING * max(sites))


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


def _group_blocks(record: InputRecord, size: SiteSize) -> int:
    return size.heads * math.prod(_blocks(record, size))


def _blocks(record: InputRecord, size: SiteSize) -> tuple[int, int]:
    return -(-size.query_length // record.block[0]), -(-size.key_length // record.block[1])
