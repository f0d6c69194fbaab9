"""What a run depends on, as JSON values: weights, settings, arguments, inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from calibatt_compiler.calibration.config import CalibrationConfig
from calibatt_compiler.model import families as models
from calibatt_compiler.plan.schema import CfgMode

_SAMPLES = 256
"""Elements of each parameter that its fingerprint looks at."""

_SPREAD = 2_654_435_761
"""2**32 over the golden ratio: multiples of it are spread evenly."""


def weights_fingerprint(module: torch.nn.Module) -> str:
    """SHA-256 (hex) over the names, shapes, dtypes and some values of all weights.

    It tells a model from the same model trained on, or with a LoRA, at the price of a few hundred
    values a tensor. Weights on the meta device count by name and shape.
    """
    h = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, Tensor):
            continue
        h.update(f"\0{name}\0{tuple(tensor.shape)}{tensor.dtype}\0".encode())
        if tensor.device.type != "meta" and tensor.numel():
            # Quantised tensor subclasses may refuse such views: they count by name and shape.
            with suppress(RuntimeError, NotImplementedError, TypeError):
                h.update(_bytes(tensor, _SAMPLES))
    return h.hexdigest()


def _bytes(tensor: Tensor, limit: int) -> bytes:
    flat = tensor.detach().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    step = max(1, flat.numel() // limit)
    if step > 1:
        # Each somewhere else in its part: equal steps would meet one column of a square matrix.
        index = torch.arange(limit)
        flat = flat[(index * step + index * _SPREAD % step).to(flat.device)]
    taken = flat.contiguous().cpu()
    raw: bytes = taken.view(torch.uint8).numpy().tobytes()
    return raw


def settings(config: CalibrationConfig) -> dict[str, Any]:
    """Return the settings that stored masks depend on."""
    names = ("block", "token_order", "A", "C", "k", "cfg", "num_steps", "grid", "text", "component")
    found: dict[str, Any] = {name: getattr(config, name) for name in (*names, "keep_energies")}
    if config.gamma is not None:  # which value it has is no part of what is recorded
        found["repetition"] = (config.anchor_rows, config.similarity_inputs)
    if config.zoned:
        found |= {"form": "zones", "step_groups": config.step_groups}
    if config.queries != 1:
        found["queries"] = config.queries
    return {name: list(v) if isinstance(v, tuple) else v for name, v in found.items()}


def of_run(
    module: torch.nn.Module,
    config: CalibrationConfig,
    about: Mapping[str, Any],
    cfg: CfgMode,
    arguments: object,
) -> dict[str, Any]:
    """Return all that a run depends on.

    Args:
        module: what is observed.
        config: settings.
        about: what it depends on beside these: weights, scheduler.
        cfg: how the sampler runs guidance.
        arguments: common to all inputs.
    """
    return {
        "format": 1,
        "model": models.identify(module).model_dump(mode="json"),
        "settings": settings(config),
        "arguments": arguments,
        "cfg": cfg,
        **about,
    }


def describe(value: object) -> Any:
    """Return JSON values that tell an argument from any other of its kind.

    Tensors, arrays and pictures are known by a hash of their content, other objects by their class
    only.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (float, torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [describe(item) for item in value]
    return _describe_object(value)


def _describe_object(value: object) -> Any:
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, Tensor):
        content = _bytes(value, max(1, value.numel()))
        return [name, list(value.shape), str(value.dtype), hashlib.sha256(content).hexdigest()]
    if hasattr(value, "tobytes"):  # numpy arrays and PIL images
        size = getattr(value, "shape", None) or getattr(value, "size", None)
        return [name, describe(size), hashlib.sha256(value.tobytes()).hexdigest()]
    qualified = getattr(value, "__qualname__", None)  # functions and classes
    return f"{getattr(value, '__module__', '')}.{qualified}" if qualified else name
