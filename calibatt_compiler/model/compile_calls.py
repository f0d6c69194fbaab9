"""Reads what Dynamo knows of `torch.compile` calls: their options, and why they compile nothing."""

from __future__ import annotations

import inspect
import sys
from types import FrameType
from typing import Any

import torch

BACKEND = "calibatt"


def keywords_with(options: object) -> dict[str, Any] | None:
    """Return the keywords in which the backend of a `torch.compile` call holds these very options.

    They are in sight while Dynamo calls the backend, or compares it with that of another call.
    """
    frame = sys._getframe(1)
    for _ in range(4):
        if frame.f_back is None:
            return None
        frame = frame.f_back
        for name in ("self", "other"):
            held = frame.f_locals.get(name)
            keywords = getattr(held, "kwargs", None)
            if isinstance(keywords, dict) and keywords.get("options", held) is options:
                return keywords
    return None


RECOMPILE_LIMIT = 256
"""How often Dynamo may compile one function: plans, models and adapters come and go in a process.

It is what Dynamo allows in all cases (`accumulated_recompile_limit`)."""


def raise_recompile_limit() -> None:
    """Let Dynamo compile a function for more than eight plans, unless the user chose a limit.

    Of the ninth it would run the function as it is, and nobody would be told.
    """
    config: Any = torch._dynamo.config
    if config.recompile_limit == 8:
        config.recompile_limit = RECOMPILE_LIMIT


def options_of(compiled: object) -> object:
    """Return the very `options` that a compiled model holds, if they can be seen.

    They tell apart several `torch.compile` calls over one module.

    Args:
        compiled: what `torch.compile` returned, or a module compiled in place.
    """
    return _options_in(_backend_of(compiled))


def options_within(compiled: object) -> object:
    """Return the `options` of a model compiled with this backend, or of the first part that is.

    Args:
        compiled: see `options_of`.

    Returns:
        None if nothing of it is compiled with this backend.
    """
    parts = compiled.modules() if isinstance(compiled, torch.nn.Module) else [compiled]
    for part in parts:
        wrapper = _wrapper(_backend_of(part))
        if getattr(wrapper, "compiler_name", None) == BACKEND:
            return getattr(wrapper, "kwargs", {}).get("options")
    return None


def options_of_call() -> object:
    """Return the very `options` of the innermost compiled call that is under way in this thread."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper":
            options = _options_in(frame.f_locals.get("callback"))
            if options is not None:
                return options
        frame = frame.f_back
    return None


def is_disabled(hook: object) -> bool:
    """Whether a hook's own forward, and all that it calls, is hidden from the compiler."""
    forward = getattr(type(hook), "new_forward", None)
    return bool(getattr(forward, "_torchdynamo_disable", False))


def why_eager(compiled: object) -> str | None:
    """Return what keeps Dynamo from compiling calls of a model now, in words, if it can be seen.

    Args:
        compiled: see `options_of`.
    """
    from torch._dynamo import eval_frame

    stance = getattr(getattr(eval_frame, "_stance", None), "stance", "default")
    if stance in ("force_eager", "eager_on_recompile"):
        return f'torch.compiler.set_stance("{stance}") is in force'
    if torch._dynamo.config.disable:
        return "torch._dynamo.config.disable is set (TORCHDYNAMO_DISABLE, TORCH_COMPILE_DISABLE)"
    modules = compiled.modules() if isinstance(compiled, torch.nn.Module) else ()
    for kind in dict.fromkeys(type(module) for module in modules):
        if _at_limit(kind.forward):
            limit = torch._dynamo.config.recompile_limit
            return f"torch._dynamo.config.recompile_limit ({limit}) is reached for {kind.__name__}"
    return None


def _at_limit(function: Any) -> bool:
    """Whether Dynamo compiles a function no more: it was compiled as often as it may be."""
    exceeded = torch._dynamo.utils.counters["unimplemented"]
    if not any("recompile limit exceeded" in reason for reason in exceeded):
        return False
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list

    codes = (getattr(f, "__code__", None) for f in (function, inspect.unwrap(function)))
    limit = torch._dynamo.config.recompile_limit
    return any(code and len(_debug_get_cache_entry_list(code)) >= limit for code in codes)


def _backend_of(compiled: object) -> Any:
    backend = getattr(getattr(compiled, "dynamo_ctx", None), "callback", None)
    in_place = getattr(compiled, "_compiled_call_impl", compiled)
    if backend is None and inspect.isfunction(in_place):
        backend = inspect.getclosurevars(in_place).nonlocals.get("callback")
    return backend


def _wrapper(backend: Any) -> Any:
    """Return what torch.compile made of a backend and its options, behind what Dynamo added."""
    for _ in range(8):
        if backend is None or isinstance(getattr(backend, "kwargs", None), dict):
            break
        backend = getattr(backend, "_torchdynamo_orig_backend", None)
    return backend


def _options_in(backend: Any) -> object:
    return getattr(_wrapper(backend), "kwargs", {}).get("options")
