"""What serves the sites of one model: made once, for all graphs that are parts of it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from calibatt_compiler.binding.model_call import ModelCallReader
from calibatt_compiler.binding.parts import PartCall
from calibatt_compiler.binding.pinned import PinnedOptions
from calibatt_compiler.binding.said import Said, said_of
from calibatt_compiler.capture import Site, SiteInfo
from calibatt_compiler.errors import KernelError, PlanMismatchError
from calibatt_compiler.kernels.request import KernelSettings, Padded
from calibatt_compiler.model import families as models
from calibatt_compiler.model.calls import hint
from calibatt_compiler.options import CompileOptions
from calibatt_compiler.passes.rewrite import Skip
from calibatt_compiler.plan import Plan, SitePatterns
from calibatt_compiler.plan.text import other_text
from calibatt_compiler.runtime.coordinates import PlanCoordinates
from calibatt_compiler.runtime.device_queue import queue_of
from calibatt_compiler.runtime.kernel_cache import KernelCache, table_budget
from calibatt_compiler.runtime.sampler_watch import SamplerWatch
from calibatt_compiler.runtime.site import SparseSite, expected_padding

NOT_PLANNED = "not in the plan"


class PlanSites:
    """Sites of a plan and the kernels that they hold, by name.

    Attributes:
        watch: remembers the timesteps that the model is given.
        expectation: what the plan was made for, in words.
        reader: reads the timestep of the model's calls, for its parts.
    """

    def __init__(self, options: CompileOptions, said: Said) -> None:
        self._options = options
        self._plan = options.plan
        self._said = said
        frames, height, width = self._plan.grid
        self.watch = SamplerWatch(self._plan, lambda note: said.warn("sampler", "%s", note))
        self.expectation = f"{frames} x {height} x {width} latent tokens"
        self.reader = ModelCallReader(self._plan, PlanCoordinates(self._plan))
        self._caches: dict[tuple[torch.device, torch.dtype, Padded], KernelCache] = {}
        self._sites: dict[tuple[str, KernelSettings], SparseSite] = {}

    def bind_part(self, call: PartCall, info: SiteInfo) -> Site | Skip:
        """As in `PartBinder`.

        Raises:
            PlanMismatchError: the plan does not fit the call, and that was to be an error.
        """
        planned = self._plan.sites.get(info.name)
        if planned is None:
            return Skip(NOT_PLANNED)
        found = self.misfit(planned, info) or self.site(info, call.device, call.dtype)
        if isinstance(found, Skip) and found.mismatch and self._options.on_mismatch == "error":
            raise misfit_error([(info.name, found.reason)], 1, self.expectation)
        if isinstance(found, Skip):
            say_dense(self._said, info.name, found.reason)
        return found

    def misfit(self, planned: SitePatterns, info: SiteInfo) -> Skip | None:
        """Return why a call does not fit what the plan has for it; None if it does."""
        for what, expected, got in (
            ("heads", planned.heads, info.heads),
            *self._lengths(planned, info),
            ("channels a head", planned.head_dim or info.head_dim, info.head_dim),
        ):
            # A symbolic size is compared here, which makes Dynamo guard on the answer.
            if got != expected:
                return Skip(f"{hint(got)} {what} instead of {expected}", mismatch=True)
        return None

    def site(self, info: SiteInfo, device: torch.device, dtype: torch.dtype) -> Site | Skip:
        """Return the site of a call that fits, or that there is no kernel for it."""
        settings = KernelSettings(
            device=device,
            dtype=dtype,
            head_dim=info.head_dim,
            lowering=self._options.lowering,
            softmax=self._options.softmax,
            hopper=self._options.hopper,
            padded=expected_padding(self._plan) if info.padded else "",
        )
        # Graphs of one model's parts share a binder, and so its sites.
        known = self._sites.get((info.name, settings))
        if known is not None:
            return known
        try:
            site = SparseSite(
                self._plan,
                info.name,
                settings,
                monitor=self._options.monitor,
                on_mismatch=self._options.on_mismatch,
                watch=self.watch,
                kernels=self._cache(settings),
            )
        except KernelError as error:
            return Skip(f"no kernel: {error.problem}")
        self._sites[info.name, settings] = site
        return site

    def _cache(self, settings: KernelSettings) -> KernelCache:
        key = settings.device, settings.dtype, settings.padded
        if key not in self._caches:
            budget = table_budget(self._plan, self._options.table_memory)
            self._caches[key] = KernelCache(queue_of(settings.device), budget=budget)
        return self._caches[key]

    def _lengths(self, planned: SitePatterns, info: SiteInfo) -> list[tuple[str, int, Any]]:
        """Return the lengths that must be equal: none where only the text's may differ."""
        expected = (planned.query_length, planned.key_length)
        got = (info.query_length, info.key_length)
        if any(free_unbacked_symbols(length) for length in got):
            return []  # the site looks at each call
        if self._plan.text_position is not None and other_text(
            expected, got, math.prod(self._plan.grid)
        ):
            return []
        return list(zip(("query tokens", "key tokens"), expected, got, strict=True))


_shared: WeakKeyDictionary[torch.nn.Module, list[tuple[PinnedOptions, weakref.ref[PlanSites]]]] = (
    WeakKeyDictionary()
)


def sites_of(root: torch.nn.Module, pinned: PinnedOptions) -> PlanSites:
    """Return the sites that graphs of a model's parts share, while one of them lives.

    Args:
        root: the model.
        pinned: options of the compile call.
    """
    held = _shared.setdefault(root, [])
    for options, reference in held:
        if options == pinned and (sites := reference()) is not None:
            return sites
    check_model(pinned.options.plan, root)
    sites = PlanSites(pinned.options, said_of(root, pinned))
    held[:] = [each for each in held if each[1]() is not None]
    held.append((pinned, weakref.ref(sites)))
    return sites


def say_dense(said: Said, site: str, reason: str) -> None:
    """Warn, once for a reason, that a site of the plan runs dense."""
    said.warn(reason, "sites of the plan such as %s run dense: %s", site, reason)


def misfit_error(
    wrong: Sequence[tuple[str, str]], calls: int, expectation: str
) -> PlanMismatchError:
    """Return the error for calls, by name and reason, that a plan does not fit."""
    name, reason = wrong[0]
    return PlanMismatchError(
        f"the plan does not fit {len(wrong)} of {calls} attention calls",
        expected=expectation,
        got=f"{name}: {reason}",
        remedy='calibrate for this size, or pass on_mismatch="dense" to run it dense',
    )


def check_model(plan: Plan, module: torch.nn.Module) -> None:
    """Raise `PlanMismatchError` if what was found in a frame is another model than a plan's."""
    expected = plan.metadata.model
    if expected is None:
        return
    own = models.is_class(type(module), expected.class_name)
    if own or models.config_of(module):  # else it is a frame inside the model, or around it
        check_identity(plan, module)


def check_identity(plan: Plan, module: torch.nn.Module) -> None:
    """Raise `PlanMismatchError` if a plan was calibrated on another model."""
    expected = plan.metadata.model
    if expected is None:
        return
    got = models.identify(module)
    if not models.is_class(type(module), expected.class_name):
        raise PlanMismatchError(
            "the plan was calibrated on a model of another class",
            expected=expected.class_name,
            got=got.class_name,
            remedy="compile the transformer itself, with the plan made for it",
        )
    if not models.is_model(expected, module):
        raise PlanMismatchError(
            f"the plan was calibrated on a {expected.class_name} of another configuration",
            expected=f"configuration digest {expected.config_digest[:16]}",
            got=got.config_digest[:16],
            remedy="use the plan of this model, or calibrate it with `calibatt calibrate`",
        )
