"""What serves a site: a plan's kernels at inference, a recorder in calibration."""

from __future__ import annotations

from dataclasses import replace

import torch

from calibatt_compiler.binding.model_call import ModelCallReader
from calibatt_compiler.binding.parts import PartCall
from calibatt_compiler.binding.plan_sites import NOT_PLANNED, PlanSites, check_model
from calibatt_compiler.capture import Recorder, Site, SiteInfo
from calibatt_compiler.model.calls import another_size, transformer_of
from calibatt_compiler.model.dynamo import FrameInputs
from calibatt_compiler.options import CompileOptions
from calibatt_compiler.passes.graph import BY_FLEX, example
from calibatt_compiler.passes.rewrite import Layout, SdpaCall, Skip, site_key
from calibatt_compiler.plan import Plan, SitePatterns
from calibatt_compiler.runtime.graph import ServedGraph
from calibatt_compiler.runtime.site import DenseSite, RecordingSite

SCATTERED = "several calls of one module, of which only some are in this graph"


class PlanBinder:
    """Binds the sites of a plan, where plan and call agree.

    Attributes:
        expectation: what the plan was made for, in words.
        watch: remembers the timesteps that the graph is given.

    Raises:
        PlanMismatchError: the plan was calibrated on another model.
    """

    def __init__(self, options: CompileOptions, inputs: FrameInputs, sites: PlanSites) -> None:
        self._plan = options.plan
        _check_model(self._plan, inputs)
        # A part of a model compares sizes when it runs: see `model_call`.
        self._size = another_size(self._plan, inputs) if inputs.whole else None
        self._path = inputs.place.path
        self._sites = sites
        self.watch = self._sites.watch
        self.expectation = self._sites.expectation

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
        if planned is None and self._path and info.skip in (None, "cross-attention"):
            # Dynamo may run this graph for other parts, which the plan has.
            planned = self._other(call.key)
        if planned is None:
            return Skip(info.skip or NOT_PLANNED)
        if self._size is not None and info.skip != BY_FLEX:
            return Skip(self._size, mismatch=True)
        if info.skip not in (None, "cross-attention"):
            return Skip(info.skip)  # such as a mask, which says nothing of the size
        if self._path and self._calls_in_module(info.name) > call.repeats:
            return Skip(SCATTERED)
        if (misfit := self._sites.misfit(planned, info)) is not None:
            return misfit
        if info.name not in self._plan.sites:
            return DenseSite()
        query = example(call.operands["query"])
        assert query is not None
        return self._sites.site(info, query.device, call.dtype)

    def settled(self, info: SiteInfo) -> SiteInfo:
        """Return a call that is served with the plan's sizes: others were guarded against."""
        place = site_key(info.name, self._path)
        planned = self._plan.sites.get(info.name) or self._other(place)
        assert planned is not None, "it is served"
        return replace(info, query_length=planned.query_length, key_length=planned.key_length)

    def _other(self, key: str) -> SitePatterns | None:
        """Return a site of another part that its graph would call the same, if the plan has one."""
        return next((s for name, s in self._plan.sites.items() if name.endswith(key)), None)

    def _calls_in_module(self, name: str) -> int:
        """Return how many calls a module has at least, as far as the plan knows."""
        base = name.partition(":")[0]
        same = (site.partition(":") for site in self._plan.sites)
        return max((1 + int(n or 0) for site, _, n in same if site == base), default=0)


class RecordingBinder:
    """Binds every site that could be sparse to a recorder.

    Args:
        recorder: what is shown the calls.
        reader: reads the timestep of the model's calls, for its parts.
        seen: takes the calls of parts, by name.

    Attributes:
        layout: None: a recorder is shown tokens in the model's order.
    """

    layout = None

    def __init__(
        self,
        recorder: Recorder,
        reader: ModelCallReader | None = None,
        seen: dict[str, SiteInfo] | None = None,
    ) -> None:
        self._recorder = recorder
        self._reader = reader
        self._seen = {} if seen is None else seen

    @property
    def reader(self) -> ModelCallReader:
        """As in `PartBinder`."""
        assert self._reader is not None, "it was made for parts"
        return self._reader

    def bind(self, call: SdpaCall) -> Site | Skip:
        """Return a recording site, or why the call is not recorded."""
        if call.info.skip is not None:
            return Skip(call.info.skip)
        return RecordingSite(self._recorder, call.info.name)

    def bind_part(self, call: PartCall, info: SiteInfo) -> Site | Skip:
        """As in `PartBinder`."""
        self._seen[info.name] = info
        return RecordingSite(self._recorder, info.name)

    def skipped(self, root: torch.nn.Module | None, path: str, served: ServedGraph) -> None:
        """Record the calls of a part that are not recorded."""
        for name, reason in served.entries.items():
            if isinstance(reason, str):
                self._seen[name] = SiteInfo(name, 0, 0, 0, 0, skip=reason)

    def settled(self, info: SiteInfo) -> SiteInfo:
        """As in `Binder`."""
        return replace(info, query_length=int(info.query_length), key_length=int(info.key_length))


def _check_model(plan: Plan, inputs: FrameInputs) -> None:
    model = plan.metadata.model
    module = None if model is None else transformer_of(inputs, model.class_name)
    if module is not None:
        check_model(plan, module)
