"""Says what ran without the backend, which sees nothing of such calls, and the likely cause."""

from __future__ import annotations

import torch

from calibatt_compiler.binding.hooked import hiding_hook
from calibatt_compiler.model.compile_calls import why_eager


def eager_note(compiled: object, *, whole: bool, captured: bool, met: bool) -> str | None:
    """Return, in words, that calls of a model ran or run without calibatt; None if none is known.

    Args:
        compiled: the model.
        whole: whether it is compiled as one, and not by its parts.
        captured: whether a call of it was compiled.
        met: whether a site of the plan was.
    """
    cause = why_eager(compiled)
    if cause is None and not whole and isinstance(compiled, torch.nn.Module):
        hook = hiding_hook(compiled)
        cause = hook and f"{hook} keeps the compiler out of blocks: compile the whole transformer"
    if captured and cause is not None:
        return f"calls run without calibatt, dense and uncounted: {cause}"
    if captured:
        return (
            None
            if met
            else (
                "none of the plan's sites was captured: attention ran dense, outside of compiled "
                "code or by another backend than native"
            )
        )
    if cause is not None:
        return f"no call of this model was captured, what ran ran without calibatt: {cause}"
    return (
        "no call of this model was captured: either there was none yet, or it ran without calibatt "
        '(torch.compiler.set_stance("force_eager"), torch.compiler.disable around it, or a '
        "recompile limit that was reached)"
    )
