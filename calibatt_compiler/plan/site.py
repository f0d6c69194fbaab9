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
from calibatt_compiler.plan.zones import ZonePattern
from calibatt_compiler.plan.zones.drawn import DrawnPatterns
from calibatt_compiler.plan.zones.stored import StoredZones


@dataclass(frozen=True)
class SitePatterns:
    """The patterns of one site.

    Attributes:
        patterns: the distinct ones, all of one size: a tuple, or a sequence that decodes or draws
            each when it is asked for. The properties here never do. Of zones there is one a step.
        steps: for each diffusion step, the index of its pattern.
        head_dim: channels a head, if known.

    Raises:
        PlanError: no pattern, patterns of different sizes, a step without a pattern, or a pattern
            without a step.
    """

    patterns: tuple[BlockPattern, ...] | StoredPatterns | DrawnPatterns
    steps: tuple[int, ...]
    head_dim: int | None = None

    def __post_init__(self) -> None:
        eager = isinstance(self.patterns, tuple)
        sizes = {PatternSize.of(pattern) for pattern in self.patterns} if eager else set()
        if len(sizes) != 1 and eager:
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
        if isinstance(self.patterns, tuple):
            return PatternSize.of(self.patterns[0])
        return self.patterns.size

    @property
    def digests(self) -> tuple[str, ...]:
        """Digest of each pattern; of zones, those of each step group."""
        if isinstance(self.patterns, tuple):
            return tuple(pattern.digest for pattern in self.patterns)
        return self.patterns.digests

    @property
    def weighted(self) -> bool:
        """Whether a pattern has weights."""
        if isinstance(self.patterns, tuple):
            return any(pattern.weights is not None for pattern in self.patterns)
        return self.patterns.weighted

    def kept_at(self, step: int) -> int:
        """Kept blocks at a diffusion step."""
        index = self.steps[step]
        if isinstance(self.patterns, tuple):
            return self.patterns[index].kept
        return self.patterns.kept[index]

    def repetitive_at(self, step: int) -> int:
        """Row-shared heads at a diffusion step."""
        index = self.steps[step]
        if isinstance(self.patterns, tuple):
            return repetitive_heads(self.patterns[index])
        return self.patterns.repetitive[index]

    def outline(self, step: int) -> PatternOutline:
        """What is known of the pattern of a diffusion step without decoding it."""
        every = self.kept_at(step) == self.size.blocks
        full = every and not self.weighted and not self.repetitive_at(step)
        return PatternOutline(**vars(self.size), weighted=self.weighted, full=full)

    @property
    def repetitive_share(self) -> float:
        """Share of the heads that are row-shared, mean over the steps."""
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
        if isinstance(self.patterns, DrawnPatterns):
            return replace(self, patterns=self.patterns.packed())
        return replace(self, patterns=StoredPatterns.pack(self.patterns))

    @property
    def stored(self) -> StoredPatterns | StoredZones:
        """What a plan file holds of the site."""
        if isinstance(self.patterns, DrawnPatterns):
            return StoredZones.pack(self.patterns.zones)
        return StoredPatterns.pack(self.patterns)

    @property
    def zones(self) -> DrawnPatterns | None:
        """Its zones; None if it is stored as masks."""
        return self.patterns if isinstance(self.patterns, DrawnPatterns) else None

    @classmethod
    def of_zones(
        cls,
        zones: Sequence[ZonePattern],
        groups: Sequence[int],
        head_dim: int | None = None,
    ) -> SitePatterns:
        """Make a site of zones.

        Args:
            zones: of each step group.
            groups: for each diffusion step, the index of its zones.
            head_dim: channels a head, if known.

        Raises:
            PlanError: zones of different sizes, a step without zones, or zones without a step.
        """
        drawn = DrawnPatterns(tuple(zones), tuple(groups))
        return cls(drawn, tuple(range(len(drawn))), head_dim)

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
