"""Decides for each attention call what serves it, and says why where nothing does."""

from __future__ import annotations

from dataclasses import replace

from calibatt_compiler.passes.rewrite import Lowered, Rewrite, Skip
from calibatt_compiler.runtime.registry import Site, register


def bind_sites(rewrite: Rewrite) -> Rewrite:
    """Ask the binder about each call and register the sites that it gives."""
    answers: list[Site | Skip] = []
    for call in rewrite.calls:
        if rewrite.timestep is None:
            answers.append(Skip("the timestep is not an input of this graph", mismatch=True))
        else:
            answers.append(rewrite.binder.bind(call))
    sites = {
        call.info.name: answer
        for call, answer in zip(rewrite.calls, answers, strict=True)
        if not isinstance(answer, Skip)
    }
    keys = register(rewrite.binder.prefix, sites) if sites else {}
    decisions = tuple(
        answer if isinstance(answer, Skip) else Lowered(answer, keys[call.info.name])
        for call, answer in zip(rewrite.calls, answers, strict=True)
    )
    return replace(rewrite, decisions=decisions)
