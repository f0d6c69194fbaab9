"""The mode of a head: blocks, or a few anchor rows of each frame that the others copy.

At a step a head is *row-shared* if all of this holds, scores being means over the samples of the
scored inputs (`calibration.repetition`):

1. its rows attend alike: its similarity is at least `gamma`;
2. it costs less so: the blocks that it computes (its anchor rows over all keys) are fewer than the
   agreed mask keeps, pooled keys counted on both sides;
3. it has no larger output error so: its copy error is at most the sparse error, that of the
   sample's own mask at the threshold of the step.

The paper goes by the first alone. The other two let a head take the form that costs less at the
same error: heads that attend alike may still differ in what reaches the output, and a head that is
sparse anyway gains nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from calibatt_compiler.calibration.select.repetition_scores import (
    ARRAY,
    at_other_share,
    copies_of,
    decimals,
)
from calibatt_compiler.calibration.store.records import InputRecord, SiteSize
from calibatt_compiler.calibration.store.run_folder import RunStore
from calibatt_compiler.errors import CalibrationError
from calibatt_compiler.plan import SitePatterns
from calibatt_compiler.plan.copies import AnchorRows

SHARE = "repetitive_heads"
"""Name of the figure in `PlanMetadata.quality`: row-shared heads / heads, over sites and steps."""

Kept = Callable[[InputRecord], Tensor]
"""Gives the share of mass that the rows of an input's masks keep, (votes, heads, query_blocks)."""


@dataclass(frozen=True)
class HeadModes:
    """Modes of the heads of a site at a step, as `BlockPattern.from_mask` takes them."""

    copies: AnchorRows | None = None
    repetitive: npt.NDArray[np.bool_] | None = None


def choose_head_modes(
    store: RunStore,
    records: Sequence[InputRecord],
    size: SiteSize,
    step: int,
    mask: Tensor,
    *,
    gamma: float | None,
    pooled: int = 0,
    kept: Kept | None = None,
) -> HeadModes:
    """Choose the mode of each head; the rule is that of the module.

    Args:
        store: the run's folder.
        records: the inputs that count.
        size: of the site.
        step: index of the step.
        mask: bool (heads, query_blocks, key_blocks), the agreed blocks.
        gamma: similarity from which on a head may be row-shared; None: no head is.
        pooled: keys that each dropped block is pooled to.
        kept: where masks are not those that were recorded, what these keep.

    Raises:
        CalibrationError: no input was scored, or its file is damaged.
    """
    if gamma is None:
        return HeadModes()
    scored = [record for record in records if record.anchor_rows]
    if not scored:
        raise CalibrationError(
            f"no input of {store.folder} was scored for spatial repetition",
            expected="a run with CalibrationConfig(gamma=...) or --gamma, its first input included",
            got=f"{len(records)} inputs without scores, gamma {gamma}",
            remedy="calibrate again with gamma, or leave it out",
        )
    first = scored[0]
    copies = copies_of(
        first.grid, size.query_length, first.text, first.anchor_rows, first.token_order
    )
    if copies is None:
        return HeadModes()
    by_vote = []
    for record in scored:
        scores = store.tensor(record.name, f"{size.name}@{step}/{ARRAY}")
        by_vote.append(decimals(scores if kept is None else at_other_share(scores, kept(record))))
    similarity, copy_error, sparse_error, _ = np.concatenate(by_vote, axis=1).mean(1)
    rows = mask.shape[1]
    computed = -(-len(copies.computed(size.query_length)) // first.block[0])
    # Pooled keys take part in every row of blocks that is computed.
    extra = pooled / first.block[1]
    cost = mask.double().mean((1, 2)).cpu().numpy() + extra
    cheaper = computed / rows * (1 + extra) < cost - 1e-9
    alike = similarity >= gamma - 1e-9
    return HeadModes(copies, alike & cheaper & (copy_error <= sparse_error))


def repetition_settings(records: Sequence[InputRecord], gamma: float | None) -> dict[str, float]:
    """Return what was asked for, for `PlanMetadata.thresholds`."""
    if gamma is None:
        return {}
    rows = next(record.anchor_rows for record in records if record.anchor_rows)
    return {"gamma": float(gamma), "anchor_rows": float(rows)}


def repetition_figures(sites: Sequence[SitePatterns], gamma: float | None) -> dict[str, float]:
    """Return what came of it, for `PlanMetadata.quality`."""
    if gamma is None:
        return {}
    steps = range(len(sites[0].steps))
    found = sum(site.repetitive_at(step) for site in sites for step in steps)
    return {SHARE: found / (len(steps) * sum(site.heads for site in sites))}
