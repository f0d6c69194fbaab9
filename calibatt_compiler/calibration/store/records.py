"""What is written down of a calibration input, beside its masks."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from calibatt_compiler.plan.schema import FixedBy, ModelIdentity


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class SiteSize(_Record):
    """Sizes of one observed attention call; see `SiteInfo`."""

    name: str
    heads: int
    head_dim: int
    query_length: int
    key_length: int


class InputRecord(_Record):
    """One finished input.

    Attributes:
        name: of the input within the run.
        about: what it was, as JSON values: prompt and seed.
        model: identity of the calibrated module.
        grid: latent tokens (frames, height, width).
        text: where text tokens stand in sequences that are longer than the grid.
        block: tokens a query block, tokens a key block.
        token_order: see `PlanMetadata`.
        scheduler: class of the sampler, if known.
        timesteps: what the model was given, in sampling order.
        sigmas: noise levels of the same steps, if known.
        positions: place of each step in the sampler's whole schedule, the t of eps(t).
        schedule_steps: T of eps(t).
        thresholds: A, C and k that the masks were selected with.
        guided: whether a call of an unconditional branch was seen.
        batched: whether a call held both branches; None in records that do not say.
        sites: the observed attention calls.
        votes: for each site, how many masks each step has: one a sample, or more if both
            branches are observed or the sampler calls the model twice a step.
        kept_mass: for each site and step, mean share of attention mass that the input's own masks
            keep.
        best_share: for each site and step, mean share of attention mass in each query block's
            best 20 % of key blocks.
        anchor_rows: rows a frame that copy errors are for, if spatial repetition was scored; else
            0. There are scores only if a frame has more rows.
        form: what the run is for; of zones the arrays are sums over inputs, in `ZoneSums`, and
            there are no thresholds and no kept mass.
        step_groups: of zones, in how many parts the schedule is.
        fixed_by: what fixed the tokens of its calls; None in runs of versions before.
        tensors: SHA-256 of each array in the file. `<site>@<step>` is uint8 (votes, heads,
            query_blocks, ceil(key_blocks / 8)); `<site>@<step>/energy` is float32 (votes, heads,
            query_blocks, key_blocks), if energies are kept; `<site>@<step>/repetition` is float32
            (4, votes, heads), as `calibration.repetition` describes it.
    """

    name: str
    about: dict[str, Any]
    model: ModelIdentity | None
    grid: tuple[int, int, int]
    text: Literal["first", "last"] | None
    block: tuple[int, int]
    token_order: str = "raster"
    scheduler: str | None
    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...] | None
    positions: tuple[int, ...]
    schedule_steps: int
    thresholds: dict[str, float]
    guided: bool
    batched: bool | None = None
    sites: tuple[SiteSize, ...]
    votes: dict[str, tuple[int, ...]]
    kept_mass: dict[str, tuple[float, ...]]
    best_share: dict[str, tuple[float, ...]]
    anchor_rows: int = 0
    form: Literal["masks", "zones"] = "masks"
    step_groups: int = 0
    fixed_by: FixedBy | None = None
    tensors: dict[str, str] = Field(default_factory=dict)

    @property
    def video(self) -> int:
        """Tokens of the grid."""
        return math.prod(self.grid)
