"""What a plan records of its sites, and whether sites fit the plan."""

from __future__ import annotations

from collections.abc import Mapping

from calibatt_compiler.errors import PlanError
from calibatt_compiler.plan.schema import PlanMetadata, SiteRecord, ZoneRecord
from calibatt_compiler.plan.site import SitePatterns


def record_of(name: str, site: SitePatterns) -> SiteRecord:
    """Return what a plan records of a site."""
    size = site.size
    repetitive = tuple(site.repetitive_at(step) for step in range(len(site.steps)))
    zones = site.zones
    anchor_rows = size.copies.anchor_rows if size.copies is not None and any(repetitive) else 0
    return SiteRecord(
        name=name,
        heads=size.heads,
        head_dim=site.head_dim,
        query_length=size.query_length,
        key_length=size.key_length,
        block_m=size.block_m,
        block_n=size.block_n,
        pooled=size.pooled,
        weighted=site.weighted and zones is None,
        head_forms="mixed" if anchor_rows else "blocks",
        anchor_rows=anchor_rows,
        zones=None if zones is None else ZoneRecord(seed=zones.common.seed),
        patterns=len(site.digests),
        digests=site.digests,
        steps=site.steps if zones is None else zones.groups,
        density=tuple(site.density_at(step) for step in range(len(site.steps))),
        repetitive=repetitive if anchor_rows else (),
    )


def _check_copies(metadata: PlanMetadata, sites: Mapping[str, SitePatterns]) -> None:
    """Raise `PlanError` if row-shared heads copy other rows than those of the plan's video."""
    for record in metadata.sites:
        expected, got = metadata.copies(record), sites[record.name].size.copies
        if expected is not None and got != expected:
            raise PlanError(
                f"the row-shared heads of site {record.name!r} copy the rows of another video",
                expected=expected,
                got=got,
                remedy="make their AnchorRows from grid, text and token order of the plan",
            )


def _check_text(metadata: PlanMetadata, sites: Mapping[str, SitePatterns]) -> None:
    """Raise `PlanError` if zones take other tokens for text than the plan does."""
    for record in metadata.sites:
        zones = sites[record.name].zones
        if zones is None:
            continue
        expected, got = metadata.zone_text(record), (zones.common.video, zones.common.text)
        if got != expected:
            raise PlanError(
                f"the zones of site {record.name!r} take other tokens for text than the plan",
                expected=f"video tokens and place of the text {expected}",
                got=got,
                remedy="make zones with the video tokens and the text position of the plan",
            )


def steps_of(record: SiteRecord) -> tuple[int, ...]:
    """For each diffusion step the index of its pattern: zones draw one each."""
    return record.steps if record.zones is None else tuple(range(len(record.steps)))


def check_sites(metadata: PlanMetadata, sites: Mapping[str, SitePatterns]) -> None:
    """Raise `PlanError` if sites copy rows or take tokens for text otherwise than the plan says."""
    _check_copies(metadata, sites)
    _check_text(metadata, sites)
