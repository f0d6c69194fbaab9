"""What a finished plan may be turned into: steps that share a pattern, rows with fewer intervals.

Both only ever add blocks, so the attention mass that each query block keeps never falls.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from calibatt_compiler.errors import OptionError, PlanError
from calibatt_compiler.plan.pattern import BlockPattern
from calibatt_compiler.plan.plan import Plan
from calibatt_compiler.plan.site import SitePatterns

SHARE_STEPS = 0.97
"""Agreement from which on steps share one pattern, see arXiv 2603.05503."""

MERGE_BUDGET = 0.02
"""Density that merging may add, where it is asked for without a number."""

SHARED, MERGED = "share_steps_added_density", "merge_added_density"
"""Names of the figures in `PlanMetadata.quality`: blocks added / all blocks, over all steps."""


def share_steps(plan: Plan, tau: float = SHARE_STEPS) -> Plan:
    """Let consecutive steps of a site whose masks agree share one pattern, the OR of theirs.

    Groups are formed site by site, greedily from the last step backwards: a step joins the group
    of the steps after it if each mask of the group so far, its own included, agrees with the OR of
    them all; else it begins a new group. Two masks agree if their intersection over union, counted
    over all heads, is at least `tau`. A mask lies within the OR, so its agreement with it is the
    quotient of their kept blocks: no step keeps more than 1 / tau times the blocks that it kept.
    Steps share only if the same heads are row-shared in them.

    Args:
        plan: is left as it is.
        tau: agreement, in (0, 1]; at 1 only equal masks share, and no mask changes.

    Returns:
        The new plan, which records `tau` and the density that was added.

    Raises:
        OptionError: `tau` out of range.
    """
    return _refined(plan, Refiner(share_steps=tau))


def merge_intervals(plan: Plan, budget: float = MERGE_BUDGET) -> Plan:
    """Fill gaps between the intervals of a row, the smallest gaps first, within a budget.

    Each pattern has the budget for itself: gaps of all its rows are filled in the order of their
    width, those of equal width from the first head, row and key block on, as long as the blocks
    added are at most `budget` times all blocks of the pattern. So no step of a site gains more
    than `budget` in density. Gaps before the first interval of a row and after its last stay.

    Args:
        plan: is left as it is.
        budget: density that may be added, in [0, 1); at 0 no mask changes.

    Returns:
        The new plan, which records the budget and the density that was added.

    Raises:
        OptionError: the budget is out of range.
    """
    return _refined(plan, Refiner(merge_budget=budget))


@dataclass
class Refiner:
    """Refines site after site, sharing before merging, and keeps account of what that adds.

    Attributes:
        share_steps: see the function of this name; None leaves it out.
        merge_budget: see `merge_intervals`; None leaves it out.

    Raises:
        OptionError: a value out of range.
    """

    share_steps: float | None = None
    merge_budget: float | None = None
    _shared: int = 0
    _merged: int = 0
    _blocks: int = 0

    def __post_init__(self) -> None:
        tau, budget = self.share_steps, self.merge_budget
        if tau is not None and not (_number(tau) and 0 < tau <= 1):
            raise _error("share_steps", "an intersection over union in (0, 1], or None", tau)
        if budget is not None and not (_number(budget) and 0 <= budget < 1):
            raise _error("merge_budget", "a share of all blocks in [0, 1), or None", budget)

    def site(self, site: SitePatterns) -> SitePatterns:
        """Return the refined patterns of one site.

        Args:
            site: patterns whose kept blocks count once.

        Raises:
            PlanError: its blocks have weights, which would not fit more blocks.
        """
        refines = self.share_steps is not None or self.merge_budget is not None
        if refines and site.weighted:
            raise PlanError(
                "patterns with weights can't share steps or merge intervals",
                expected="patterns whose kept blocks count once",
                got="weights, which were made for the blocks that are kept now",
                remedy="share and merge first, then make the weights",
            )
        kept = _kept(site)
        self._blocks += len(site.steps) * site.size.blocks
        if self.share_steps is not None:
            site = _share(site, Fraction(str(self.share_steps)))
            self._shared += _kept(site) - kept
            kept = _kept(site)
        if self.merge_budget is not None:
            site = _merge(site, Fraction(str(self.merge_budget)))
            self._merged += _kept(site) - kept
        return site

    def thresholds(self) -> dict[str, float]:
        """Settings that were used, for `PlanMetadata.thresholds`."""
        found = {"share_steps": self.share_steps, "merge_budget": self.merge_budget}
        return {name: float(value) for name, value in found.items() if value is not None}

    def figures(self) -> dict[str, float]:
        """Density that was added over all sites so far, for `PlanMetadata.quality`."""
        found: dict[str, float] = {}
        if self.share_steps is not None:
            found[SHARED] = self._shared / self._blocks
        if self.merge_budget is not None:
            found[MERGED] = self._merged / self._blocks
        return found


def _refined(plan: Plan, refiner: Refiner) -> Plan:
    # Packed, since all sites of a large model don't fit into memory as bits.
    sites = {name: refiner.site(site).packed() for name, site in plan.sites.items()}
    before = plan.metadata.quality
    added = {name: before.get(name, 0.0) + value for name, value in refiner.figures().items()}
    return plan.with_sites(
        sites,
        thresholds={**plan.metadata.thresholds, **refiner.thresholds()},
        quality={**before, **added},
    )


def _kept(site: SitePatterns) -> int:
    """Kept blocks, summed over the steps."""
    return sum(site.kept_at(step) for step in range(len(site.steps)))


def _share(site: SitePatterns, tau: Fraction) -> SitePatterns:
    by_step: list[BlockPattern] = []
    # Read forwards: stored patterns are changes of the one before.
    patterns = [site.at(step) for step in range(len(site.steps))]
    group = patterns[-1]
    fewest = group.kept
    size = 0
    for pattern in reversed(patterns):
        alike = _same_heads(group, pattern)
        union = _union(group, pattern) if alike and pattern is not group else group
        smallest = min(fewest, pattern.kept)
        if alike and smallest >= tau * union.kept:
            group, fewest, size = union, smallest, size + 1
        else:
            by_step += [group] * size
            group, fewest, size = pattern, pattern.kept, 1
    by_step += [group] * size
    return SitePatterns.share(by_step[::-1], site.head_dim)


def _same_heads(a: BlockPattern, b: BlockPattern) -> bool:
    """Whether the same heads are repetitive: else a row is of other queries."""
    if a.repetitive is None or b.repetitive is None:
        return a.repetitive is b.repetitive
    return bool((a.repetitive == b.repetitive).all())


def _union(a: BlockPattern, b: BlockPattern) -> BlockPattern:
    return replace(a, bits=a.bits | b.bits)


def _merge(site: SitePatterns, budget: Fraction) -> SitePatterns:
    merged = [_filled(pattern, budget) for pattern in site.patterns]
    return SitePatterns.share([merged[index] for index in site.steps], site.head_dim)


def _filled(pattern: BlockPattern, budget: Fraction) -> BlockPattern:
    rows = pattern.heads * pattern.query_blocks
    allowed = int(budget * rows * pattern.key_blocks)
    runs = pattern.intervals()
    row = np.repeat(np.arange(rows), np.diff(runs.offsets))
    within = row[1:] == row[:-1]
    row, start, end = row[1:][within], runs.ends[:-1][within], runs.starts[1:][within]
    order = np.argsort(end - start, kind="stable")
    added = np.cumsum((end - start)[order], dtype=np.int64)
    chosen = order[: np.searchsorted(added, allowed, side="right")]
    if not len(chosen):
        return pattern
    edges = np.zeros((rows, pattern.key_blocks + 1), np.int8)
    # A block may end one gap, never begin another: between gaps lies an interval.
    edges[row[chosen], start[chosen]] = 1
    edges[row[chosen], end[chosen]] = -1
    gaps: npt.NDArray[np.int8] = np.cumsum(edges[:, :-1], axis=1, dtype=np.int8)
    bits = np.packbits(gaps.astype(np.bool_), axis=-1, bitorder="little")
    return replace(pattern, bits=pattern.bits | bits.reshape(pattern.bits.shape))


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _error(name: str, expected: str, got: object) -> OptionError:
    return OptionError(
        f"{name!r} is out of range",
        expected=expected,
        got=repr(got),
        remedy=f"leave it out, or use {SHARE_STEPS if name == 'share_steps' else MERGE_BUDGET}",
    )
