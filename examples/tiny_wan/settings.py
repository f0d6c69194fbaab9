"""Sizes, model configurations and paths of the tiny text-to-video model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WORK = HERE / "work"
CLIPS = WORK / "clips" / "clips.safetensors"
VAE_DIR = WORK / "vae"
DIT_DIR = WORK / "dit"
MODEL_DIR = HERE / "model"

MAX_TOKENS = 32
"""Text length of training and of the demo (``max_sequence_length`` of the pipeline)."""

FLOW_SHIFT = 3.0
"""Time shift of the flow-matching schedule, in training and in sampling."""

LATENT_CHANNELS = 48

VAE_CONFIG: dict[str, Any] = {
    "base_dim": 16,
    "decoder_base_dim": 24,
    "z_dim": LATENT_CHANNELS,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "is_residual": True,
    "patch_size": 4,
    "in_channels": 48,
    "out_channels": 48,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * LATENT_CHANNELS,
    "latents_std": [1.0] * LATENT_CHANNELS,
}

TEXT_CONFIG: dict[str, Any] = {
    "d_model": 64,
    "d_kv": 32,
    "num_heads": 2,
    "d_ff": 128,
    "num_layers": 2,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}

TRANSFORMER_CONFIG: dict[str, Any] = {
    "patch_size": (1, 1, 1),
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "text_dim": TEXT_CONFIG["d_model"],
    "freq_dim": 256,
    "ffn_dim": 768,
    "num_layers": 6,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}


@dataclass(frozen=True)
class VideoSize:
    """Pixels and frames of one training window."""

    height: int = 192
    width: int = 320
    frames: int = 33
    stride: int = 4
    """Distance in frames between the starts of a shot's windows."""


FULL = VideoSize()
SMOKE = VideoSize(height=64, width=96, frames=9, stride=12)
"""For checks on a CPU: the same model on smaller and fewer windows."""


@dataclass(frozen=True)
class Shot:
    """A run of film frames and the sentences that describe it."""

    name: str
    start: int
    frames: int
    captions: tuple[str, ...]


def load_shots() -> list[Shot]:
    """Return the chosen shots, in the order of ``shots.json``."""
    entries = json.loads((HERE / "shots.json").read_text())["shots"]
    return [Shot(e["name"], e["start"], e["frames"], tuple(e["captions"])) for e in entries]


def load_demo() -> dict[str, Any]:
    """Return the demo's settings and prompts."""
    return json.loads((HERE / "demo.json").read_text())
