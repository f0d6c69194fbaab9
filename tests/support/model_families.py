"""Tiny models of the families that campaigns draw from, with inputs of any grid and text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import tiny_models
import torch

Grid = tuple[int, int, int]
LONGEST = 32
"""Text tokens that a padded prompt has."""


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        make: builds one.
        inputs: of a grid, a text length and a batch, without the timestep.
        sites: names of the attention calls that a plan may serve; 2 heads of 16.
        text: where text stands in their sequence.
    """

    make: Callable[[], Any]
    inputs: Callable[[Grid, int, int, torch.Generator], dict[str, Any]]
    sites: tuple[str, ...]
    text: Literal["first", "last"] | None = None

    def build(self) -> Any:
        """Build the model; each time with the same weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return lively(self.make())

    def length(self, grid: Grid, text: int) -> int:
        """Tokens of a site's sequence."""
        return math.prod(grid) + (text if self.text else 0)


def lively(model: Any) -> Any:
    """Default initialisation leaves outputs near zero: a wrong mask would hardly show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.5 / parameter[0].numel() ** 0.5, generator=generator)
            elif "norm" not in name:
                parameter.normal_(std=0.1, generator=generator)
    return model.eval().requires_grad_(False)


def _video(batch: int, grid: Grid, generator: torch.Generator) -> torch.Tensor:
    frames, height, width = grid
    return torch.randn(batch, 4, frames, 2 * height, 2 * width, generator=generator)


def _text(batch: int, text: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(batch, text, 16, generator=generator)


def _wan(grid: Grid, text: int, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": _video(batch, grid, generator),
        "encoder_hidden_states": _text(batch, text, generator),
    }


def _wan_image(grid: Grid, text: int, batch: int, generator: torch.Generator) -> dict[str, Any]:
    image = torch.randn(batch, 5, 16, generator=generator)
    return _wan(grid, text, batch, generator) | {"encoder_hidden_states_image": image}


def _vace(grid: Grid, text: int, batch: int, generator: torch.Generator) -> dict[str, Any]:
    control = _video(batch, grid, generator)
    return _wan(grid, text, batch, generator) | {"control_hidden_states": control}


def _ltx(grid: Grid, text: int, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, math.prod(grid), 8, generator=generator),
        "encoder_hidden_states": _text(batch, text, generator),
        "encoder_attention_mask": torch.ones(batch, text),
        **dict(zip(("num_frames", "height", "width"), grid, strict=True)),
    }


def _cogvideox(grid: Grid, text: int, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": _video(batch, grid, generator).transpose(1, 2),
        "encoder_hidden_states": _text(batch, text, generator),
    }


def _mochi(grid: Grid, text: int, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": _video(batch, grid, generator),
        "encoder_hidden_states": _text(batch, LONGEST, generator),
        "encoder_attention_mask": (torch.arange(LONGEST) < text).expand(batch, -1),
    }


def _hunyuan(grid: Grid, text: int, batch: int, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": _video(batch, grid, generator),
        "encoder_hidden_states": _text(batch, text, generator),
        "encoder_attention_mask": torch.ones(batch, text),
        "pooled_projections": torch.randn(batch, 8, generator=generator),
        "guidance": torch.full((batch,), 1000.0),
    }


def _hunyuan15(grid: Grid, text: int, batch: int, generator: torch.Generator) -> dict[str, Any]:
    # Of the text, two tokens are of the second encoder and one is the image's.
    return {
        "hidden_states": _video(batch, grid, generator),
        "encoder_hidden_states": _text(batch, text - 3, generator),
        "encoder_attention_mask": torch.ones(batch, text - 3),
        "encoder_hidden_states_2": torch.randn(batch, 2, 12, generator=generator),
        "encoder_attention_mask_2": torch.ones(batch, 2),
        "image_embeds": torch.randn(batch, 1, 8, generator=generator),
    }


def _mochi_model() -> Any:
    from diffusers import MochiTransformer3DModel

    return MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        pooled_projection_dim=16,
        in_channels=4,
        out_channels=4,
        text_embed_dim=16,
        time_embed_dim=4,
        max_sequence_length=LONGEST,
    )


HUNYUAN: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "patch_size": 2,
    "patch_size_t": 1,
    "text_embed_dim": 16,
    "rope_axes_dim": (4, 6, 6),
}
"""Sizes of both models."""


def _hunyuan_model() -> Any:
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(
        num_layers=1, num_single_layers=1, pooled_projection_dim=8, guidance_embeds=True, **HUNYUAN
    )


def _hunyuan15_model() -> Any:
    from diffusers import HunyuanVideo15Transformer3DModel

    return HunyuanVideo15Transformer3DModel(
        num_layers=2, text_embed_2_dim=12, image_embed_dim=8, **HUNYUAN
    )


def _vace_model() -> Any:
    from diffusers import WanVACETransformer3DModel

    return WanVACETransformer3DModel(**tiny_models.WAN, vace_layers=[0, 1], vace_in_channels=4)


def _skyreels_model() -> Any:
    from diffusers import SkyReelsV2Transformer3DModel

    return SkyReelsV2Transformer3DModel(**tiny_models.WAN)


WAN = ("blocks.0.attn1", "blocks.1.attn1")
JOINT = ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1")
FAMILIES = {
    "wan": Family(tiny_models.wan, _wan, WAN),
    "wan, image": Family(
        lambda: tiny_models.wan(image_dim=16, added_kv_proj_dim=32), _wan_image, WAN
    ),
    "vace": Family(_vace_model, _vace, (*WAN, "vace_blocks.0.attn1", "vace_blocks.1.attn1")),
    "skyreels": Family(_skyreels_model, _wan, WAN),
    "ltx": Family(tiny_models.ltx, _ltx, JOINT),
    "cogvideox": Family(
        lambda: tiny_models.cogvideox(use_rotary_positional_embeddings=True),
        _cogvideox,
        JOINT,
        "first",
    ),
    "mochi": Family(_mochi_model, _mochi, JOINT, "last"),
    "hunyuan": Family(
        _hunyuan_model,
        _hunyuan,
        ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn"),
        "last",
    ),
    "hunyuan 1.5": Family(
        _hunyuan15_model, _hunyuan15, ("transformer_blocks.0.attn", "transformer_blocks.1.attn"),
        "last",
    ),
}  # fmt: skip
