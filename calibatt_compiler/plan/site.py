"""The patterns of one attention call, and which of them each diffusion step uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from calibatt_compiler.errors import PlanError
from calibatt_compiler.plan.pattern import BlockPattern
from calibatt_compiler.plan.stored import (
    PatternOutline,
    PatternSize,
    StoredPatterns,
    repetitive_heads,
)


@dataclass(frozen=True)
class SitePatterns:
    """The patterns of one site.

    Attributes:
        patterns: the distinct ones, all of one size: a tuple, or a sequence that decodes each when
            it is asked for. The properties here never decode one.
        steps: for each diffusion step, the index of its pattern.
        head_dim: channels a head, if known.

    Raises:
        PlanError: no pattern, patterns of different sizes, a step without a pattern, or a pattern
            without a step.
    """

    patterns: tuple[BlockPattern, ...] | StoredPatterns
    steps: tuple[int, ...]
    head_dim: int | None = None

    def __post_init__(self) -> None:
        stored = isinstance(self.patterns, StoredPatterns)
        sizes = set() if stored else {PatternSize.of(pattern) for pattern in self.patterns}
        if len(sizes) != 1 and not stored:
            raise PlanError(
                "the patterns of a site must be of one size",
                expected="one (heads, query_length, key_length, block_m, block_n, pooled, copies)",
                got=sorted(sizes, key=repr),
                remedy="make all steps of a site with the same lengths, blocks and copies",
            )
        if set(self.steps) != set(range(len(self.patterns))):
            raise PlanError(
                "a step of a site has no pattern, or a pattern no step",
                expected=f"each index from 0 to {len(self.patterns) - 1}, and no other",
                got=self.steps,
                remedy="build sites with SitePatterns.share, one pattern a step",
            )

    def at(self, step: int) -> BlockPattern:
        """Return the pattern of a diffusion step."""
        return self.patterns[self.steps[step]]

    @cached_property
    def size(self) -> PatternSize:
        """Heads, lengths and blocks."""
        if isinstance(self.patterns, StoredPatterns):
            return self.patterns.size
        return PatternSize.of(self.patterns[0])

    @property
    def digests(self) -> tuple[str, ...]:
        """Digest of each pattern."""
        if isinstance(self.patterns, StoredPatterns):
            return self.patterns.digests
        return tuple(pattern.digest for pattern in self.patterns)

    @property
    def weighted(self) -> bool:
        """Whether a pattern has weights."""
        if isinstance(self.patterns, StoredPatterns):
            return self.patterns.weighted
        return any(pattern.weights is not None for pattern in self.patterns)

    def kept_at(self, step: int) -> int:
        """Kept blocks at a diffusion step."""
        index = self.steps[step]
        if isinstance(self.patterns, StoredPatterns):
            return self.patterns.kept[index]
        return self.patterns[index].kept

    def repetitive_at(self, step: int) -> int:
        """Repetitive heads at a diffusion step."""
        index = self.steps[step]
        if isinstance(self.patterns, StoredPatterns):
            return self.patterns.repetitive[index]
        return repetitive_heads(self.patterns[index])

    def outline(self, step: int) -> PatternOutline:
        """What is known of the pattern of a diffusion step without decoding it."""
        every = self.kept_at(step) == self.size.blocks
        full = every and not self.weighted and not self.repetitive_at(step)
        return PatternOutline(**vars(self.size), weighted=self.weighted, full=full)

    @property
    def repetitive_share(self) -> float:
        """Share of the heads that are repetitive, mean over the steps."""
        heads = sum(self.repetitive_at(step) for step in range(len(self.steps)))
        return heads / (self.size.heads * len(self.steps))

    def density_at(self, step: int) -> float:
        """Kept blocks / all blocks at a diffusion step."""
        return self.kept_at(step) / self.size.blocks

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self.size.heads

    @property
    def query_length(self) -> int:
        """Tokens on the query side."""
        return self.size.query_length

    @property
    def key_length(self) -> int:
        """Tokens on the key side."""
        return self.size.key_length

    def packed(self) -> SitePatterns:
        """Return the same patterns in encoded form, which takes about a tenth of the memory."""
        return replace(self, patterns=StoredPatterns.pack(self.patterns))

    @classmethod
    def share(cls, by_step: Sequence[BlockPattern], head_dim: int | None = None) -> SitePatterns:
        """Store equal patterns of several steps once."""
        index: dict[str, int] = {}
        distinct: list[BlockPattern] = []
        steps = []
        for pattern in by_step:
            if pattern.digest not in index:
                index[pattern.digest] = len(distinct)
                distinct.append(pattern)
            steps.append(index[pattern.digest])
        return cls(tuple(distinct), tuple(steps), head_dim)
