"""What a site has served, for the summary: it outlives the site and its kernels."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from calibatt_compiler.kernels.common.zone_step import ZoneKernel
from calibatt_compiler.kernels.protocol import AttentionKernel
from calibatt_compiler.plan import SitePatterns
from calibatt_compiler.runtime.monitor import KeptMassMonitor


class Served(NamedTuple):
    """What is known of a kernel after it is gone."""

    kind: str
    density: float
    reason: str | None


@dataclass
class SiteCounts:
    """What a site has served.

    Attributes:
        site: its patterns.
        dense: indices of the patterns that stock dense attention serves.
        monitor: what watches the attention mass kept; None if nothing does.
        calls: calls by kind of kernel; dense calls by their reason.
        served: the last kernel of each pattern that was made.
        recomputed: calls that kernels which are gone had to compute again.
    """

    site: SitePatterns
    dense: frozenset[int]
    monitor: KeptMassMonitor | None = None
    calls: Counter[str] = field(default_factory=Counter)
    served: dict[int, Served] = field(default_factory=dict)
    recomputed: int = 0

    def note(self, index: int, kernel: AttentionKernel) -> None:
        """Record what serves a pattern."""
        self.served[index] = Served(kernel.kind, kernel.density, kernel.reason)

    def release(self, kernel: AttentionKernel | ZoneKernel) -> None:
        """Keep what a kernel that goes has counted; waits for the GPU."""
        self.recomputed += kernel.repairs

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of kernel that serve the site, as far as they were made, without repetition."""
        kinds = [
            "sdpa" if index in self.dense else self.served[index].kind
            for index in dict.fromkeys(self.site.steps)
            if index in self.dense or index in self.served
        ]
        return tuple(dict.fromkeys(kinds))

    @property
    def reasons(self) -> Counter[str]:
        """Why another kernel than the one asked for serves, by number of patterns."""
        return Counter(
            served.reason for served in self.served.values() if served.reason is not None
        )

    @property
    def computed_density(self) -> float:
        """Blocks that the kernels compute / all blocks, mean over steps.

        Patterns that have not served yet count with their own density.
        """
        densities = [
            self.served[index].density if index in self.served else self.site.density_at(step)
            for step, index in enumerate(self.site.steps)
        ]
        return sum(densities) / len(densities)
