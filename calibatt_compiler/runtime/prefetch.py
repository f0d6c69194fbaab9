"""In which order a sampler will ask for kernels: pure arithmetic, so that it can be tested alone.

A forward pass serves the sites one after another, at one step; a step takes one pass or several
(guidance), and the next step follows, after the last one the first of another video. So from a call
on everything that follows is known, but for the number of passes: as many as the last step took.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence

Key = tuple[str, int, Hashable]
"""One kernel: site, index of the pattern, and which variant of it (such as a text length)."""


class CallPredictor:
    """Follows the calls of a sampler and tells what comes next."""

    def __init__(self) -> None:
        self._steps: dict[str, Sequence[int]] = {}
        self._place: dict[str, int] = {}
        self._names: list[str] = []
        self._variant: dict[str, Hashable] = {}
        self._site, self._step = -1, -1
        self._passes, self._passes_before = 0, 1

    def add(self, site: str, steps: Sequence[int]) -> None:
        """Add a site after those that are there.

        Args:
            site: its name.
            steps: for each diffusion step the index of its pattern; as many steps for every site.
        """
        if site not in self._place:
            self._place[site] = len(self._names)
            self._names.append(site)
        self._steps[site] = steps

    def call(self, site: str, step: int, variant: Hashable = None) -> Key:
        """Record a call and return its kernel."""
        place = self._place[site]
        if step != self._step:
            if self._step >= 0:
                self._passes_before = self._passes
            self._passes = 1
        elif place <= self._site:
            self._passes += 1
        self._site, self._step = place, step
        self._variant[site] = variant
        return self._key(site, step)

    def next_uses(self) -> Iterator[Key]:
        """Kernels in the order of their next use, the one in use first, none twice.

        After the passes of this step come the other steps, and at last this one in another video:
        so every kernel of the graph is among them.
        """
        seen = set()
        for key in self._calls():
            if key not in seen:
                seen.add(key)
                yield key

    def _calls(self) -> Iterator[Key]:
        yield from (self._key(name, self._step) for name in self._names[max(0, self._site) :])
        if self._step < 0:  # nothing was called: the first step is all that is sure
            return
        if self._passes < self._passes_before:
            yield from (self._key(name, self._step) for name in self._names)
        steps = len(next(iter(self._steps.values())))
        for ahead in range(1, steps + 1):
            step = (self._step + ahead) % steps
            yield from (self._key(name, step) for name in self._names)

    def _key(self, site: str, step: int) -> Key:
        return site, self._steps[site][max(0, step)], self._variant.get(site)


def select_resident(
    next_uses: Iterable[Key], sizes: Mapping[Key, int], unknown: int, budget: int
) -> tuple[list[Key], bool]:
    """Return as many of the next kernels as fit into memory, and whether these are all.

    Belady's rule: what is used last is what goes. The first is always among them.

    Args:
        next_uses: in the order of their next use.
        sizes: bytes of those that are known.
        unknown: bytes to expect of others.
        budget: bytes that all may take.
    """
    found: list[Key] = []
    for key in next_uses:
        budget -= sizes.get(key, unknown)
        if budget < 0 and found:
            return found, False
        found.append(key)
    return found, True
