"""Tiny random transformers of diffusers that cut padded text by a mask, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

TEXT = 21
"""Text tokens, padding included."""


@dataclass(frozen=True)
class Masked:
    """A family.

    Attributes:
        make: makes a model.
        inputs: makes its arguments but for the timestep, for so many valid text tokens a sample.
        sites: its joint attention calls, in the order of execution.
        grid: tokens (frames, height, width).
        text: where text stands.
        whole: Dynamo captures it as one graph.
    """

    make: Callable[[], torch.nn.Module]
    inputs: Callable[[Sequence[int]], dict[str, Any]]
    sites: tuple[str, ...]
    grid: tuple[int, int, int]
    text: str
    whole: bool = True


def key_mask(lengths: Sequence[int], size: int = TEXT) -> torch.Tensor:
    """Bool (samples, size): the first so many are valid."""
    return torch.arange(size)[None] < torch.tensor(lengths)[:, None]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


HUNYUAN = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16,
    "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 16,
}  # fmt: skip


def hunyuan(**changes: Any) -> torch.nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    sizes = HUNYUAN | {"patch_size": 1, "patch_size_t": 1, "pooled_projection_dim": 8}
    return HunyuanVideoTransformer3DModel(**(sizes | {"rope_axes_dim": (4, 6, 6)} | changes))


def hunyuan_inputs(lengths: Sequence[int]) -> dict[str, Any]:
    count = len(lengths)
    return {
        "hidden_states": draw(count, 4, 3, 5, 7),
        "encoder_hidden_states": draw(count, TEXT, 16),
        "encoder_attention_mask": key_mask(lengths).long(),
        "pooled_projections": draw(count, 8),
        "guidance": torch.full((count,), 6000.0),
    }


def hunyuan_image() -> torch.nn.Module:
    from diffusers import HunyuanImageTransformer2DModel

    return HunyuanImageTransformer2DModel(
        **HUNYUAN, patch_size=(1, 1), rope_axes_dim=(8, 8), guidance_embeds=True
    )


def hunyuan_image_inputs(lengths: Sequence[int]) -> dict[str, Any]:
    given = hunyuan_inputs(lengths) | {"hidden_states": draw(len(lengths), 4, 9, 11)}
    del given["pooled_projections"]
    return given


def hunyuan_15() -> torch.nn.Module:
    from diffusers import HunyuanVideo15Transformer3DModel

    sizes = {name: size for name, size in HUNYUAN.items() if name != "num_single_layers"}
    return HunyuanVideo15Transformer3DModel(
        **(sizes | {"num_layers": 2}), patch_size=1, patch_size_t=1, text_embed_2_dim=8,
        image_embed_dim=8, rope_axes_dim=(4, 6, 6), target_size=64, task_type="t2v",
    )  # fmt: skip


def hunyuan_15_inputs(lengths: Sequence[int]) -> dict[str, Any]:
    """Text of two encoders, each padded, and no image."""
    count, second = len(lengths), TEXT - 14
    return {
        "hidden_states": draw(count, 4, 3, 5, 7),
        "encoder_hidden_states": draw(count, 9, 16),
        "encoder_attention_mask": key_mask([min(9, each) for each in lengths], 9).long(),
        "encoder_hidden_states_2": draw(count, second, 8),
        "encoder_attention_mask_2": key_mask([each // 3 for each in lengths], second).long(),
        "image_embeds": torch.zeros(count, 5, 8),
    }


def qwen() -> torch.nn.Module:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def qwen_inputs(lengths: Sequence[int]) -> dict[str, Any]:
    count = len(lengths)
    return {
        "hidden_states": draw(count, 99, 16),
        "encoder_hidden_states": draw(count, TEXT, 16),
        "encoder_hidden_states_mask": key_mask(lengths).long(),
        "img_shapes": [[(1, 9, 11)]] * count,
    }


def chroma() -> torch.nn.Module:
    from diffusers import ChromaTransformer2DModel

    return ChromaTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 6, 6),
        approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip


def chroma_inputs(lengths: Sequence[int]) -> dict[str, Any]:
    count = len(lengths)
    places = torch.stack(torch.meshgrid(*map(torch.arange, (1, 9, 11)), indexing="ij"), -1)
    image = torch.ones(count, 99, dtype=torch.bool)
    return {
        "hidden_states": draw(count, 99, 4),
        "encoder_hidden_states": draw(count, TEXT, 32),
        "txt_ids": torch.zeros(TEXT, 3),
        "img_ids": places.flatten(0, 2).float(),
        "attention_mask": torch.cat([key_mask(lengths), image], 1),
    }


def ernie() -> torch.nn.Module:
    from diffusers import ErnieImageTransformer2DModel

    return ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=32, in_channels=4,
        out_channels=4, text_in_dim=16, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip


def ernie_inputs(lengths: Sequence[int]) -> dict[str, Any]:
    count = len(lengths)
    return {
        "hidden_states": draw(count, 4, 9, 11),
        "text_bth": draw(count, TEXT, 16),
        "text_lens": torch.tensor(lengths),
    }


def krea() -> torch.nn.Module:
    from diffusers import Krea2Transformer2DModel

    return Krea2Transformer2DModel(
        in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=32, timestep_embed_dim=16, text_hidden_dim=16,
        num_text_layers=2, text_num_attention_heads=2, text_num_key_value_heads=2,
        text_intermediate_size=16, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def krea_inputs(lengths: Sequence[int]) -> dict[str, Any]:
    count = len(lengths)
    return {
        "hidden_states": draw(count, 99, 4),
        "encoder_hidden_states": draw(count, TEXT, 2, 16),
        "position_ids": torch.zeros(TEXT + 99, 3),
        "encoder_attention_mask": key_mask(lengths),
    }


JOINT = ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn")
PAIR = ("transformer_blocks.0.attn", "transformer_blocks.1.attn")
VIDEO, IMAGE, LENGTH = (3, 5, 7), (1, 9, 11), (1, 1, 99)

FAMILIES: dict[str, Masked] = {
    "hunyuan_video": Masked(hunyuan, hunyuan_inputs, JOINT, VIDEO, "last"),
    "hunyuan_15": Masked(hunyuan_15, hunyuan_15_inputs, PAIR, VIDEO, "last", whole=False),
    "hunyuan_image": Masked(hunyuan_image, hunyuan_image_inputs, JOINT, IMAGE, "last"),
    "ernie": Masked(
        ernie,
        ernie_inputs,
        ("layers.0.self_attention", "layers.1.self_attention"),
        IMAGE,
        "last",
    ),
    "qwen": Masked(qwen, qwen_inputs, PAIR, LENGTH, "first"),
    "chroma": Masked(chroma, chroma_inputs, JOINT, IMAGE, "first"),
    "krea": Masked(krea, krea_inputs, PAIR, LENGTH, "first"),
}
