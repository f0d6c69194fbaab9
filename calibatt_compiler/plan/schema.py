"""What a plan records beside its bits: the JSON in the header of a plan file.

Room for later: `requires` lists features that a reader must know (a reader that does not refuses
the plan instead of misreading it), `head_forms` lets heads of a site differ in form, sites carry
their own block sizes and two independent lengths.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from calibatt_compiler.errors import PlanError
from calibatt_compiler.plan.coordinates import OF_VIDEO
from calibatt_compiler.plan.copies import AnchorRows
from calibatt_compiler.plan.order import TokenOrder
from calibatt_compiler.plan.sizes import MAX_HEADS, MAX_LENGTH, MAX_ORDERED, MAX_SITES, MAX_STEPS
from calibatt_compiler.plan.text import TextPosition
from calibatt_compiler.plan.zones.drawing import UNIT

SCHEMA_VERSION: Literal[2] = 2
KNOWN_FEATURES = frozenset(
    {
        "fixed_by",
        "kept_weights",
        "model_entries",
        "pooled_keys",
        "repetition",
        "token_order",
        "zones",
    }
)
"""Values of `PlanMetadata.requires` that this version can serve."""

Size = Annotated[int, Field(ge=1, le=MAX_LENGTH)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Density = Annotated[float, Field(gt=0, le=1)]
Text = Annotated[str, Field(max_length=500)]
_READ_ONLY = (AfterValidator(lambda given: MappingProxyType(dict(given))), PlainSerializer(dict))
_NOTHING: Any = Field(default_factory=lambda: MappingProxyType({}))
Figures = Annotated[Mapping[str, float], *_READ_ONLY]
"""Named numbers, read-only."""


def _known_order(name: str) -> str:
    try:
        return str(TokenOrder.parse(name))
    except PlanError as error:
        raise ValueError(error.problem) from error


T = TypeVar("T")
_ByStep = Annotated[tuple[T, ...], Field(max_length=MAX_STEPS, fail_fast=True)]

TextPolicy = Literal["none", "in_mask", "dense_first", "dense_last"]
TEXT_POSITIONS: Mapping[str, TextPosition] = {"dense_first": "first", "dense_last": "last"}
"""Where text stands whose blocks are all kept, by text policy."""

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
            a LoRA keeps the plan, and how it is quantised.
        entries: names of the configuration that the digest is of; empty in plans of versions before
            and of models without a configuration: all of it.
    """

    class_name: Text
    config_digest: Text
    entries: Annotated[tuple[Text, ...], Field(max_length=1_000, fail_fast=True)] = ()

    @model_serializer(mode="wrap")
    def _written(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out `entries` where there are none: such plans keep their digests."""
        record: dict[str, Any] = serialize(self)
        if not self.entries:
            record.pop("entries", None)
        return record


class Sampler(_Record):
    """The diffusion steps of a plan.

    Attributes:
        name: class of the scheduler, if known.
        timesteps: what the model is given at each step, in sampling order; strictly monotonic.
        sigmas: noise levels of the same steps, if known.
    """

    name: Text | None = None
    timesteps: Annotated[
        tuple[float, ...], Field(min_length=1, max_length=MAX_STEPS, fail_fast=True)
    ]
    sigmas: Annotated[tuple[float, ...], Field(max_length=MAX_STEPS, fail_fast=True)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Sampler:
        pairs = list(zip(self.timesteps, self.timesteps[1:], strict=False))
        falling, rising = all(a > b for a, b in pairs), all(a < b for a, b in pairs)
        if not (falling or rising):
            raise ValueError("timesteps must be strictly monotonic")
        if self.sigmas is not None and len(self.sigmas) != len(self.timesteps):
            raise ValueError("sigmas must be as many as timesteps")
        return self


class FixedBy(_Record):
    """What fixed the tokens of a plan: the arguments of the model's calls in calibration.

    Attributes:
        grid: where the plan's grid comes from: read from the `call`; given in the `settings`; or
            not known, so that it is (1, 1, `length` of the sequence).
        shapes: of the tensors, by argument; the first dimension, of samples, is None.
        integers: of the arguments that are numbers, by argument.
        coordinates: by argument, the digest of the tokens' coordinates; see `plan.coordinates`.
    """

    grid: Literal["call", "settings", "length"]
    shapes: Annotated[
        Mapping[str, Annotated[tuple[int | None, ...], Field(max_length=16, fail_fast=True)]],
        *_READ_ONLY,
    ] = _NOTHING
    integers: Annotated[Mapping[str, int], *_READ_ONLY] = _NOTHING
    coordinates: Annotated[
        Mapping[str, Annotated[str, Field(pattern="^[0-9a-f]{16}$")]], *_READ_ONLY
    ] = _NOTHING

    def agreed(self, other: FixedBy) -> FixedBy:
        """Return what two calls have in common."""
        shared = {
            name: dict(getattr(self, name).items() & getattr(other, name).items())
            for name in ("shapes", "integers", "coordinates")
        }
        return self.model_copy(update=shared)

    def contradicts(self, other: FixedBy) -> str | None:
        """Say what shows that two calls lay their tokens out differently, if something does.

        Of shapes that is one whose dimensions are exchanged: others may be those of a text.
        """
        for name, digest in self.coordinates.items():
            if name in OF_VIDEO and other.coordinates.get(name, digest) != digest:
                return f"other {name}"
        for name, dims in self.shapes.items():
            got = other.shapes.get(name, dims)
            if dims != got and len(dims) > 3 and sorted(map(str, dims)) == sorted(map(str, got)):
                return f"{name} of shape {got} instead of {dims}"
        return None


class CalibrationInputs(_Record):
    """What a plan was calibrated on: how many inputs, and a hash of prompts and seeds."""

    count: Annotated[int, Field(ge=0)]
    digest: Text


class ZoneRecord(_Record):
    """How the zones of a site are drawn; see `ZonePattern`."""

    formula: Literal[1] = 1
    seed: Annotated[int, Field(ge=0, lt=UNIT)] = 0


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
        head_forms: `blocks`: every head is a set of blocks; `mixed`: some head of some pattern is
            row-shared.
        anchor_rows: rows of a frame that row-shared heads compute; 0 if there is none.
        repetitive: for each step, how many heads are row-shared; empty if there is none.
        zones: how zones are drawn; None of masks.
        patterns: how many distinct patterns are stored, masks or zones.
        digests: `BlockPattern.digest` or `ZonePattern.digest` of each.
        steps: for each step, the index of its pattern.
        density: for each step, kept blocks / all blocks.
    """

    name: Annotated[str, Field(min_length=1, max_length=500)]
    heads: Annotated[int, Field(ge=1, le=MAX_HEADS)]
    head_dim: Annotated[int, Field(ge=1, le=1 << 12)] | None = None
    query_length: Size
    key_length: Size
    block_m: Annotated[int, Field(ge=16, le=1024, multiple_of=16)]
    block_n: Annotated[int, Field(ge=16, le=1024, multiple_of=16)]
    pooled: Annotated[int, Field(ge=0, le=1024)] = 0
    weighted: bool = False
    head_forms: Literal["blocks", "mixed"] = "blocks"
    anchor_rows: Annotated[int, Field(ge=0, le=1 << 24)] = 0
    zones: ZoneRecord | None = None
    patterns: Annotated[int, Field(ge=1)]
    digests: _ByStep[Digest]
    steps: _ByStep[int]
    density: _ByStep[Density]
    repetitive: _ByStep[Annotated[int, Field(ge=0)]] = ()

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
        if self.zones is not None:
            if self.weighted or self.pooled or self.head_forms != "blocks":
                raise ValueError("zones have no weights of their own, pooled keys or copied rows")
        elif len(set(zip(self.steps, self.density, strict=True))) != self.patterns:
            raise ValueError("steps of one pattern must have one density")
        if self.head_forms == "mixed":
            self._check_mixed()
        elif self.anchor_rows or self.repetitive:
            raise ValueError("head_forms says that no head is repetitive")
        return self

    def _check_mixed(self) -> None:
        if not self.anchor_rows or not any(self.repetitive):
            raise ValueError("mixed head_forms need anchor_rows and row-shared heads")
        if len(self.repetitive) != len(self.steps) or max(self.repetitive) > self.heads:
            raise ValueError("repetitive must have one entry a step, at most all heads")
        if len(set(zip(self.steps, self.repetitive, strict=True))) != self.patterns:
            raise ValueError("steps of one pattern must have as many row-shared heads")

    @model_serializer(mode="wrap")
    def _written(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what is said of row-shared heads and of zones where there are none.

        So plans without them keep the digests that they had before there were such.
        """
        record: dict[str, Any] = serialize(self)
        if self.head_forms == "blocks":
            record.pop("anchor_rows", None)
            record.pop("repetitive", None)
        if self.zones is None:
            record.pop("zones", None)
        return record


class PlanMetadata(_Record):
    """Everything about a plan but its bits.

    Attributes:
        schema_version: layout of the file; a reader refuses a newer one.
        producer: package and version that wrote it.
        requires: features a reader must know.
        model: the model it was calibrated on; None for masks of the user's own.
        grid: latent tokens (frames, height, width) after patching.
        token_order: how the grid's tokens are laid out before they are cut into blocks: `raster`,
            as the model has them, frames x height x width of a tile, such as `2x8x8`, or of strips
            along one axis, such as `2x8xall`.
        text_policy: `none`: video tokens only; `in_mask`: text tokens are part of the sequence
            and of its blocks; `dense_first`, `dense_last`: they are, stand first or last, and
            each of their blocks is kept, so that the plan serves other text lengths too.
        cfg: how classifier-free guidance is run: in two calls, in one batched call, embedded in
            the model, or not at all. Patterns come from the conditional branch.
        sampler: the diffusion steps.
        thresholds: numbers that the selection used, such as `A`, `C`, `k`, `rho`.
        inputs: what it was calibrated on.
        quality: figures that were measured; density that sharing and merging added.
        fixed_by: what fixed the tokens in calibration; None for masks of the user's own, and in
            plans of versions that did not record it.
        sites: the attention calls.
    """

    schema_version: Literal[2] = SCHEMA_VERSION
    producer: Text
    requires: Annotated[tuple[str, ...], Field(max_length=64, fail_fast=True)] = ()
    model: ModelIdentity | None = None
    grid: tuple[Size, Size, Size]
    token_order: Annotated[str, AfterValidator(_known_order)] = "raster"
    text_policy: TextPolicy = "none"
    cfg: CfgMode = "none"
    sampler: Sampler
    thresholds: Figures = _NOTHING
    inputs: CalibrationInputs = CalibrationInputs(count=0, digest="")
    quality: Figures = _NOTHING
    fixed_by: FixedBy | None = None
    sites: Annotated[tuple[SiteRecord, ...], Field(max_length=MAX_SITES, fail_fast=True)]

    @model_validator(mode="after")
    def _check(self) -> PlanMetadata:
        names = [site.name for site in self.sites]
        if len(set(names)) != len(names):
            raise ValueError("site names must be distinct")
        if not names:
            raise ValueError("a plan needs at least one site")
        if used := features(self.token_order, self.sites, self.fixed_by, self.model) - set(
            self.requires
        ):
            raise ValueError(f"it uses {sorted(used)} but does not require them")
        shortest = min(min(site.query_length, site.key_length) for site in self.sites)
        if self.token_order != "raster" and shortest < math.prod(self.grid):
            raise ValueError(f"token_order is of {self.grid} tokens, a sequence has {shortest}")
        if math.prod(self.grid) > MAX_LENGTH:
            raise ValueError(f"a grid has at most {MAX_LENGTH} tokens, not {self.grid}")
        if self.token_order != "raster" and math.prod(self.grid) > MAX_ORDERED:
            raise ValueError(f"token_order is of at most {MAX_ORDERED} tokens, not {self.grid}")
        for site in self.sites:
            if site.anchor_rows and site.query_length > MAX_ORDERED:
                raise ValueError(f"site {site.name}: rows of over {MAX_ORDERED} tokens are copied")
            if len(site.steps) != len(self.sampler.timesteps):
                raise ValueError(
                    f"site {site.name} has {len(site.steps)} steps, the sampler has "
                    f"{len(self.sampler.timesteps)}"
                )
            try:
                self.copies(site)
            except PlanError as error:
                raise ValueError(f"site {site.name}: {error.problem}") from error
        return self

    @model_serializer(mode="wrap")
    def _written(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out `fixed_by` where it is not known: such plans keep their digests."""
        record: dict[str, Any] = serialize(self)
        if self.fixed_by is None:
            record.pop("fixed_by", None)
        return record

    def copies(self, site: SiteRecord) -> AnchorRows | None:
        """Return what the row-shared heads of a site copy; None if there are none.

        Raises:
            PlanError: the rows of the grid can't be found in the site's sequence.
        """
        if not site.anchor_rows:
            return None
        text = site.query_length - math.prod(self.grid)
        if text < 0 or (text and self.text_policy not in ("dense_first", "dense_last")):
            raise PlanError(
                "row-shared heads need to know where the grid's tokens are",
                expected=f"queries of {self.grid} tokens; or with text, all its blocks kept, and "
                "text_policy dense_first or dense_last",
                got=f"{site.query_length} queries, text_policy {self.text_policy}",
                remedy="leave row-shared heads out of this site",
            )
        first = text if self.text_policy == "dense_first" else 0
        return AnchorRows(self.grid, site.anchor_rows, first, TokenOrder.parse(self.token_order))

    def zone_text(self, site: SiteRecord) -> tuple[int, TextPosition | None]:
        """Return `video` and `text` of a site's zones: video tokens, and where text stands."""
        position = TEXT_POSITIONS.get(self.text_policy)
        video = math.prod(self.grid)
        if position is None or max(site.query_length, site.key_length) <= video:
            return 0, None
        return video, position


def features(
    token_order: str,
    sites: Iterable[SiteRecord],
    fixed_by: FixedBy | None = None,
    model: ModelIdentity | None = None,
) -> frozenset[str]:
    """Return what a reader of a plan must know, of `KNOWN_FEATURES`."""
    sites = tuple(sites)
    used = {
        "pooled_keys": any(site.pooled for site in sites),
        "repetition": any(site.head_forms == "mixed" for site in sites),
        "token_order": token_order != "raster",
        "kept_weights": any(site.weighted for site in sites),
        "zones": any(site.zones is not None for site in sites),
        "fixed_by": fixed_by is not None,
        "model_entries": model is not None and bool(model.entries),
    }
    return frozenset(name for name, is_used in used.items() if is_used)
