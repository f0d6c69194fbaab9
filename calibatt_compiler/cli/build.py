"""`calibatt build`."""

from __future__ import annotations

from typing import Annotated

import typer

from calibatt_compiler.cli import options


def build() -> None:
    raise SystemExit
