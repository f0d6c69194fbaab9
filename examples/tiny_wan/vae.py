"""The video autoencoder, evaluated on whole clips.

``AutoencoderKLWan`` walks a clip in chunks of four frames with a cache in every convolution. For
training, the functions here compute the same values in one pass over all frames; ``whole_clip``
is exact because every layer is causal and treats the first frame apart.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, patchify, unpatchify
from settings import VAE_CONFIG
from torch import Tensor


def build_vae() -> AutoencoderKLWan:
    """Return a freshly initialised autoencoder."""
    return AutoencoderKLWan(**VAE_CONFIG)


def load_vae(folder: Path) -> AutoencoderKLWan:
    """Return a trained autoencoder of the same configuration, in float32, ready to be trained."""
    vae = AutoencoderKLWan.from_pretrained(folder, torch_dtype=torch.float32).train()
    changed = {key for key, value in VAE_CONFIG.items() if vae.config[key] != value}
    if changed - {"latents_mean", "latents_std"}:
        raise SystemExit(f"{folder}: an autoencoder of another configuration, see {changed}")
    return vae


def encode_whole_clip(vae: AutoencoderKLWan, video: Tensor) -> tuple[Tensor, Tensor]:
    """Return the posterior's mean and log-variance of (B, 3, 1 + 4 n, H, W) in [-1, 1]."""
    encoder = vae.encoder
    hidden = encoder.conv_in(patchify(video, vae.config.patch_size))
    for block in encoder.down_blocks:
        shortcut = block.avg_shortcut(hidden)
        for resnet in block.resnets:
            hidden = resnet(hidden)
        if block.downsampler is not None:
            hidden = _resample(block.downsampler, hidden)
        hidden = hidden + shortcut
    hidden = encoder.mid_block(hidden)
    hidden = encoder.conv_out(encoder.nonlinearity(encoder.norm_out(hidden)))
    mean, log_variance = vae.quant_conv(hidden).chunk(2, dim=1)
    return mean, log_variance.clamp(-30.0, 20.0)


def decode_whole_clip(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Return the video (B, 3, 1 + 4 n, H, W), not clamped, of raw latents (B, C, 1 + n, h, w)."""
    decoder = vae.decoder
    hidden = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(latents)))
    for block in decoder.up_blocks:
        entry = hidden
        for resnet in block.resnets:
            hidden = resnet(hidden)
        if block.upsampler is not None:
            hidden = _resample(block.upsampler, hidden)
        if block.avg_shortcut is not None:
            hidden = hidden + block.avg_shortcut(entry, first_chunk=True)
    hidden = decoder.conv_out(decoder.nonlinearity(decoder.norm_out(hidden)))
    return unpatchify(hidden, vae.config.patch_size)


def _resample(layer: WanResample, hidden: Tensor) -> Tensor:
    """Apply one resampling layer to all frames; the first frame has no temporal partner."""
    first, rest = hidden[:, :, :1], hidden[:, :, 1:]
    if layer.mode == "upsample3d" and rest.shape[2]:
        batch, channels, frames, height, width = rest.shape
        pairs = layer.time_conv(rest).reshape(batch, 2, channels, frames, height, width)
        rest = pairs.movedim(1, 3).reshape(batch, channels, 2 * frames, height, width)
        hidden = torch.cat([first, rest], dim=2)
    batch, _, frames, _, _ = hidden.shape
    images = layer.resample(hidden.transpose(1, 2).flatten(0, 1))
    hidden = images.unflatten(0, (batch, frames)).transpose(1, 2)
    if layer.mode == "downsample3d" and frames > 1:
        hidden = torch.cat([hidden[:, :, :1], layer.time_conv(hidden)], dim=2)
    return hidden
