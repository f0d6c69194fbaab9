"""Decides for each attention call what serves it, and says why where nothing does."""

from __future__ import annotations

from dataclasses import replace

from calibatt_compiler.capture import Site
from calibatt_compiler.passes.rewrite import Lowered, Rewrite, Skip


def bind_sites(rewrite: Rewrite) -> Rewrite:
    """Ask the binder what serves each call."""
    answers: list[Site | Skip] = []
    for call in rewrite.calls:
        if rewrite.timestep is None:
            answers.append(Skip("the timestep is not an input of this graph"))
        else:
            answers.append(rewrite.binder.bind(call))
    decisions = tuple(answer if isinstance(answer, Skip) else Lowered(answer) for answer in answers)
    return replace(rewrite, decisions=decisions)
