"""What serves a site: a plan's kernels at inference, a recorder in calibration."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from calibatt_compiler import models
from calibatt_compiler.calls import another_size, hint, transformer_of
from calibatt_compiler.capture import Recorder, Site, SiteInfo
from calibatt_compiler.dynamo import FrameInputs
from calibatt_compiler.errors import KernelError, PlanMismatchError
from calibatt_compiler.kernels.request import KernelSettings
from calibatt_compiler.options import CompileOptions
from calibatt_compiler.passes.graph import example
from calibatt_compiler.passes.rewrite import Layout, SdpaCall, Skip
from calibatt_compiler.plan import Plan, SitePatterns
from calibatt_compiler.plan.text import other_text
from calibatt_compiler.runtime.device_queue import queue_of
from calibatt_compiler.runtime.kernel_cache import KernelCache, table_budget
from calibatt_compiler.runtime.sampler_watch import SamplerWatch
from calibatt_compiler.runtime.site import RecordingSite, SparseSite


class PlanBinder:
    """Binds the sites of a plan, where plan and call agree.

    Attributes:
        expectation: what the plan was made for, in words.
        watch: remembers the timesteps that the graph is given.

    Raises:
        PlanMismatchError: the plan was calibrated on another model.
    """

    def __init__(self, options: CompileOptions, inputs: FrameInputs) -> None:
        self._options = options
        self._plan = options.plan
        _check_model(self._plan, inputs)
        self._size = another_size(self._plan, inputs)
        frames, height, width = self._plan.grid
        self.watch = SamplerWatch(self._plan)
        self._caches: dict[torch.device, KernelCache] = {}
        self.expectation = f"{frames} x {height} x {width} latent tokens"

    @property
    def plan(self) -> Plan:
        """The plan that is bound."""
        return self._plan

    @property
    def layout(self) -> Layout | None:
        """Layout of tokens in the plan's patterns; None if it is the model's own."""
        plan = self._plan
        if plan.token_order.tokens(plan.grid) is None:
            return None
        return Layout(plan.token_order, plan.grid, plan.text_position == "first")

    def bind(self, call: SdpaCall) -> Site | Skip:
        """Return the site that serves a call, or why it stays dense."""
        info = call.info
        planned = self._plan.sites.get(info.name)
        if planned is None:
            return Skip(info.skip or "not in the plan")
        if info.skip not in (None, "cross-attention"):
            return Skip(str(info.skip), mismatch=True)
        if self._size is not None:
            return Skip(self._size, mismatch=True)
        for what, expected, got in (
            ("heads", planned.heads, info.heads),
            *self._lengths(planned, info),
            ("channels a head", planned.head_dim or info.head_dim, info.head_dim),
        ):
            # A symbolic size is compared here, which makes Dynamo guard on the answer.
            if got != expected:
                return Skip(f"{hint(got)} {what} instead of {expected}", mismatch=True)
        query = example(call.operands["query"])
        assert query is not None
        settings = KernelSettings(
            device=query.device,
            dtype=call.dtype,
            head_dim=info.head_dim,
            lowering=self._options.lowering,
            softmax=self._options.softmax,
            hopper=self._options.hopper,
        )
        try:
            return SparseSite(
                self._plan,
                info.name,
                settings,
                monitor=self._options.monitor,
                on_mismatch=self._options.on_mismatch,
                watch=self.watch,
                kernels=self._cache(query.device),
            )
        except KernelError as error:
            return Skip(f"no kernel: {error.problem}", mismatch=True)

    def _cache(self, device: torch.device) -> KernelCache:
        if device not in self._caches:
            budget = table_budget(self._plan, self._options.table_memory)
            self._caches[device] = KernelCache(queue_of(device), budget=budget)
        return self._caches[device]

    def _lengths(self, planned: SitePatterns, info: SiteInfo) -> list[tuple[str, int, Any]]:
        """Return the lengths that must be equal: none where only the text's may differ."""
        expected = (planned.query_length, planned.key_length)
        got = (info.query_length, info.key_length)
        if self._plan.text_position is not None and (
            any(free_unbacked_symbols(length) for length in got)  # the site looks at each call
            or other_text(expected, got, math.prod(self._plan.grid))
        ):
            return []
        return list(zip(("query tokens", "key tokens"), expected, got, strict=True))


class RecordingBinder:
    """Binds every site that could be sparse to a recorder.

    Attributes:
        layout: None: a recorder is shown tokens in the model's order.
    """

    layout = None

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def bind(self, call: SdpaCall) -> Site | Skip:
        """Return a recording site, or why the call is not recorded."""
        if call.info.skip is not None:
            return Skip(call.info.skip)
        return RecordingSite(self._recorder, call.info.name)


def _check_model(plan: Plan, inputs: FrameInputs) -> None:
    expected = plan.metadata.model
    module = None if expected is None else transformer_of(inputs, expected.class_name)
    if expected is None or module is None:
        return
    own = models.is_class(type(module), expected.class_name)
    if not own and not models.config_of(module):  # a frame inside the model, after a graph break
        return
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
