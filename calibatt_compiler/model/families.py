"""What must be known of a model family beside its graph: where its grid, text and CFG are.

Everything else (sites, shapes, timestep) is read off the captured graph, so that an unknown
module works too; its grid is read by rule where its configuration allows it, else not at all.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from calibatt_compiler.plan.schema import CfgMode, ModelIdentity

Layout = Literal["channels-first", "frames-first", "packed"]
TextPosition = Literal["first", "last"]


@dataclass(frozen=True)
class Family:
    """How the transformers of one family take their inputs.

    Attributes:
        layout: of `hidden_states`: (B, C, F, H, W), (B, F, C, H, W), or packed tokens with
            `num_frames`, `height` and `width` beside them.
        text: where text tokens stand in joint attention; None with cross-attention.
        cfg: how the pipelines run classifier-free guidance.
    """

    layout: Layout
    text: TextPosition | None
    cfg: CfgMode


FAMILIES: Mapping[str, Family] = {
    "WanTransformer3DModel": Family("channels-first", None, "separate"),
    "WanVACETransformer3DModel": Family("channels-first", None, "separate"),
    "SkyReelsV2Transformer3DModel": Family("channels-first", None, "separate"),
    "MochiTransformer3DModel": Family("channels-first", "last", "batched"),
    "CogVideoXTransformer3DModel": Family("frames-first", "first", "batched"),
    "HunyuanVideoTransformer3DModel": Family("channels-first", "last", "embedded"),
    "HunyuanVideo15Transformer3DModel": Family("channels-first", "last", "separate"),
    "LTXVideoTransformer3DModel": Family("packed", None, "batched"),
}


def family_of(kind: type) -> Family | None:
    """Return the family of a transformer class, or of the nearest class that it derives from."""
    return next((FAMILIES[c.__name__] for c in kind.__mro__ if c.__name__ in FAMILIES), None)


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """Return the module behind `torch.compile`."""
    original = getattr(module, "_orig_mod", module)
    return original if isinstance(original, torch.nn.Module) else module


def identify(module: torch.nn.Module) -> ModelIdentity:
    """Return class and configuration of a model; weights do not count, nor how they are quantised.

    A module without a `config` is known by the names and shapes of its parameters.
    """
    module = unwrap(module)
    config = _configuration(module)
    digest = _digest(config if config_of(module) else _parameters(module))
    return ModelIdentity(
        class_name=type(module).__name__, config_digest=digest, entries=tuple(sorted(config))
    )


def is_model(expected: ModelIdentity, module: torch.nn.Module) -> bool:
    """Whether a model is that of a plan, of its class or of one that derives from it.

    Entries of the configuration that were not known in calibration must have their defaults.
    """
    module = unwrap(module)
    if not is_class(type(module), expected.class_name):
        return False
    config = _configuration(module)
    known = {name: v for name, v in config.items() if name in (expected.entries or config)}
    if expected.config_digest != _digest(known if config_of(module) else _parameters(module)):
        # Versions before did not leave out how a model is quantised.
        whole = {name: v for name, v in config_of(module).items() if not name.startswith("_")}
        shapes = [[name, list(p.shape)] for name, p in module.named_parameters()]
        return expected.config_digest == _digest(whole or shapes)
    return all(_is_default(type(module), name, config[name]) for name in config.keys() - known)


def is_class(kind: type, class_name: str) -> bool:
    """Whether a class has a name, or derives from one that has it."""
    return any(base.__name__ == class_name for base in kind.__mro__)


def _configuration(module: torch.nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in config_of(module).items()
        if not name.startswith("_") and name != "quantization_config"
    }


def _is_default(kind: type, name: str, value: object) -> bool:
    for base in kind.__mro__:
        begun = vars(base).get("__init__")
        parameter = inspect.signature(begun).parameters.get(name) if callable(begun) else None
        if parameter is not None:
            return _digest(parameter.default) == _digest(value)
    return True


def _digest(content: object) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _parameters(module: torch.nn.Module) -> list[list[Any]]:
    """Return names and shapes of the parameters, of linear layers as they are unquantised."""
    found: list[list[Any]] = []
    seen: set[int] = set()
    for prefix, layer in module.named_modules():
        own: dict[str, tuple[Any, list[int]]] = {
            name: (p, list(p.shape)) for name, p in layer._parameters.items() if p is not None
        }
        sizes = _linear(layer)
        if sizes and not any(map(_linear, layer.children())):  # else it is a LoRA around one
            # Quantised, its weight may be packed, a buffer or neither, and have scales beside it.
            bias = getattr(layer, "bias", None)
            if not isinstance(bias, torch.Tensor):
                bias = bias() if callable(bias) else None
            own = {"weight": (getattr(layer, "weight", None), sizes)}
            own |= {"bias": (bias, sizes[:1])} if bias is not None else {}
        for name, (parameter, shape) in own.items():
            if isinstance(parameter, torch.nn.Parameter):
                if id(parameter) in seen:
                    continue
                seen.add(id(parameter))
            found.append([f"{prefix}.{name}" if prefix else name, shape])
    return found


def _linear(layer: torch.nn.Module) -> list[int]:
    """Return features out and in of a linear layer, of whatever class; empty for others."""
    sizes = [getattr(layer, name, None) for name in ("out_features", "in_features")]
    return [size for size in sizes if isinstance(size, int)] if None not in sizes else []


def config_of(module: torch.nn.Module) -> dict[str, Any]:
    """Return the configuration of a diffusers model as a plain dict; empty without one."""
    config = getattr(module, "config", None)
    return dict(config) if isinstance(config, Mapping) else {}


def text_position(kind: type) -> TextPosition | None:
    """Where text tokens stand in the joint attention of a transformer class, if it has any."""
    family = family_of(kind)
    return family.text if family else None


def cfg_mode(pipe: object) -> CfgMode:
    """How a pipeline runs classifier-free guidance; `separate` if its family is unknown."""
    transformer = getattr(pipe, "transformer", None)
    family = None if transformer is None else family_of(type(unwrap(transformer)))
    return family.cfg if family else "separate"


def latent_grid(
    module: torch.nn.Module,
    inputs: Mapping[str, Any],
    hidden: Sequence[torch.Tensor] | None = None,
) -> tuple[Any, Any, Any] | None:
    """Return the tokens (frames, height, width) of a call, or None if they can't be read.

    Of a class that is no known family it is read where the configuration says which dimension of
    the latents holds the channels, or from `num_frames`, `height` and `width` of packed tokens.

    Args:
        module: the transformer.
        inputs: its arguments by name; sizes may be symbolic, and the result then is too.
        hidden: tensors among which its latents are, where they have no name; None: they have.
    """
    family = family_of(type(module))
    config = config_of(module)
    if family is not None and family.layout == "packed":
        return _named_sizes(inputs)
    named = inputs.get("hidden_states")
    found = [x for x in ([named] if hidden is None else hidden) if isinstance(x, torch.Tensor)]
    latents = [x for x in found if x.dim() == 5] or [x for x in found if x.dim() == 4]
    if family is not None:
        if len(latents) != 1 or latents[0].dim() != 5:
            return None
        channels: int | None = 1 if family.layout == "channels-first" else 2
    else:
        if len(latents) != 1:
            return _named_sizes(inputs) if found and found[0].dim() == 3 else None
        channels = _channels(config, latents[0])
    patch = _patch(config)
    if not channels or patch is None:
        return None
    sizes = [size for dim, size in enumerate(latents[0].shape) if dim not in (0, channels)]
    frames = sizes.pop(0) // patch[0] if len(sizes) == 3 else 1
    return frames, sizes[0] // patch[1], sizes[1] // patch[2]


def _named_sizes(inputs: Mapping[str, Any]) -> tuple[Any, Any, Any] | None:
    frames, height, width = (inputs.get(name) for name in ("num_frames", "height", "width"))
    known = all(isinstance(size, (int, torch.SymInt)) for size in (frames, height, width))
    return (frames, height, width) if known else None


def _channels(config: Mapping[str, Any], latents: torch.Tensor) -> int | None:
    """Return which dimension holds the channels, if one alone has as many as configured."""
    expected = config.get("in_channels")
    # Symbolic sizes are those of a video; a comparison would guard on them.
    found = [
        dim
        for dim in range(1, latents.dim())
        if isinstance(latents.shape[dim], int) and latents.shape[dim] == expected
    ]
    return found[0] if len(found) == 1 else None


def _patch(config: Mapping[str, Any]) -> tuple[int, int, int] | None:
    patch = config.get("patch_size", 1)
    temporal = config.get("patch_size_t") or 1
    sizes = list(patch) if isinstance(patch, (tuple, list)) else [temporal, patch, patch]
    if len(sizes) == 2:
        sizes = [temporal, *sizes]
    if len(sizes) != 3 or not all(isinstance(size, int) and size > 0 for size in sizes):
        return None
    return sizes[0], sizes[1], sizes[2]
