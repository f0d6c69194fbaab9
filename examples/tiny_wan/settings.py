"""Sizes, model configurations and paths of the text-to-video models that are trained here.

The demo's model is the default of all scripts; `--size` names another one of `SIZES`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WORK = HERE / "work"
MODEL_DIR = HERE / "model"

MAX_TOKENS = 32
"""Text length of training and of the demo (``max_sequence_length`` of the pipeline)."""

FLOW_SHIFT = 3.0
"""Time shift of the flow-matching schedule, in training and in sampling."""

LATENT_CHANNELS = 48

COARSE = 2
"""Pixels a side that are averaged to one in the first stage of training (``coarse_share``)."""

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


@dataclass(frozen=True)
class ModelSize:
    """A model with its footage and how long it is trained.

    Attributes:
        name: of the size; all but the demo's work in a folder of this name.
        video: its training windows.
        transformer: what its configuration has other than the demo's.
        shots_file: the shots and their captions.
        demo_file: settings and prompts of sampling.
        first_shots: how many of the shots are used; None: all.
        quality: of the WebP images in the clip file.
        vae_start: the trained autoencoder that training begins with; None: random weights.
        vae_seconds: training time of the autoencoder.
        vae_batch: sub-clips a step.
        seconds: training time of the transformer.
        batch: windows a step.
        coarse_share: of `seconds`, at first, on videos of half the height and width: a quarter of
            the tokens, so that shots and captions are learned from several times as many samples.
        coarse_batch: windows a step then.
        light: checkpoints of the transformer hold its weights alone, in bfloat16 (the averaged
            ones once the training is over), so that they stay below 60 MB; a run that goes on from
            one starts momentum and average anew.
        size_limit: bytes of the exported folder.
    """

    name: str
    video: VideoSize = FULL
    transformer: dict[str, Any] = field(default_factory=dict)
    shots_file: str = "shots.json"
    demo_file: str = "demo.json"
    first_shots: int | None = None
    quality: int = 95
    vae_start: Path | None = None
    vae_seconds: float = 178.0
    vae_batch: int = 16
    seconds: float = 551.0
    batch: int = 32
    coarse_share: float = 0.0
    coarse_batch: int = 32
    light: bool = False
    size_limit: int = 16_000_000

    @property
    def work(self) -> Path:
        """Folder of clips, latents, checkpoints and logs."""
        return WORK if self.name == "demo" else WORK / self.name

    @property
    def clips(self) -> Path:
        """The clip file."""
        return self.work / "clips" / "clips.safetensors"

    @property
    def latents(self) -> Path:
        """Latents of all windows."""
        return self.work / "latents.safetensors"

    @property
    def vae_dir(self) -> Path:
        """The autoencoder's checkpoint."""
        return self.work / "vae"

    @property
    def dit_dir(self) -> Path:
        """The transformer's checkpoint."""
        return self.work / "dit"

    @property
    def model_dir(self) -> Path:
        """The exported pipeline."""
        return MODEL_DIR if self.name == "demo" else self.work / "model"

    @property
    def transformer_config(self) -> dict[str, Any]:
        """Configuration of the transformer."""
        return {**TRANSFORMER_CONFIG, **self.transformer}

    def shots(self) -> list[Shot]:
        """Return the chosen shots, in the order of their file."""
        entries = json.loads((HERE / self.shots_file).read_text())["shots"]
        chosen = entries[: self.first_shots]
        return [Shot(e["name"], e["start"], e["frames"], tuple(e["captions"])) for e in chosen]

    def demo(self) -> dict[str, Any]:
        """Return settings and prompts of sampling."""
        return json.loads((HERE / self.demo_file).read_text())


DEMO = ModelSize("demo")
MID = ModelSize(
    "mid",
    video=VideoSize(height=320, width=512, frames=49),
    transformer={"num_attention_heads": 6, "ffn_dim": 1024, "num_layers": 12},
    shots_file="shots-mid.json",
    demo_file="mid.json",
    quality=70,
    vae_start=MODEL_DIR / "vae",
    vae_seconds=90.0,
    vae_batch=8,
    seconds=900.0,
    batch=16,
    coarse_share=0.4,
    coarse_batch=32,
    light=True,
    size_limit=60_000_000,
)
"""13 x 20 x 32 = 8,320 latent tokens; for a GPU of 80 GB."""
TEST = ModelSize(
    "test",
    video=SMOKE,
    transformer={"num_attention_heads": 2, "ffn_dim": 128, "num_layers": 2},
    first_shots=2,
    vae_seconds=2.0,
    vae_batch=1,
    seconds=2.0,
    batch=2,
    coarse_share=0.4,
    coarse_batch=2,
    light=True,
)
"""For checks on a CPU: trains in seconds, to nothing of use."""
SIZES = {size.name: size for size in (DEMO, MID, TEST)}


def add_size(parser: argparse.ArgumentParser) -> None:
    """Add the option that names the model."""
    parser.add_argument("--size", choices=SIZES, default="demo", help="which model")


def load_demo() -> dict[str, Any]:
    """Return the demo's settings and prompts."""
    return DEMO.demo()
