"""What is in a plan: facts and a table for the terminal."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table

from calibatt_compiler.plan import BlockPattern, Plan, SitePatterns
from calibatt_compiler.plan.order import DENSITY, ERROR, said
from calibatt_compiler.plan.refine import MERGED, SHARED
from calibatt_compiler.plan.zones.quality import OF_SITE, expected_errors
from calibatt_compiler.printable import printable

_BARS = "▁▂▃▄▅▆▇█"


def head_density(pattern: BlockPattern) -> npt.NDArray[np.float64]:
    """Kept blocks / all blocks of each head, float64 (heads,)."""
    kept = np.array([int(np.unpackbits(head).sum()) for head in pattern.bits], dtype=np.float64)
    return kept / (pattern.query_blocks * pattern.key_blocks)


def facts(plan: Plan) -> list[tuple[str, str]]:
    """Return what the header of a plan says, in words."""
    metadata = plan.metadata
    model = metadata.model
    frames, height, width = plan.grid
    thresholds = ", ".join(f"{name} = {value:g}" for name, value in metadata.thresholds.items())
    sampler = metadata.sampler
    pairs = [
        ("model", f"{model.class_name}, config {model.config_digest[:12]}" if model else "any"),
        ("latent grid", f"{frames} frames x {height} x {width} = {math.prod(plan.grid)} tokens"),
        ("token order", f"{metadata.token_order}; text: {_TEXT[metadata.text_policy]}"),
        (
            "sampler",
            f"{sampler.name or 'unknown'}, {plan.steps} steps, timesteps "
            f"{sampler.timesteps[0]:g} to {sampler.timesteps[-1]:g}",
        ),
        ("guidance", _CFG[metadata.cfg]),
        ("thresholds", thresholds or "none recorded"),
        (
            "calibrated on",
            f"{metadata.inputs.count} inputs, hash {metadata.inputs.digest[:12]}"
            if metadata.inputs.count
            else "masks of the user's own",
        ),
        ("written by", f"{metadata.producer}, schema {metadata.schema_version}"),
        ("digest", plan.digest),
    ]
    if said_of_zones := _zones(plan):
        pairs.insert(-2, ("zones", said_of_zones))
    if repetition := _repetition(plan):
        pairs.insert(-2, ("row-shared heads", repetition))
    quality = dict(metadata.quality)
    surveyed = orders_surveyed(plan)
    if surveyed is not None:
        pairs.insert(-2, ("orders surveyed", surveyed))
        quality = {k: v for k, v in quality.items() if not k.startswith((DENSITY, ERROR))}
    added = [f"{quality.pop(name):.4f} by {_ADDED[name]}" for name in _ADDED if name in quality]
    if added:
        pairs.insert(-2, ("density added", ", ".join(added)))
    if by_site := expected_errors(quality):
        quality = {k: v for k, v in quality.items() if not k.startswith(OF_SITE)}
        least, most = min(by_site.values()), max(by_site.values())
        pairs.insert(-2, ("error expected", f"{least:.4f} to {most:.4f} by site"))
    if quality:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in quality.items())
        pairs.insert(-2, ("measured", figures))
    return pairs


def orders_surveyed(plan: Plan) -> str | None:
    """Return what the calibration measured of token orders, in a line; None if it did not."""
    figures = plan.metadata.quality
    density, error = (
        {name.removeprefix(kind): v for name, v in figures.items() if name.startswith(kind)}
        for kind in (DENSITY, ERROR)
    )
    return printable(said(density, error)) if density else None


def terminal(plan: Plan) -> RenderableType:
    """Return facts and a table of sites, to be printed with rich."""
    header = Table.grid(padding=(0, 2))
    header.add_column(style="dim")
    header.add_column(overflow="fold")
    for label, value in facts(plan):
        header.add_row(label, printable(value))
    density = plan.density()
    header.add_row("density", f"{density:.3f} (sparsity {1 - density:.1%})")
    copying = any(site.repetitive_share for site in plan.sites.values())
    sites = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        padding=(0, 1, 0, 0),
        caption=_CAPTION + (_COPYING if copying else ""),
    )
    tokens = math.prod(plan.grid)
    plain = all(site.query_length == site.key_length == tokens for site in plan.sites.values())
    kind = "zones" if all(site.zones is not None for site in plan.sites.values()) else "masks"
    sites.add_column("site", overflow="fold")
    copies = ("copy",) if copying else ()
    for name in ("heads", *copies, *(() if plain else ("tokens",)), "blocks", kind, "mean"):
        sites.add_column(name, justify="right", no_wrap=True)
    for name in ("by step", "by head", "course"):
        sites.add_column(name, no_wrap=True)
    for name, site in plan.sites.items():
        first = site.size
        steps = [site.density_at(step) for step in range(plan.steps)]
        heads = heads_density(site)
        sites.add_row(
            printable(name),
            str(site.heads),
            *((f"{site.repetitive_share:.0%}",) if copying else ()),
            *(() if plain else (_pair(site.query_length, site.key_length),)),
            f"{_pair(first.query_blocks, first.key_blocks)} of "
            f"{_pair(first.block_m, first.block_n)}",
            str(len(site.digests)),
            f"{np.mean(steps):.3f}",
            f"{min(steps):.2f}-{max(steps):.2f}",
            f"{heads.min():.2f}-{heads.max():.2f}",
            sparkline(steps),
        )
    return Group(header, "", sites)


def sparkline(values: list[float], *, width: int = 8) -> str:
    """Draw values in [0, 1] as bars of text, averaged down to at most `width` of them."""
    groups = np.array_split(np.asarray(values), min(width, len(values)))
    means = [float(group.mean()) for group in groups]
    return "".join(_BARS[min(len(_BARS) - 1, int(mean * len(_BARS)))] for mean in means)


def to_dict(plan: Plan) -> dict[str, Any]:
    """Return facts and densities as plain values, for JSON."""
    return {
        "digest": plan.digest,
        "density": plan.density(),
        "metadata": plan.metadata.model_dump(mode="json", exclude={"sites"}),
        "sites": [
            {**record.model_dump(mode="json"), **_zone_groups(plan.sites[record.name])}
            for record in plan.metadata.sites
        ],
    }


def _zone_groups(site: SitePatterns) -> dict[str, Any]:
    """For each step group of zones: density, and of each head numbers and blocks by octave."""
    if site.zones is None:
        return {}
    groups = [
        {
            "density": zones.density,
            "numbers": zones.numbers.tolist(),
            "octaves": zones.octave_shares().round(6).tolist(),
        }
        for zones in site.zones.zones
    ]
    return {"step_groups": groups}


def heads_density(site: SitePatterns) -> npt.NDArray[np.float64]:
    """Density of each head, mean over the steps."""
    if site.zones is not None:
        kept = [
            site.zones.zones[group].kept_rows(step).sum(1)
            for step, group in enumerate(site.zones.groups)
        ]
        return np.asarray(np.mean(kept, 0) / (site.size.query_blocks * site.size.key_blocks))
    shares = np.bincount(site.steps, minlength=len(site.patterns)) / len(site.steps)
    densities = np.array([head_density(pattern) for pattern in site.patterns])
    return np.asarray(shares @ densities)


def _zones(plan: Plan) -> str:
    """What the zones of a plan hold, in words; empty if there are none."""
    found = [site.zones for site in plan.sites.values() if site.zones is not None]
    if not found:
        return ""
    groups = {len(zones.zones) for zones in found}
    numbers = [each.numbers for zones in found for each in zones.zones]
    a_head = np.concatenate(numbers)
    return (
        f"{' or '.join(map(str, sorted(groups)))} step groups, each step draws its own sample; "
        f"{a_head.mean():.0f} numbers a head, at most {max(map(np.sum, numbers))} a site and group"
    )


def _repetition(plan: Plan) -> str:
    """What the row-shared heads of a plan compute, in words; empty if there are none."""
    share = sum(site.repetitive_share * site.heads for site in plan.sites.values())
    share /= sum(site.heads for site in plan.sites.values())
    counts = {site.anchor_rows for site in plan.metadata.sites if site.anchor_rows}
    rows = " or ".join(map(str, sorted(counts)))
    height = plan.grid[1]
    if not counts:
        return ""
    return f"{share:.1%}, mean over the steps; compute {rows} of the {height} rows of a frame"


def _pair(a: int, b: int) -> str:
    return str(a) if a == b else f"{a} x {b}"


_CAPTION = (
    "density: kept blocks / all blocks, as mean over the steps, their range, the range of the "
    "heads, and its course from noise to picture"
)
_COPYING = "; copy: heads that copy rows, mean over the steps"
_ADDED = {SHARED: "sharing steps", MERGED: "merging intervals"}
_TEXT = {
    "none": "not part of the sequence",
    "in_mask": "part of the sequence and its blocks",
    "dense_first": "first in the sequence, all its blocks kept, of any length",
    "dense_last": "last in the sequence, all its blocks kept, of any length",
}
_CFG = {
    "none": "none",
    "separate": "calibrated on the conditional branch, used for both",
    "batched": "both branches in one batch",
    "embedded": "embedded in the model",
}
