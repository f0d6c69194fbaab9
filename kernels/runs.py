"""Kept key blocks of a pattern as runs, by the shortest way."""

from __future__ import annotations

from calibatt_compiler.plan.intervals import Intervals, runs_of_bits
from calibatt_compiler.plan.pattern import BlockPattern


def pattern_runs(pattern: BlockPattern) -> Intervals:
    """Return `pattern.intervals()`; without weights, from the packed bits."""
    return runs_of_bits(pattern.bits) if pattern.weights is None else pattern.intervals()
