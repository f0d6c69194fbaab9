"""`compile`: a model or a pipeline with a plan, checked at once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch

from calibatt_compiler.arguments import require
from calibatt_compiler.binding.plan_sites import check_identity
from calibatt_compiler.errors import CaptureError, OptionError
from calibatt_compiler.model.families import unwrap
from calibatt_compiler.options import CompileOptions
from calibatt_compiler.plan import Plan

Model = TypeVar("Model")
PlanOrPath = Plan | str | os.PathLike[str]


def compile(
    model: Model,
    plan: PlanOrPath | Mapping[str, PlanOrPath],
    *,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    **options: Any,
) -> Model:
    """Compile a model with its plan: `torch.compile` with this backend, checked before.

    Options, plan and model are looked at now, and not when the model is first called.

    Args:
        model: a transformer; or a pipeline, whose transformers are compiled and replaced in it.
        plan: a `Plan`, or the path of a plan file. For a pipeline with several transformers a
            mapping gives each its own by the name of its component, such as
            `{"transformer": "high.calibatt", "transformer_2": "low.calibatt"}`; those without one
            stay as they are.
        fullgraph: see `torch.compile`.
        dynamic: see `torch.compile`.
        **options: see `CompileOptions`: `lowering`, `on_mismatch`, `inductor` and the like.

    Returns:
        The compiled model, or the pipeline.

    Raises:
        OptionError: an unknown option, or a value of another type or out of range.
        PlanError: the plan can't be read.
        PlanMismatchError: the plan was made for another model.
        CaptureError: neither a model nor a pipeline with a transformer.
    """
    require(isinstance(fullgraph, bool), "fullgraph", fullgraph, "True or False")
    require(dynamic is None or isinstance(dynamic, bool), "dynamic", dynamic, "True, False or None")
    how = {"fullgraph": fullgraph, "dynamic": dynamic}
    if isinstance(model, torch.nn.Module):
        if isinstance(plan, Mapping):
            require(False, "plan", plan, "one plan for one model")
        return cast("Model", _compiled(model, plan, options, how))
    components = _transformers(model)
    plans = plan if isinstance(plan, Mapping) else dict.fromkeys(components, plan)
    if not plans or not set(plans) <= set(components):
        raise OptionError(
            f"the plans are not those of {type(model).__name__}",
            expected=f"names of its transformers: {', '.join(components)}",
            got=", ".join(map(str, plans)) or "no plan",
            remedy="give one plan for all of them, or a mapping from names to plans",
        )
    # All are looked at before one is replaced.
    made = {name: _compiled(components[name], one, options, how) for name, one in plans.items()}
    for name, compiled in made.items():
        setattr(model, name, compiled)
    return model


def _compiled(
    module: torch.nn.Module, plan: object, options: Mapping[str, Any], how: Mapping[str, Any]
) -> torch.nn.Module:
    checked = CompileOptions.parse({**options, "plan": plan})
    module = unwrap(module)
    check_identity(checked.plan, module)
    settings = {**options, "plan": checked.plan}
    compiled = torch.compile(module, backend="calibatt", options=settings, **how)
    return cast("torch.nn.Module", compiled)


def _transformers(pipe: object) -> dict[str, torch.nn.Module]:
    """Return the transformers of a pipeline by name."""
    held = getattr(pipe, "components", None)
    named = held if isinstance(held, Mapping) else getattr(pipe, "__dict__", {})
    found = {
        str(name): module
        for name, module in named.items()
        if str(name).startswith("transformer") and isinstance(module, torch.nn.Module)
    }
    if not found:
        raise CaptureError(
            "there is nothing to compile",
            expected="a torch.nn.Module, or a diffusers pipeline with a transformer",
            got=type(pipe).__name__,
            remedy="pass the transformer itself",
        )
    return found
