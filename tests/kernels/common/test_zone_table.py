"""Zones as kernels read them, walked in plain Python."""

from __future__ import annotations

import numpy as np
import pytest
from zone_patterns import CASES, many_runs, zone_pattern

from calibatt_compiler.kernels.common.zone_table import ZoneTable, zone_table
from calibatt_compiler.plan.zones import ZonePattern
from calibatt_compiler.plan.zones.drawing import phase


def walk(zones: ZonePattern, table: ZoneTable, row: int, step: int) -> tuple[list[int], list[int]]:
    """Key blocks that a row keeps, in the order of keys, and their octaves; from words alone."""
    where, drawn, lead_runs, first = table.rows[row].tolist()
    sums = drawn + phase(step, zones.seed) & 127
    total = (drawn >> 7 & 0x1FFFFF) + sums
    slide = where & 0xFFFF if first < 0 else 0
    begin, blocks, octaves = 0, [], []
    runs = lead_runs >> 16
    for number in range(runs):
        word = int(table.runs[(first & 0x7FFFFFFF) + number])
        octave, end = word & 7, min(max((word >> 3) + slide, table.left), table.right)
        if number + 1 == runs:
            end = zones.key_blocks
        for block in range(begin, end):
            kept = (sums + (128 >> octave)) >> 7
            sums = (sums + (128 >> octave)) & 127
            if kept:
                blocks.append(block)
                octaves.append(octave)
        begin = end
    assert len(blocks) == total >> 7
    last = zones.key_blocks - 1
    assert (last in blocks) == ((total & 127) < 128 >> (drawn >> 28 & 7))
    assert (drawn < 0) == (lead_runs & 0xFFFF == last)
    return blocks, octaves


@pytest.mark.parametrize("name", CASES)
def test_words_say_what_the_plan_draws(name: str) -> None:
    zones = zone_pattern(name)
    table = zone_table(zones)
    leads = zones.row_leads().reshape(-1)
    for step in (0, 5, 64, 127):
        drawn = zones.draw(step)
        mask = drawn.mask().reshape(-1, zones.key_blocks).numpy()
        of_blocks = zones.map_octaves().reshape(mask.shape)
        for row in range(len(mask)):
            blocks, octaves = walk(zones, table, row, step)
            assert blocks == np.flatnonzero(mask[row]).tolist()
            assert octaves == of_blocks[row][mask[row]].tolist()
            assert table.rows[row, 0] == row // zones.query_blocks << 16 | row % zones.query_blocks
            assert table.rows[row, 2] & 0xFFFF == leads[row]


def test_equal_groups_share_their_runs() -> None:
    zones = many_runs(64)
    (one,) = {tuple(x) for x in zones.octaves.reshape(8, 8).tolist()}
    assert one == tuple(range(8))
    table = zone_table(zones)
    # Heads differ in their cuts: nothing is shared; then two heads are alike.
    assert len(table.heads) == 1 + 64
    cuts = zones.cuts.reshape(8, 7).copy()
    cuts[5] = cuts[2]
    parts = zones.to_arrays() | {"cuts": cuts.reshape(-1)}
    sizes = (8, zones.query_length, zones.key_length, 128, 128)
    alike = zone_table(ZonePattern.from_arrays(sizes, parts))
    assert len(alike.heads) == 1 + 56
    assert alike.rows[2 * 512, 3] == alike.rows[5 * 512, 3]
