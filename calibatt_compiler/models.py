"""What must be known of a model family beside its graph: where its grid, text and CFG are.

Everything else (sites, shapes, timestep) is read off the captured graph, so that an unknown
module works too; its grid is read by rule where its configuration allows it, else not at all.
"""

from __future__ import annotations

import hashlib
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
    """Return class and configuration of a model; weights do not count.

    A module without a `config` is known by the names and shapes of its parameters.
    """
    module = unwrap(module)
    config = config_of(module)
    content: Any = (
        {key: value for key, value in config.items() if not key.startswith("_")}
        if config
        else [[name, list(p.shape)] for name, p in module.named_parameters()]
    )
    text = json.dumps(content, sort_keys=True, default=str)
    return ModelIdentity(
        class_name=type(module).__name__, config_digest=hashlib.sha256(text.encode()).hexdigest()
    )


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
