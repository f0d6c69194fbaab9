"""The `calibatt` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and leave with its exit code."""
    from calibatt_compiler.cli.app import run

    sys.exit(run())
