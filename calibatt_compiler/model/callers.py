"""Which modules are being called: read off the Python stack.

Hooks, wrappers, graph breaks and regional compilation change what Dynamo captures and how it names
it. What stays is the stack: while a frame is captured, and whenever its code runs, the modules
around it are being called, each in a Python frame of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch._dynamo.eval_frame import OptimizedModule

_CALLS = {torch.nn.Module._call_impl.__code__, torch.nn.Module._wrapped_call_impl.__code__}

RESUMED = "torch_dynamo_resume_in_"
"""How Dynamo calls what follows a graph break."""


@dataclass
class ModuleCall:
    """One module that is being called.

    Attributes:
        module: the module.
        args: what it is called with; None if that can't be seen.
        kwargs: likewise.
    """

    module: torch.nn.Module
    args: Sequence[Any] | None = None
    kwargs: Mapping[str, Any] | None = None


def module_calls() -> list[ModuleCall]:
    """Return the modules that are being called in this thread, the innermost first."""
    calls: list[ModuleCall] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_argcount:
            values = frame.f_locals
            module = values.get(code.co_varnames[0])
            if (
                isinstance(module, torch.nn.Module)
                and not isinstance(module, OptimizedModule)
                and _is_method(code.co_name, module)
            ):
                if not calls or calls[-1].module is not module:
                    calls.append(ModuleCall(module))
                if code in _CALLS and calls[-1].args is None:
                    calls[-1].args, calls[-1].kwargs = values["args"], values["kwargs"]
        frame = frame.f_back
    return calls


def _is_method(name: str, module: torch.nn.Module) -> bool:
    """Whether a frame of this name is one of a module's methods, however Dynamo has rewritten it.

    A function that is given a module calls nothing of it by that.
    """
    return name.startswith(RESUMED) or hasattr(type(module), name)
