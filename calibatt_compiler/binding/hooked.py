"""Blocks that hooks hide from the compiler are compiled beneath the hook.

The hooks of some caches (MagCache and SeaCache of diffusers) are marked with
`torch.compiler.disable`, and so is all that they call: whole blocks run as they are, under any
backend. What such a hook calls is replaced by something that compiles it, with the options of the
call that is under way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from calibatt_compiler.binding.pinned import PinnedOptions
from calibatt_compiler.model.compile_calls import is_disabled, options_of_call

Forward = Callable[..., Any]


class CompiledBeneath:
    """Stands for what a hook calls, in the hook alone: who removes the hook finds all as it was.

    Args:
        reference: what the hook calls, as `diffusers.hooks.HookFunctionReference`.
    """

    def __init__(self, reference: Any) -> None:
        self._reference = reference
        self._compiled: list[tuple[PinnedOptions, Forward, Forward]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._reference, name)

    def original_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module's forward: compiled, if the hook runs in a call that is."""
        forward = self._reference.original_forward
        options = options_of_call()
        if isinstance(options, PinnedOptions):
            forward = self._by(options, forward)
        return forward(*args, **kwargs)

    def _by(self, options: PinnedOptions, forward: Forward) -> Forward:
        for known, original, compiled in self._compiled:
            if known is options and original == forward:
                return compiled
        compiled = torch.compile(forward, backend="calibatt", options=options)
        self._compiled.append((options, forward, compiled))
        return compiled


def compile_beneath_hooks(root: torch.nn.Module) -> str | None:
    """Let hooks that keep the compiler out call compiled code, where their model is compiled.

    Args:
        root: a model; called by itself it runs as before.

    Returns:
        The class of such a hook that was not known so far; None if there is none.
    """
    found = None
    for hook in _hiding(root):
        hook.fn_ref = CompiledBeneath(hook.fn_ref)
        found = type(hook).__name__
    return found


def hiding_hook(root: torch.nn.Module) -> str | None:
    """Return the class of a hook that keeps the compiler out of a model's blocks, if one does."""
    return next((type(hook).__name__ for hook in _hiding(root)), None)


def _hiding(root: torch.nn.Module) -> Iterator[Any]:
    """Return the hooks of diffusers that call a module's forward where no compiler looks."""
    for module in root.modules():
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", None)
        for hook in hooks.values() if isinstance(hooks, dict) else ():
            reference = getattr(hook, "fn_ref", None)
            known = reference is None or isinstance(reference, CompiledBeneath)
            if is_disabled(hook) and not known:
                yield hook
