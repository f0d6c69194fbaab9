"""A whole text-to-video pipeline, tiny and random, that all tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

GRID = (3, 7, 9)
"""Latent tokens (frames, height, width) of the tiny pipeline at `SIZE`: 189, no round number."""

SIZE = {"height": 112, "width": 144, "num_frames": 9}
"""Pixels and frames that make `GRID`."""


def build_tiny_wan(layers: int = 2, seed: int = 0) -> Any:
    """Return a random `WanPipeline`: 2 heads of 64, a word tokenizer, VAE 8x8 and 4 frames.

    Queries and keys are projected alike, so that attention is peaked near each token, and patterns
    differ between layers, heads, steps and inputs.
    """
    from diffusers import (
        AutoencoderKLWan,
        FlowMatchEulerDiscreteScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )
    from transformers import UMT5Config, UMT5EncoderModel

    state = torch.get_rng_state()
    torch.manual_seed(seed)
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=128,
        num_layers=layers,
        rope_max_seq_len=32,
    ).eval()
    for index, block in enumerate(transformer.blocks):
        attention = block.attn1
        attention.to_k.load_state_dict(attention.to_q.state_dict())
        attention.norm_q.weight.data.mul_(1.1 - 0.3 * index)
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()
    config = UMT5Config(
        vocab_size=64, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, is_gated_act=True
    )
    text_encoder = UMT5EncoderModel(config).eval()
    torch.set_rng_state(state)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = WanPipeline(_tokenizer(), text_encoder, vae, scheduler, transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [
        "<pad>",
        "</s>",
        "<unk>",
        "a",
        "the",
        "big",
        "small",
        "rabbit",
        "bird",
        "runs",
        "flies",
    ]
    model = models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def tiny_wan_grid() -> tuple[int, int, int]:
    """Latent tokens of `tiny_wan_pipeline` called with `tiny_wan_arguments`."""
    return GRID


@pytest.fixture(scope="session")
def tiny_wan_arguments() -> dict[str, int]:
    """Arguments for a fast run of `tiny_wan_pipeline`: `pipe(prompt=..., **arguments)`.

    Three steps with guidance, so two transformer calls a step, 189 tokens each.
    """
    return {**SIZE, "num_inference_steps": 3, "max_sequence_length": 16}


@pytest.fixture(scope="session")
def tiny_wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline in diffusers format, for `WanPipeline.from_pretrained` and commands."""
    folder = tmp_path_factory.mktemp("tiny-wan") / "model"
    build_tiny_wan().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_wan_pipeline() -> Any:
    """One `WanPipeline` for the whole session: leave it as you find it (compile a copy)."""
    return build_tiny_wan()
