"""A module compiled so that it shows its attention."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch

from calibatt_compiler.backend import recording_backend
from calibatt_compiler.capture import Recorder
from calibatt_compiler.errors import CalibrationError

DYNAMO = {
    "recompile_limit": 64,
    "fail_on_recompile_limit_hit": True,
    # Mochi picks the valid text tokens by nonzero, which would break the graph.
    "capture_dynamic_output_shape_ops": True,
}


@runtime_checkable
class SeesModelCalls(Protocol):
    """An observer that looks at the model's arguments too."""

    def on_model_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Look at a call of the module, before it runs."""


@contextmanager
def observed(module: torch.nn.Module, observer: Recorder, inductor: bool | None) -> Iterator[None]:
    """Compile a module so that it shows its attention to an observer; undo it at the end.

    Args:
        module: what is observed.
        observer: receives each captured graph, then each call; if it `SeesModelCalls`, those of the
            module itself too.
        inductor: compile what is around attention; None: on a GPU yes, else no.

    Raises:
        CalibrationError: a cache would leave out layers or steps.
    """
    _refuse_caches(module)
    if inductor is None:
        inductor = any(p.device.type == "cuda" for p in module.parameters())
    # Graphs of a recording must neither use up nor invalidate those of the user's own compile.
    isolated = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    extra: dict[str, Any] = {"isolate_recompiles": True} if isolated else {}
    previous = module.__dict__.get("_compiled_call_impl")
    # Static shapes: with dynamic ones the code that serves an input would depend on the inputs
    # before it, and a resumed run could differ from an undisturbed one in the last bit.
    backend = recording_backend(observer, inductor=inductor, model=module)
    module.compile(backend=backend, dynamic=False, **extra)
    compiled = module._compiled_call_impl
    if isinstance(observer, SeesModelCalls) and compiled is not None:
        module._compiled_call_impl = _shown_to(observer, compiled)
    try:
        with torch._dynamo.config.patch(DYNAMO):
            yield
    finally:
        if previous is None:
            module.__dict__.pop("_compiled_call_impl", None)
        else:
            module._compiled_call_impl = previous


def _refuse_caches(module: torch.nn.Module) -> None:
    found = _cache_of(module)
    if found is not None:
        raise CalibrationError(
            "a model with a cache can't be calibrated: it leaves out layers or steps",
            expected="every attention call at every step",
            got=f"{type(module).__name__} with {found}",
            remedy="disable it first (disable_cache() of diffusers or cache-dit); the plan serves "
            "the model with its cache, too",
        )


def _cache_of(module: torch.nn.Module) -> str | None:
    """Return the name of the cache that a model has, however it was put on; None without one."""
    if getattr(module, "is_cache_enabled", False):
        return type(getattr(module, "_cache_config", None)).__name__
    if getattr(module, "_is_cached", False):
        return f"cache-dit's {type(getattr(module, '_context_manager', None)).__name__}"
    for part in module.modules():
        hooks = getattr(getattr(part, "_diffusers_hook", None), "hooks", None)
        for hook in hooks.values() if isinstance(hooks, dict) else ():
            # What a hook remembers from call to call is what it leaves out later.
            if getattr(hook, "_is_stateful", False) or "cache" in type(hook).__module__:
                return type(hook).__name__
    return None


def _shown_to(observer: SeesModelCalls, compiled: Callable[..., Any]) -> Callable[..., Any]:
    # Around the compiled call, where Dynamo does not look.
    def call(*args: Any, **kwargs: Any) -> Any:
        observer.on_model_call(args, kwargs)
        return compiled(*args, **kwargs)

    return call
