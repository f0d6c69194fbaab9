"""Where in its model a captured frame stands: so that a site has one name however it is captured.

A site is named by the path of its module in the model, found by the identity of the module.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch

from calibatt_compiler.binding.model_call import call_inputs, timestep_in
from calibatt_compiler.model import families as models
from calibatt_compiler.model.callers import ModuleCall, module_calls
from calibatt_compiler.model.dynamo import FrameInputs, Place

TRANSPARENT = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Names under which wrappers hold what they wrap; they are left out of names of sites."""


def placed(
    inputs: FrameInputs,
    class_name: str | None = None,
    sites: Collection[str] = (),
    root: torch.nn.Module | None = None,
) -> FrameInputs:
    """Return the inputs of a frame with its place in the model.

    Args:
        inputs: of the frame.
        class_name: of the model, if known.
        sites: names of sites that it has, if known.
        root: the model, if known.
    """
    root = root or _root(inputs, class_name, {site.partition(":")[0] for site in sites})
    if root is None:
        return inputs
    names = module_names(root)
    anchor = next((m for m in inputs.callers if m in names), None)
    path = "" if anchor is None else names[anchor][0]
    call = call_of(root, module_calls())
    timed = call is not None and timestep_in(call_inputs(root, *arguments(call))) is not None
    return replace(inputs, place=Place(root, anchor, path, names), of_call=timed)


def call_of(root: torch.nn.Module, calls: Sequence[ModuleCall]) -> ModuleCall | None:
    """Return the call of a model that is under way, if its arguments can be seen."""
    return next((c for c in calls if c.module is root and c.args is not None), None)


def arguments(call: ModuleCall) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Return what a module is called with."""
    return call.args or (), call.kwargs or {}


def module_names(
    root: torch.nn.Module,
) -> WeakKeyDictionary[torch.nn.Module, tuple[str, ...]]:
    """Return the paths of all modules of a model, without names of wrappers."""
    found: WeakKeyDictionary[torch.nn.Module, tuple[str, ...]] = WeakKeyDictionary()
    for path, module in _paths(root):
        name = ".".join(part for part in path.split(".") if part not in TRANSPARENT)
        if name not in (known := found.get(module, ())):
            found[module] = (*known, name)
    return found


def _paths(
    module: torch.nn.Module, path: str = "", above: tuple[torch.nn.Module, ...] = ()
) -> Iterator[tuple[str, torch.nn.Module]]:
    """Return the modules in a module by their paths; what leads back to where it lies ends there.

    Caches such as cache-dit put one module in the place of a list of blocks. It holds the list, and
    the model itself: it is known by the list's name, and the blocks by those that they had.
    """
    in_list = bool(above) and isinstance(above[-1], torch.nn.ModuleList)
    above = (*above, module)
    children = [(name, child) for name, child in module._modules.items() if child is not None]
    replaces = in_list and any(child in above for _, child in children)
    if replaces:
        path = path.rpartition(".")[0]
    yield path, module
    for name, child in children:
        if child in above:
            continue
        if replaces and isinstance(child, torch.nn.ModuleList):
            yield from _paths(child, path, above)
        else:
            yield from _paths(child, f"{path}.{name}" if path else name, above)


def _root(
    inputs: FrameInputs, class_name: str | None, sites: Collection[str]
) -> torch.nn.Module | None:
    """Return the model that a frame is, or lies in, or calls."""
    within = [enclosing.module for enclosing in inputs.enclosing]
    chain = list(dict.fromkeys([*reversed(inputs.callers), *within]))
    candidates = list(dict.fromkeys(_by_likelihood(chain, class_name)))
    for module in candidates if sites else ():
        names = {name for all_names in module_names(module).values() for name in all_names}
        if not names.isdisjoint(sites):
            return module
    return next(iter(candidates), None)


def _by_likelihood(
    chain: Sequence[torch.nn.Module], class_name: str | None
) -> Iterator[torch.nn.Module]:
    if class_name is not None:
        yield from (m for m in chain if models.is_class(type(m), class_name))
    yield from (m for m in chain if models.config_of(m) or models.family_of(type(m)))
    yield from chain
