"""What a plan of zones records of the error that it expects: names in `PlanMetadata.quality`."""

from __future__ import annotations

from collections.abc import Mapping

EXPECTED_ERROR = "expected_error"
"""Of the whole plan: root of the mean relative variance of a row's output, in calibration."""

OF_SITE = f"{EXPECTED_ERROR}:"
"""Begins the same of one site; the site's name follows."""


def expected_errors(quality: Mapping[str, float]) -> dict[str, float]:
    """Return the error that is expected of each site; empty if it was not recorded."""
    return {
        name.removeprefix(OF_SITE): value
        for name, value in quality.items()
        if name.startswith(OF_SITE)
    }
