"""The Dynamo backend: a graph and its example inputs in, a compiled callable out."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule

from calibatt_compiler.binding.binders import PlanBinder, RecordingBinder
from calibatt_compiler.binding.hooked import compile_beneath_hooks
from calibatt_compiler.binding.model_call import ModelCallReader
from calibatt_compiler.binding.parts import PartBinder, PartSites, part_calls
from calibatt_compiler.binding.pinned import PinnedOptions
from calibatt_compiler.binding.place import placed
from calibatt_compiler.binding.plan_sites import PlanSites, misfit_error, say_dense, sites_of
from calibatt_compiler.binding.said import Said, said_of
from calibatt_compiler.capture import CaptureInfo, Recorder, SiteInfo
from calibatt_compiler.errors import CalibattError, PlanMismatchError
from calibatt_compiler.logs import logger
from calibatt_compiler.model import families as models
from calibatt_compiler.model.calls import fixed_by, read_grid, transformer_of
from calibatt_compiler.model.compile_calls import raise_recompile_limit
from calibatt_compiler.model.dynamo import FrameInputs, frame_inputs
from calibatt_compiler.options import CompileOptions
from calibatt_compiler.passes.pipeline import run_passes
from calibatt_compiler.passes.rewrite import Lowered, Rewrite, SdpaCall, Skip
from calibatt_compiler.report.keep import ReportKeeper
from calibatt_compiler.runtime.coordinates import PlanCoordinates, RecordingCoordinates
from calibatt_compiler.runtime.graph import CompiledGraph, ServedGraph
from calibatt_compiler.runtime.ops import operators_digest

log = logger("passes")
Compiled = Callable[..., Any]


def calibatt(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compile a captured graph: sparse attention from the plan, the rest by Inductor.

    Registered as the `torch.compile` backend `calibatt`; not called by hand.

    Args:
        gm: the graph that Dynamo captured.
        example_inputs: its inputs.
        mode: refused; Inductor settings go into `options["inductor"]`.
        options: see `CompileOptions`.

    Returns:
        The compiled callable. An error of ours is raised by its first call, in the user's own
        frame: raised from here, Dynamo would wrap it in an error of another class.
    """
    try:
        pinned = PinnedOptions.of(options, mode)
        raise_recompile_limit()
        plan, coordinates = pinned.options.plan, PlanCoordinates(pinned.options.plan)
        model = plan.metadata.model
        class_name = None if model is None else model.class_name
        inputs = placed(frame_inputs(gm), class_name, plan.sites)
        root, part = inputs.place.root, inputs.is_part
        said = said_of(root, pinned)
        if root is not None:
            _reach_hidden(root, inputs.place.path, plan.sites, said)
        if part and root is not None:
            sites = sites_of(root, pinned)
        else:
            sites = PlanSites(pinned.options, said)
        binder = PlanBinder(pinned.options, inputs, sites)
        rewrite = run_passes(gm, inputs, binder)
        _check(rewrite, binder, pinned.options, said)
        keeper = ReportKeeper(inputs, binder, pinned, rewrite.order_in_words())
        locate = _parts(rewrite, lambda root: sites_of(root, pinned), keeper) if part else None
        compiled = _inductor(gm, example_inputs, pinned.options.inductor)
    except CalibattError as error:
        return _raising(error)
    graph = CompiledGraph(compiled, rewrite.entries(), coordinates, locate)
    if locate is None:
        keeper(None, "", graph.served)
    return graph


def recording_backend(
    recorder: Recorder, *, inductor: bool, model: torch.nn.Module | None = None
) -> Compiled:
    """Return a backend that runs the model densely and shows each attention call to a recorder.

    Args:
        recorder: receives each captured graph, then each call.
        inductor: compile what is around attention; otherwise it runs as captured.
        model: whose attention it is; None: what the captured frames show.
    """
    held = None if model is None else weakref.ref(model)  # Dynamo keeps this backend
    coordinates = RecordingCoordinates(recorder.on_coordinates)
    seen: dict[str, SiteInfo] = {}

    def look(inputs: FrameInputs) -> None:
        capture = _capture(inputs, seen.values())
        recorder.on_capture(capture)
        recorder.on_call(capture)

    binder = RecordingBinder(recorder, ModelCallReader(None, coordinates, look), seen)

    def record(gm: GraphModule, example_inputs: Sequence[Any], **_: object) -> Compiled:
        inputs = placed(frame_inputs(gm), root=None if held is None else held())
        try:
            rewrite = run_passes(gm, inputs, binder)
            part = inputs.is_part
            locate = _parts(rewrite, lambda root: binder, binder.skipped) if part else None
            if not part:
                capture = _capture(inputs, _sites(rewrite))
                recorder.on_capture(capture)
        except CalibattError as error:
            return _raising(error)
        compiled = _inductor(gm, example_inputs, {}) if inductor else gm.forward
        graph = CompiledGraph(compiled, rewrite.entries(), coordinates, locate)
        if part:
            return graph

        def run(*args: Any) -> Any:
            recorder.on_call(capture)
            return graph(*args)

        return run

    return record


def _parts(
    rewrite: Rewrite,
    binder: Callable[[torch.nn.Module], PartBinder],
    report: Callable[[torch.nn.Module | None, str, ServedGraph], None],
) -> PartSites | None:
    """Return what tells the parts of a model that share a graph; None where it has no site."""
    if not rewrite.calls:
        return None
    return PartSites(part_calls(rewrite), rewrite.inputs.place, binder, report)


def _inductor(
    gm: GraphModule, example_inputs: Sequence[Any], settings: Mapping[str, Any]
) -> Compiled:
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    # Generated code relies on what our operators return; Inductor's caches know only their names.
    shared: Any = torch.compiler.config
    tag = f"{shared.cache_key_tag}calibatt-{operators_digest()}"
    # Random numbers as without a compiler: else a seed in the model would make another video.
    patches = {"fallback_random": True, **settings}
    # A backward pass is compiled when it is first needed: it takes the tag along.
    inner = shared.patch(cache_key_tag=tag)(compile_fx_inner)
    with shared.patch(cache_key_tag=tag):
        compiled: Compiled = compile_fx(
            gm, example_inputs, inner_compile=inner, config_patches=patches
        )
    return compiled


def _raising(error: CalibattError) -> Compiled:
    def fail(*_: Any) -> Any:
        raise error.with_traceback(None)

    return fail


def _capture(inputs: FrameInputs, sites: Iterable[SiteInfo]) -> CaptureInfo:
    module = transformer_of(inputs)
    return CaptureInfo(
        model=None if module is None else models.identify(module),
        grid=_grid(inputs),
        known=module is not None and models.family_of(type(module)) is not None,
        fixed_by=fixed_by(inputs),
        sites=tuple(sites),
    )


def _sites(rewrite: Rewrite) -> Iterator[SiteInfo]:
    for call, decision in zip(rewrite.calls, rewrite.decisions, strict=True):
        skip = decision.reason if isinstance(decision, Skip) else call.info.skip
        yield replace(call.info, skip=skip)


def _grid(inputs: FrameInputs) -> tuple[int, int, int] | None:
    grid = read_grid(inputs)
    return None if grid is None else (int(grid[0]), int(grid[1]), int(grid[2]))


def _reach_hidden(root: torch.nn.Module, path: str, sites: Iterable[str], said: Said) -> None:
    """Have blocks served that a cache's hooks hide; warn if some may have run before this part."""
    hook = compile_beneath_hooks(root)
    if hook is not None and path and _any_within(path, sites):
        said.warn(
            "hidden",
            "%s keeps the compiler out: blocks that it had called before %s ran dense; compile "
            "the whole transformer to have them served from the first call on",
            hook,
            path,
        )


def _check(rewrite: Rewrite, binder: PlanBinder, options: CompileOptions, said: Said) -> None:
    """Refuse a plan of another model, and with `on_mismatch="error"` any call it does not fit."""
    plan, inputs = options.plan, rewrite.inputs
    skips = [
        (call.info.name, decision)
        for call, decision in zip(rewrite.calls, rewrite.decisions, strict=True)
        if isinstance(decision, Skip) and (decision.mismatch or call.info.name in plan.sites)
    ]
    wrong = [(name, skip.reason) for name, skip in skips if skip.mismatch]
    if wrong and options.on_mismatch == "error":
        raise misfit_error(wrong, len(rewrite.calls), binder.expectation)
    said.met |= any(call.info.name in plan.sites for call in rewrite.calls)
    said.served |= any(isinstance(decision, Lowered) for decision in rewrite.decisions)
    whole = inputs.whole and inputs.ends and not inputs.is_part
    if skips and (wrong or said.served or not whole):
        for name, skip in skips:
            say_dense(said, name, skip.reason)
        return
    # Behind graph breaks a frame ends with its last graph: a module's own, then, and all in it.
    anchored = inputs.place.anchor is not None and _any_within(inputs.place.path, plan.sites)
    ended = whole or (inputs.resumed and inputs.ends and anchored and not said.met)
    held = {name for known in inputs.place.names.values() for name in known}
    has_sites = not held.isdisjoint(site.partition(":")[0] for site in plan.sites)
    if ended and (skips or has_sites) and not said.served:
        _say_unseen(rewrite, next(iter(plan.sites)), said)
    if has_sites or said.met:
        return  # a part of the model need not have them
    lengths = {site.query_length for site in plan.sites.values()}
    alike = [c.info.name for c in rewrite.calls if c.info.skip is None and _same(c, lengths)]
    if alike:
        raise PlanMismatchError(
            "none of the plan's sites is in this model",
            expected=f"sites such as {next(iter(plan.sites))!r}",
            got=f"attention calls such as {alike[0]!r}",
            remedy="compile the model that the plan was made for, or calibrate this one",
        )


def _any_within(path: str, sites: Iterable[str]) -> bool:
    """Whether a site lies in the module of a path."""
    return not path or any(site.startswith(f"{path}.") for site in sites)


def _say_unseen(rewrite: Rewrite, site: str, said: Said) -> None:
    """Warn that a model was captured whole, and none of the plan's attention calls in it."""
    reasons = Counter(call.info.skip for call in rewrite.calls if call.info.skip is not None)
    cause = ", ".join(f"{n} calls {reason}" for reason, n in reasons.most_common()) or (
        "no attention call was captured: it may run outside of the compiled code, or by another "
        'attention backend than set_attention_backend("native")'
    )
    said.warn(
        "unseen", "none of the plan's sites, such as %r, is served: all run dense; %s", site, cause
    )


def _same(call: SdpaCall, lengths: set[int]) -> bool:
    # Not for symbolic sizes: a set look-up would specialise them.
    return isinstance(call.info.query_length, int) and call.info.query_length in lengths
