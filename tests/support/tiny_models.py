"""Tiny random models of the families that tests run: one place for their sizes."""

from __future__ import annotations

from typing import Any

import torch

WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
}
"""Sizes of `wan`, which its relatives take too."""


def wan(**changes: Any) -> Any:
    """Return a `WanTransformer3DModel` of two layers with `changes` to its configuration."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(**(WAN | changes))


def ltx(**changes: Any) -> Any:
    """Return a `LTXVideoTransformer3DModel` of two layers with `changes` to its configuration."""
    from diffusers import LTXVideoTransformer3DModel

    sizes = {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "num_layers": 2,
        "caption_channels": 16,
    }
    return LTXVideoTransformer3DModel(**(sizes | changes))


def cogvideox(**changes: Any) -> Any:
    """Return a `CogVideoXTransformer3DModel` of two layers with `changes` to its configuration."""
    from diffusers import CogVideoXTransformer3DModel

    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": 16,
        "num_layers": 2,
        "sample_width": 14,
        "sample_height": 10,
        "sample_frames": 9,
        "max_text_seq_length": 6,
    }
    return CogVideoXTransformer3DModel(**(sizes | changes))


def wan_pipeline(layers: int = 2, seed: int = 0) -> Any:
    """Return a random `WanPipeline`: 2 heads of 64, a word tokenizer, VAE 8x8 and 4 frames.

    Queries and keys are projected alike, so that attention is peaked near each token, and patterns
    differ between layers, heads, steps and inputs.
    """
    from diffusers import (
        AutoencoderKLWan,
        FlowMatchEulerDiscreteScheduler,
        WanPipeline,
    )
    from transformers import UMT5Config, UMT5EncoderModel

    state = torch.get_rng_state()
    torch.manual_seed(seed)
    transformer = wan(
        attention_head_dim=64,
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
