"""What must be known of a model family beside its graph: where its grid, text and CFG are.

Everything else (sites, shapes, timestep) is read off the captured graph, so that an unknown
module works too; its latent grid is then checked by token count alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
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


def text_position(class_name: str) -> TextPosition | None:
    """Where text tokens stand in the joint attention of a transformer class, if it has any."""
    family = FAMILIES.get(class_name)
    return family.text if family else None


def cfg_mode(pipe: object) -> CfgMode:
    """How a pipeline runs classifier-free guidance; `separate` if its family is unknown."""
    transformer = getattr(pipe, "transformer", None)
    name = type(unwrap(transformer)).__name__ if transformer is not None else ""
    family = FAMILIES.get(name)
    return family.cfg if family else "separate"


def latent_grid(module: torch.nn.Module, inputs: Mapping[str, Any]) -> tuple[Any, Any, Any] | None:
    """Return the tokens (frames, height, width) of a call, or None for an unknown family.

    Args:
        module: the transformer.
        inputs: its arguments by name; sizes may be symbolic, and the result then is too.
    """
    family = FAMILIES.get(type(module).__name__)
    if family is None:
        return None
    if family.layout == "packed":
        sizes = tuple(inputs.get(name) for name in ("num_frames", "height", "width"))
        return None if None in sizes else (sizes[0], sizes[1], sizes[2])
    hidden = inputs.get("hidden_states")
    if not isinstance(hidden, torch.Tensor) or hidden.dim() != 5:
        return None
    frames, height, width = (
        (hidden.shape[2], hidden.shape[3], hidden.shape[4])
        if family.layout == "channels-first"
        else (hidden.shape[1], hidden.shape[3], hidden.shape[4])
    )
    patch_t, patch_h, patch_w = _patch(config_of(module))
    return frames // patch_t, height // patch_h, width // patch_w


def _patch(config: Mapping[str, Any]) -> tuple[int, int, int]:
    patch = config.get("patch_size", 1)
    if isinstance(patch, (tuple, list)):
        return int(patch[0]), int(patch[1]), int(patch[2])
    return int(config.get("patch_size_t") or 1), int(patch), int(patch)
