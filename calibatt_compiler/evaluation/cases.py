"""The prompts and seeds that videos are generated from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One video to generate."""

    prompt: str
    seed: int
