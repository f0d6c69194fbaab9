"""What a plan records beside its bits: the JSON in the header of a plan file.

Room for later: `requires` lists features that a reader must know (a reader that does not refuses
the plan instead of misreading it), `head_forms` lets heads of a site differ in form, sites carry
their own block sizes and two independent lengths.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    model_validator,
)

from calibatt_compiler.errors import PlanError
from calibatt_compiler.plan.order import TokenOrder

SCHEMA_VERSION: Literal[2] = 2
KNOWN_FEATURES = frozenset({"pooled_keys", "token_order", "weights"})
"""Values of `PlanMetadata.requires` that this version can serve."""

Size = Annotated[int, Field(ge=1, le=1 << 24)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Density = Annotated[float, Field(gt=0, le=1)]
Figures = Annotated[
    Mapping[str, float],
    AfterValidator(lambda figures: MappingProxyType(dict(figures))),
    PlainSerializer(dict),
]
"""Named numbers, read-only."""


def _known_order(name: str) -> str:
    try:
        return str(TokenOrder.parse(name))
    except PlanError as error:
        raise ValueError(error.problem) from error


TextPolicy = Literal["none", "in_mask", "dense_first", "dense_last"]
CfgMode = Literal["none", "separate", "batched", "embedded"]


class _Record(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, ser_json_inf_nan="strings"
    )


class ModelIdentity(_Record):
    """Which model a plan was calibrated on.

    Attributes:
        class_name: class of the transformer, such as `WanTransformer3DModel`.
        config_digest: SHA-256 of its configuration; weights are left out, so that a fine-tune or
            a LoRA keeps the plan.
    """

    class_name: str
    config_digest: str


class Sampler(_Record):
    """The diffusion steps of a plan.

    Attributes:
        name: class of the scheduler, if known.
        timesteps: what the model is given at each step, in sampling order; strictly monotonic.
        sigmas: noise levels of the same steps, if known.
    """

    name: str | None = None
    timesteps: Annotated[tuple[float, ...], Field(min_length=1, max_length=10_000)]
    sigmas: tuple[float, ...] | None = None

    @model_validator(mode="after")
    def _check(self) -> Sampler:
        pairs = list(zip(self.timesteps, self.timesteps[1:], strict=False))
        falling, rising = all(a > b for a, b in pairs), all(a < b for a, b in pairs)
        if not (falling or rising):
            raise ValueError("timesteps must be strictly monotonic")
        if self.sigmas is not None and len(self.sigmas) != len(self.timesteps):
            raise ValueError("sigmas must be as many as timesteps")
        return self


class CalibrationInputs(_Record):
    """What a plan was calibrated on: how many inputs, and a hash of prompts and seeds."""

    count: Annotated[int, Field(ge=0)]
    digest: str


class SiteRecord(_Record):
    """One attention call of the model.

    Attributes:
        name: module of the call, such as `blocks.3.attn1`.
        heads: number of heads.
        head_dim: channels a head, if known (kernels can then be built without the model).
        query_length: tokens on the query side; independent of `key_length`.
        key_length: tokens on the key side.
        block_m: tokens a query block.
        block_n: tokens a key block.
        pooled: keys that each dropped block is pooled to; 0 drops it.
        weighted: whether kept blocks of some pattern have weights.
        head_forms: form of each head; only `blocks` exists in this schema version.
        patterns: how many distinct patterns are stored.
        digests: `BlockPattern.digest` of each.
        steps: for each step, the index of its pattern.
        density: for each step, kept blocks / all blocks.
    """

    name: Annotated[str, Field(min_length=1, max_length=500)]
    heads: Annotated[int, Field(ge=1, le=1 << 12)]
    head_dim: Annotated[int, Field(ge=1, le=1 << 12)] | None = None
    query_length: Size
    key_length: Size
    block_m: Annotated[int, Field(ge=16, le=1024, multiple_of=16)]
    block_n: Annotated[int, Field(ge=16, le=1024, multiple_of=16)]
    pooled: Annotated[int, Field(ge=0, le=1024)] = 0
    weighted: bool = False
    head_forms: Literal["blocks"] = "blocks"
    patterns: Annotated[int, Field(ge=1)]
    digests: tuple[Digest, ...]
    steps: tuple[int, ...]
    density: tuple[Density, ...]

    @model_validator(mode="after")
    def _check(self) -> SiteRecord:
        if any(not 0 <= index < self.patterns for index in self.steps):
            raise ValueError(f"steps must index the {self.patterns} patterns of the site")
        if len(set(self.steps)) != self.patterns:
            raise ValueError("each pattern must be that of some step")
        if len(self.digests) != self.patterns:
            raise ValueError("digests must have one entry a pattern")
        if self.name == "__metadata__":
            raise ValueError("the file format keeps this name for itself")
        if len(self.density) != len(self.steps):
            raise ValueError("density must have one entry a step")
        if len(set(zip(self.steps, self.density, strict=True))) != self.patterns:
            raise ValueError("steps of one pattern must have one density")
        return self


class PlanMetadata(_Record):
    """Everything about a plan but its bits.

    Attributes:
        schema_version: layout of the file; a reader refuses a newer one.
        producer: package and version that wrote it.
        requires: features a reader must know.
        model: the model it was calibrated on; None for masks of the user's own.
        grid: latent tokens (frames, height, width) after patching.
        token_order: how the grid's tokens are laid out before they are cut into blocks: `raster`,
            as the model has them, frames x height x width of a tile, such as `2x8x8`, or of ropes
            along one axis, such as `2x8xall`.
        text_policy: `none`: video tokens only; `in_mask`: text tokens are part of the sequence
            and of its blocks; `dense_first`, `dense_last`: likewise, they stand first or last, and
            each of their blocks is kept, so that the plan serves other text lengths too.
        cfg: how classifier-free guidance is run: in two calls, in one batched call, embedded in
            the model, or not at all. Patterns come from the conditional branch.
        sampler: the diffusion steps.
        thresholds: numbers that the selection used, such as `A`, `C`, `k`, `rho`.
        inputs: what it was calibrated on.
        quality: figures that were measured; density that sharing and merging added.
        sites: the attention calls.
    """

    schema_version: Literal[2] = SCHEMA_VERSION
    producer: str
    requires: tuple[str, ...] = ()
    model: ModelIdentity | None = None
    grid: tuple[Size, Size, Size]
    token_order: Annotated[str, AfterValidator(_known_order)] = "raster"
    text_policy: TextPolicy = "none"
    cfg: CfgMode = "none"
    sampler: Sampler
    thresholds: Figures = MappingProxyType({})
    inputs: CalibrationInputs = CalibrationInputs(count=0, digest="")
    quality: Figures = MappingProxyType({})
    sites: tuple[SiteRecord, ...]

    @model_validator(mode="after")
    def _check(self) -> PlanMetadata:
        names = [site.name for site in self.sites]
        if len(set(names)) != len(names):
            raise ValueError("site names must be distinct")
        if not names:
            raise ValueError("a plan needs at least one site")
        if used := features(self.token_order, self.sites) - set(self.requires):
            raise ValueError(f"it uses {sorted(used)} but does not require them")
        shortest = min(min(site.query_length, site.key_length) for site in self.sites)
        if self.token_order != "raster" and shortest < math.prod(self.grid):
            raise ValueError(f"token_order is of {self.grid} tokens, a sequence has {shortest}")
        for site in self.sites:
            if len(site.steps) != len(self.sampler.timesteps):
                raise ValueError(
                    f"site {site.name} has {len(site.steps)} steps, the sampler has "
                    f"{len(self.sampler.timesteps)}"
                )
        return self


def features(token_order: str, sites: Iterable[SiteRecord]) -> frozenset[str]:
    """Return what a reader of a plan must know, of `KNOWN_FEATURES`."""
    sites = tuple(sites)
    used = {
        "pooled_keys": any(site.pooled for site in sites),
        "token_order": token_order != "raster",
        "weights": any(site.weighted for site in sites),
    }
    return frozenset(name for name, is_used in used.items() if is_used)
