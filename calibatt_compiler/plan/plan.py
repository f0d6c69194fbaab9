"""`Plan`: for each step, site and head, the key blocks that matter; immutable."""

from __future__ import annotations

import math
import operator
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import pydantic
import torch
from torch import Tensor

from calibatt_compiler.arguments import described, require, require_path
from calibatt_compiler.errors import PlanError
from calibatt_compiler.plan import file
from calibatt_compiler.plan.order import RASTER, TokenOrder
from calibatt_compiler.plan.own_masks import check_masks, sites_of_masks
from calibatt_compiler.plan.schema import (
    TEXT_POSITIONS,
    CalibrationInputs,
    CfgMode,
    FixedBy,
    ModelIdentity,
    PlanMetadata,
    Sampler,
    TextPolicy,
    features,
)
from calibatt_compiler.plan.site import SitePatterns
from calibatt_compiler.plan.site_records import check_sites, record_of, steps_of
from calibatt_compiler.plan.text import TextPosition
from calibatt_compiler.plan.zones.own import sites_of_octaves
from calibatt_compiler.version import PRODUCER

TIMESTEP_TOLERANCE = 2.0**-8
"""Relative rounding of a timestep that passed through bfloat16, as some pipelines do."""


class Plan:
    """Calibrated block patterns of a model, for one size of video and one sampler.

    Made by `calibatt_compiler.calibrate`, by `Plan.from_masks`, or read by `Plan.load`.
    """

    __slots__ = ("__dict__", "_metadata", "_sites")

    def __init__(self, metadata: PlanMetadata, sites: Mapping[str, SitePatterns]) -> None:
        self._metadata = metadata
        self._sites = MappingProxyType(dict(sites))

    @classmethod
    def create(
        cls,
        sites: Mapping[str, SitePatterns],
        *,
        grid: tuple[int, int, int],
        sampler: Sampler,
        model: ModelIdentity | None = None,
        token_order: TokenOrder = RASTER,
        text_policy: TextPolicy = "none",
        cfg: CfgMode = "none",
        thresholds: Mapping[str, float] | None = None,
        inputs: CalibrationInputs | None = None,
        quality: Mapping[str, float] | None = None,
        fixed_by: FixedBy | None = None,
    ) -> Plan:
        """Build a plan from patterns; the long form of `from_masks`.

        Raises:
            PlanError: sizes, steps or names that don't fit together.
        """
        try:
            records = tuple(record_of(name, site) for name, site in sites.items())
            metadata = PlanMetadata(
                producer=PRODUCER,
                requires=tuple(sorted(features(str(token_order), records, fixed_by, model))),
                model=model,
                grid=grid,
                token_order=str(token_order),
                text_policy=text_policy,
                cfg=cfg,
                sampler=sampler,
                thresholds=dict(thresholds or {}),
                inputs=inputs or CalibrationInputs(count=0, digest=""),
                quality=dict(quality or {}),
                fixed_by=fixed_by,
                sites=records,
            )
        except pydantic.ValidationError as error:
            raise PlanError(
                "these patterns make no valid plan",
                got=file.describe(error),
                remedy="check grid, timesteps and the number of steps of each site",
            ) from error
        check_sites(metadata, sites)
        return cls(metadata, sites)

    @classmethod
    def from_masks(
        cls,
        masks: Mapping[str, Tensor],
        grid: tuple[int, int, int],
        timesteps: Sequence[float],
        block: tuple[int, int] = (128, 128),
        *,
        lengths: Mapping[str, tuple[int, int]] | None = None,
    ) -> Plan:
        """Build a plan from boolean masks of your own.

        Args:
            masks: for each site, bool (steps, heads, query_blocks, key_blocks); True is kept.
            grid: latent tokens (frames, height, width) after patching; calls where it can't be read
                are refused, but for (1, 1, tokens), which compares their number alone.
            timesteps: what the model is given at each step, in sampling order.
            block: tokens a query block, tokens a key block.
            lengths: for sites whose tokens are not just the grid's (text in the same sequence,
                queries and keys of different length): tokens on the query and key side.

        Raises:
            PlanError: shapes, dtypes or lengths that don't fit, or a query block that keeps none.
        """
        lengths = check_masks(masks, grid, block, lengths)
        sampler = _sampler(timesteps)
        sites = sites_of_masks(masks, grid, len(sampler.timesteps), block, lengths)
        policy: TextPolicy = "in_mask" if _longer(lengths, grid) else "none"
        return cls.create(sites, grid=grid, sampler=sampler, text_policy=policy)

    @classmethod
    def from_zones(
        cls,
        octaves: Mapping[str, Tensor],
        grid: tuple[int, int, int],
        timesteps: Sequence[float],
        block: tuple[int, int] = (128, 128),
        *,
        groups: Sequence[int] | None = None,
        lengths: Mapping[str, tuple[int, int]] | None = None,
        text: TextPolicy | None = None,
    ) -> Plan:
        """Build a plan of zones from octave maps of your own.

        A block of octave k is kept at the rate 2^-k and then counts 2^k times; which ones a step
        keeps is drawn.

        Args:
            octaves: for each site, integers (step groups, heads, query_blocks, key_blocks) from 0
                to 7; each row has a 0.
            grid: latent tokens (frames, height, width) after patching.
            timesteps: what the model is given at each step, in sampling order.
            block: tokens a query block, tokens a key block.
            groups: for each step, the index of its map; default: as many steps to each, in order.
            lengths: see `from_masks`.
            text: see `PlanMetadata.text_policy`; default `none`, or `in_mask` where sequences
                are longer than the grid. With `dense_first` and `dense_last` blocks with text have
                octave 0, and any text length is served.

        Raises:
            PlanError: shapes, octaves, groups or lengths that don't fit, or a row without octave 0.
        """
        sampler, lengths = _sampler(timesteps), lengths or {}
        policy: TextPolicy = text or ("in_mask" if _longer(lengths, grid) else "none")
        sites = sites_of_octaves(octaves, grid, len(timesteps), block, groups, lengths, policy)
        return cls.create(sites, grid=grid, sampler=sampler, text_policy=policy)

    def with_sites(
        self,
        sites: Mapping[str, SitePatterns],
        *,
        thresholds: Mapping[str, float],
        quality: Mapping[str, float],
    ) -> Plan:
        """Return a plan of other patterns that is the same in all else it records.

        Raises:
            PlanError: steps or names that don't fit together.
        """
        was = self._metadata
        try:
            records = tuple(record_of(name, site) for name, site in sites.items())
            metadata = PlanMetadata.model_validate(
                {
                    **was.model_dump(),
                    "producer": PRODUCER,
                    "requires": tuple(
                        sorted(features(was.token_order, records, was.fixed_by, was.model))
                    ),
                    "thresholds": dict(thresholds),
                    "quality": dict(quality),
                    "sites": records,
                }
            )
        except pydantic.ValidationError as error:
            raise PlanError(
                "these patterns make no valid plan",
                got=file.describe(error),
                remedy="give each site one pattern a step of the plan",
            ) from error
        check_sites(metadata, sites)
        return Plan(metadata, sites)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Open a plan file and check every byte of it.

        The file is mapped into memory, and a pattern is decoded when it is first asked for. The
        file may be replaced meanwhile, as `save` does, but not changed in place.

        Raises:
            PlanFormatError: not a plan, cut short, changed, or of another schema.
            PlanError: sizes out of range. Patterns that are none raise when they are decoded.
        """
        require_path("path", path, error=PlanError)
        metadata, stored = file.read(path)
        sites = {
            record.name: SitePatterns(stored[record.name], steps_of(record), record.head_dim)
            for record in metadata.sites
        }
        return cls(metadata, sites)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to `path`: whole or not at all.

        Raises:
            FileError: the file can't be written.
            PlanError: it would be too large for a file.
        """
        require_path("path", path, error=PlanError)
        stored = {name: site.stored for name, site in self._sites.items()}
        file.write(path, self._metadata, stored)

    def to_bytes(self) -> bytes:
        """Return what `save` writes; a pickled plan is this, and is checked as a file is."""
        with tempfile.TemporaryDirectory(prefix="calibatt-") as folder:
            path = Path(folder) / "plan.calibatt"
            self.save(path)
            return path.read_bytes()

    @classmethod
    def from_bytes(cls, content: bytes) -> Plan:
        """Read what `to_bytes` returned.

        Raises:
            PlanFormatError: as of `load`.
            PlanError: as of `load`.
        """
        with tempfile.TemporaryDirectory(prefix="calibatt-") as folder:
            path = Path(folder) / "plan.calibatt"
            path.write_bytes(content)
            return cls.load(path)

    def __reduce__(self) -> tuple[Callable[[bytes], Plan], tuple[bytes]]:
        return Plan.from_bytes, (self.to_bytes(),)

    def __deepcopy__(self, memo: object) -> Plan:
        return self  # it is immutable

    def __copy__(self) -> Plan:
        return self

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) over everything in the plan; part of every cache key.

        Patterns take part by their digests, so none is decoded, and how they are stored is no part
        of it.
        """
        return file.digest(file.to_json(self._metadata))

    @property
    def metadata(self) -> PlanMetadata:
        """What the plan records about its origin."""
        return self._metadata

    @property
    def sites(self) -> Mapping[str, SitePatterns]:
        """Patterns by site name; iterating gives the names."""
        return self._sites

    @property
    def grid(self) -> tuple[int, int, int]:
        """Latent tokens (frames, height, width)."""
        return self._metadata.grid

    @cached_property
    def token_order(self) -> TokenOrder:
        """How the grid's tokens are laid out before they are cut into blocks."""
        return TokenOrder.parse(self._metadata.token_order)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """What the model is given at each step, in sampling order."""
        return self._metadata.sampler.timesteps

    @property
    def text_position(self) -> TextPosition | None:
        """Where text stands whose blocks are all kept; None if there is none or it is not so."""
        return TEXT_POSITIONS.get(self._metadata.text_policy)

    @property
    def steps(self) -> int:
        """Number of diffusion steps."""
        return len(self.timesteps)

    @cached_property
    def _sorted_steps(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        values = np.asarray(self.timesteps, dtype=np.float64)
        order = np.argsort(values)
        return values[order], order

    def step_of(self, timestep: float) -> int | None:
        """Return the step nearest to a timestep, or None outside the plan's range.

        The range ends half a step beyond the first and the last timestep, plus what bfloat16
        rounds away.
        """
        values, order = self._sorted_steps
        try:
            timestep = float(timestep)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            require(False, "timestep", timestep, "a number", error=PlanError)
        if not math.isfinite(timestep):
            return None
        margin = abs(timestep) * TIMESTEP_TOLERANCE
        low = high = 0.0
        if len(values) > 1:
            low, high = (values[1] - values[0]) / 2, (values[-1] - values[-2]) / 2
        if not values[0] - low - margin <= timestep <= values[-1] + high + margin:
            return None
        return int(order[np.abs(values - timestep).argmin()])

    def density(self, site: str | None = None, step: int | None = None) -> float:
        """Kept blocks / all blocks of one site or all, at one step or over all.

        Raises:
            PlanError: no such site or step.
        """
        sites = self._sites.values() if site is None else [self._site(site)]
        steps = range(self.steps) if step is None else [self._step(step)]
        kept = sum(patterns.kept_at(index) for patterns in sites for index in steps)
        return kept / (len(steps) * sum(patterns.size.blocks for patterns in sites))

    def block_mask(self, site: str, step: int) -> Tensor:
        """Boolean (heads, query_blocks, key_blocks) of a site at a step; True is kept.

        The rows of a row-shared head are those of the queries that it computes.

        Raises:
            PlanError: no such site or step.
        """
        return self._site(site).at(self._step(step)).mask()

    def log_weights(self, site: str, step: int) -> Tensor:
        """Float32 (heads, query_blocks, key_blocks): natural logarithm of each block's weight.

        It is added to the scores of a kept block; 0 where that counts once.

        Raises:
            PlanError: no such site or step.
        """
        return torch.from_numpy(self._site(site).at(self._step(step)).log_weights())

    def _site(self, name: str) -> SitePatterns:
        require(isinstance(name, str), "site", name, "the name of a site", error=PlanError)
        if name not in self._sites:
            raise PlanError(
                "the plan has no such site",
                expected=f"one of {', '.join(self._sites)}",
                got=repr(name),
                remedy="`calibatt inspect` lists the sites of a plan",
            )
        return self._sites[name]

    def _step(self, step: int) -> int:
        whole = hasattr(type(step), "__index__") and getattr(step, "ndim", 0) == 0
        require(whole, "step", step, "an integer", error=PlanError)
        step = operator.index(step)
        if not -self.steps <= step < self.steps:
            raise PlanError(
                "the plan has no such step",
                expected=f"0 to {self.steps - 1}",
                got=step,
                remedy="steps count from 0, the noisiest",
            )
        return step % self.steps

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return (
            f"Plan({len(self._sites)} sites, {self.steps} steps, grid {self.grid}, "
            f"density {self.density():.3f}, digest {self.digest[:12]})"
        )


def _longer(lengths: Mapping[str, tuple[int, int]], grid: tuple[int, int, int]) -> bool:
    return any(max(pair) > math.prod(grid) for pair in lengths.values())


def _sampler(timesteps: Sequence[float]) -> Sampler:
    try:
        return Sampler(timesteps=tuple(float(value) for value in timesteps))
    except (pydantic.ValidationError, TypeError, ValueError, OverflowError) as error:
        raise PlanError(
            "the timesteps make no sampler",
            expected="finite numbers, strictly falling or strictly rising",
            got=described(timesteps),
            remedy="pass scheduler.timesteps.tolist() after scheduler.set_timesteps(...)",
        ) from error
