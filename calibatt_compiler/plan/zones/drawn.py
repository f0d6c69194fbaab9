"""The patterns of a site that is stored as zones: each step's is drawn when it is asked for."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import overload

from calibatt_compiler.errors import PlanError, PlanFormatError
from calibatt_compiler.plan.pattern import BlockPattern
from calibatt_compiler.plan.stored import CACHED, PatternSize
from calibatt_compiler.plan.zones import ZonePattern
from calibatt_compiler.plan.zones.stored import StoredZones, ZoneSize


@dataclass(eq=False)
class DrawnPatterns(Sequence[BlockPattern]):
    """For each diffusion step the pattern that it draws from the zones of its group.

    Safe for use by several threads.

    Attributes:
        zones: of each step group, all of one size.
        groups: for each step, the index of its zones.
        kept: blocks that each step keeps.

    Raises:
        PlanError: zones of different sizes, a step without zones, or zones without a step.
        PlanFormatError: when a step is asked for: it keeps other than was recorded.
    """

    zones: tuple[ZonePattern, ...] | StoredZones
    groups: tuple[int, ...]
    kept: tuple[int, ...] = ()
    _cache: dict[int, BlockPattern] = field(default_factory=dict, init=False, repr=False)
    _fitted: dict[tuple[int, int, int], ZonePattern] = field(
        default_factory=dict, init=False, repr=False
    )
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.zones, tuple):
            sizes = {ZoneSize.of(zones) for zones in self.zones}
            if len(sizes) != 1:
                raise PlanError(
                    "the zones of a site must be of one size",
                    expected="one (size, video, text, seed, formula)",
                    got=sorted(sizes, key=repr),
                    remedy="make all step groups of a site with the same lengths, blocks and seed",
                )
        if set(self.groups) != set(range(len(self.zones))):
            raise PlanError(
                "a step of a site has no zones, or zones no step",
                expected=f"each index from 0 to {len(self.zones) - 1}, and no other",
                got=self.groups,
                remedy="give each step the index of its zones",
            )
        if not self.kept:
            self.kept = tuple(
                self.zones[group].kept(step) for step, group in enumerate(self.groups)
            )

    def __len__(self) -> int:
        return len(self.groups)

    @overload
    def __getitem__(self, index: int) -> BlockPattern: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[BlockPattern, ...]: ...
    def __getitem__(self, index: int | slice) -> BlockPattern | tuple[BlockPattern, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        step = range(len(self))[index]
        with self._lock:
            pattern = self._cache.pop(step, None) or self._draw(step)
            self._cache[step] = pattern
            while len(self._cache) > CACHED:
                del self._cache[next(iter(self._cache))]
            return pattern

    def __iter__(self) -> Iterator[BlockPattern]:
        return (self[step] for step in range(len(self)))

    def group(self, index: int) -> ZonePattern:
        """Return the zones of a step group, whose steps keep what was recorded.

        Raises:
            PlanFormatError: a step keeps other than was recorded.
        """
        zones = self.zones[index]
        for step, group in enumerate(self.groups):
            if group == index:
                self._check(step, zones.kept(step))
        return zones

    def fitted(self, step: int, to: tuple[int, int]) -> BlockPattern:
        """Return what a step draws where the text is of another length.

        Args:
            step: the diffusion step.
            to: tokens on the query and the key side.
        """
        return self.fitted_group(self.groups[step], to).draw(step)

    def fitted_group(self, index: int, to: tuple[int, int]) -> ZonePattern:
        """Return the zones of a step group where the text is of another length.

        Args:
            index: of the group.
            to: tokens on the query and the key side.
        """
        key = (index, *to)
        with self._lock:
            if key not in self._fitted:
                # Text lengths come and go with prompts; those of the last one are enough.
                self._fitted = {k: zones for k, zones in self._fitted.items() if k[1:] == to}
                self._fitted[key] = self.zones[index].with_lengths(*to)
            return self._fitted[key]

    def _draw(self, step: int) -> BlockPattern:
        pattern = self.zones[self.groups[step]].draw(step)
        self._check(step, pattern.kept)
        return pattern

    def _check(self, step: int, kept: int) -> None:
        if kept != self.kept[step]:
            blocks = self.size.blocks
            raise PlanFormatError(
                f"step {step} of a plan of zones does not draw what was recorded",
                expected=f"the recorded density {self.kept[step] / blocks}",
                got=kept / blocks,
                remedy="copy or download the plan again, or calibrate again",
            )

    @property
    def common(self) -> ZoneSize:
        """What the zones have in common."""
        zones = self.zones
        return zones.common if isinstance(zones, StoredZones) else ZoneSize.of(zones[0])

    @property
    def size(self) -> PatternSize:
        """Heads, lengths and blocks."""
        return self.common.size

    @property
    def digests(self) -> tuple[str, ...]:
        """Digest of the zones of each step group."""
        zones = self.zones
        if isinstance(zones, StoredZones):
            return zones.digests
        return tuple(pattern.digest for pattern in zones)

    @property
    def weighted(self) -> bool:
        """Kept blocks have weights."""
        return True

    @property
    def repetitive(self) -> tuple[int, ...]:
        """No head of any step is row-shared."""
        return (0,) * len(self)

    def packed(self) -> DrawnPatterns:
        """Return the same patterns with the zones in encoded form."""
        return DrawnPatterns(StoredZones.pack(self.zones), self.groups, self.kept)
