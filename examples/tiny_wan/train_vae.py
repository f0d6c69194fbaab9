"""Train the small video autoencoder on the chosen shots and store their latents.

The run stops by itself after ``--seconds`` of training over all runs (or ``--run-seconds`` of this
one), always with a checkpoint, and continues from the last checkpoint when started again.
"""

from __future__ import annotations

import argparse
import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from checkpoint import append_log, load_checkpoint, save_checkpoint
from clips import load_clips, pixels_to_video, windows
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from settings import CLIPS, FULL, SMOKE, VAE_DIR, VideoSize
from torch import Tensor
from vae import build_vae, decode_whole_clip, encode_whole_clip

LEARNING_RATE = 1.5e-3
WARMUP_STEPS = 200
KL_WEIGHT = 1e-4
FRAMES = 17
SAVE_EVERY_S = 60.0


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Absolute and squared error, and the absolute error of the spatial differences."""
    loss = F.l1_loss(output, target) + 2.0 * F.mse_loss(output, target)
    for dim in (-1, -2):
        loss = loss + 0.25 * F.l1_loss(output.diff(dim=dim), target.diff(dim=dim))
    return loss


def training_loss(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    """Return the loss of one batch, with one sample of the posterior."""
    device = video.device.type
    frozen = not vae.quant_conv.weight.requires_grad
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        with torch.no_grad() if frozen else nullcontext():
            mean, log_variance = encode_whole_clip(vae, video)
        latents = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        output = decode_whole_clip(vae, latents)
    mean, log_variance = mean.float(), log_variance.float()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
    return reconstruction_loss(output.float(), video) + KL_WEIGHT * divergence


def set_memory_format(vae: AutoencoderKLWan, layout: torch.memory_format) -> None:
    """Store the weights of all three-dimensional convolutions in this layout."""
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=layout)


def faster_memory_format(vae: AutoencoderKLWan, video: Tensor) -> torch.memory_format:
    """Return the memory format in which a training step takes less time on this GPU."""
    seconds = {}
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        set_memory_format(vae, layout)
        for repeat in range(6):
            if repeat == 3:
                torch.cuda.synchronize()
                began = time.monotonic()
            training_loss(vae, video).backward()
            vae.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        seconds[layout] = (time.monotonic() - began) / 3
    print("step by memory format:", {str(k): f"{1e3 * v:.0f} ms" for k, v in seconds.items()})
    return min(seconds, key=seconds.__getitem__)


class ClipSampler:
    """Draws random sub-clips of all shots."""

    def __init__(self, clips: list[Tensor], frames: int, batch: int, device: str, seed: int):
        self.clips = [clip.to(device) for clip in clips]
        self.frames, self.batch = frames, batch
        self.generator = torch.Generator().manual_seed(seed)

    def _draw(self, high: int) -> int:
        return int(torch.randint(high, (1,), generator=self.generator))

    def __call__(self) -> Tensor:
        """Return a video batch (B, 3, T, H, W)."""
        batch = []
        for _ in range(self.batch):
            clip = self.clips[self._draw(len(self.clips))]
            start = self._draw(clip.shape[0] - self.frames + 1)
            batch.append(clip[start : start + self.frames])
        return pixels_to_video(torch.stack(batch))


@torch.no_grad()
def encode_all(
    vae: AutoencoderKLWan,
    clips: list[Tensor],
    size: VideoSize,
    device: str,
    known: dict[str, Any],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the normalised latents of every window with their shots, and their statistics.

    Where ``known`` already holds the mean and spread of the latents, they are kept.
    """
    means, shots, errors = [], [], []
    for window in windows(clips, size):
        pixels = clips[window.shot][window.start : window.start + size.frames]
        video = pixels_to_video(pixels.to(device))[None]
        mean, _ = encode_whole_clip(vae, video)
        output = decode_whole_clip(vae, mean).clamp(-1.0, 1.0)
        errors.append(((output - video) / 2.0).square().mean().item())
        means.append(mean[0].cpu())
        shots.append(window.shot)
    latents = torch.stack(means)
    center, spread = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    if "latents_mean" in known:
        center, spread = torch.tensor(known["latents_mean"]), torch.tensor(known["latents_std"])
    normalised = (latents - center[:, None, None, None]) / spread[:, None, None, None]
    psnr = [-10.0 * math.log10(error) for error in errors]
    meta = {
        "latents_mean": [round(x, 6) for x in center.tolist()],
        "latents_std": [round(x, 6) for x in spread.tolist()],
        "psnr_mean": sum(psnr) / len(psnr),
        "psnr_min": min(psnr),
    }
    return {"latents": normalised.contiguous(), "shots": torch.tensor(shots)}, meta


def main() -> None:
    """Train, then write ``latents.safetensors`` beside the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=Path, default=CLIPS)
    parser.add_argument("--out", type=Path, default=VAE_DIR, help="checkpoint folder")
    parser.add_argument("--seconds", type=float, default=200.0, help="training time of all runs")
    parser.add_argument("--run-seconds", type=float, default=math.inf, help="limit of this run")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--decoder-only",
        action="store_true",
        help="go on with a frozen encoder: trained transformers and their latents stay valid",
    )
    parser.add_argument("--smoke", action="store_true", help="small windows, batch 2")
    args = parser.parse_args()
    began = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    size = SMOKE if args.smoke else FULL
    torch.manual_seed(args.seed)
    vae = build_vae().to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99))
    meta: dict[str, Any] = {"step": 0, "seconds": 0.0}
    if args.out.exists():
        groups, meta = load_checkpoint(args.out)
        vae.load_state_dict(groups["model"])
        for name, parameter in vae.named_parameters():
            if name not in groups.get("exp_avg", {}):
                continue
            moments = {k: groups[k][name].to(device) for k in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {**moments, "step": torch.tensor(float(meta["step"]))}
        torch.manual_seed(args.seed + meta["step"])
        print(f"resumed at step {meta['step']}, {meta['seconds']:.0f} s")
    trainable = vae.decoder if args.decoder_only else vae
    if args.decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    step, before = meta["step"], meta["seconds"]
    clips = load_clips(args.clips)
    frames = min(FRAMES, size.frames)
    batch = 2 if args.smoke else args.batch
    sampler = ClipSampler(clips, frames, batch, device, args.seed + step)
    log_path = args.out.with_name(args.out.name + "_loss.jsonl")
    if device == "cuda" and before < args.seconds:
        set_memory_format(vae, faster_memory_format(vae, sampler()))

    def save(extra: dict[str, Any]) -> None:
        groups = {"model": vae.state_dict(), "exp_avg": {}, "exp_avg_sq": {}}
        for name, parameter in vae.named_parameters():
            for key in optimizer.state[parameter].keys() & {"exp_avg", "exp_avg_sq"}:
                groups[key][name] = optimizer.state[parameter][key]
        save_checkpoint(args.out, groups, {"step": step, "seconds": before + elapsed, **extra})

    elapsed = saved = 0.0
    warm = step if args.decoder_only else 0
    losses: list[Tensor] = []
    while before + elapsed < args.seconds and elapsed < args.run_seconds:
        start = before if args.decoder_only else 0.0
        progress = (before + elapsed - start) / (args.seconds - start)
        rate = LEARNING_RATE * min(1.0, (step - warm + 1) / WARMUP_STEPS)
        rate *= 0.5 + 0.5 * math.cos(math.pi * progress)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = training_loss(vae, sampler())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable.parameters(), 1.0)
        optimizer.step()
        step += 1
        losses.append(loss.detach())
        if step % (2 if args.smoke else 50) == 0:
            value = torch.stack(losses).mean().item()
            losses.clear()
            elapsed = time.monotonic() - began
            append_log(log_path, {"step": step, "loss": value, "seconds": before + elapsed})
            if step % 500 == 0 or args.smoke:
                print(f"step {step}  loss {value:.4f}  {before + elapsed:.0f} s", flush=True)
            if elapsed - saved > SAVE_EVERY_S:
                save({})
                saved = elapsed
    set_memory_format(vae, torch.contiguous_format)
    latents, statistics = encode_all(
        vae, clips, size, device, known=meta if args.decoder_only else {}
    )
    elapsed = time.monotonic() - began
    save(statistics)
    path = args.out.with_name("latents.safetensors")
    save_file(latents, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)
    print(
        f"VAE: {step} steps, {before + elapsed:.0f} s, PSNR mean {statistics['psnr_mean']:.2f} dB,"
        f" lowest window {statistics['psnr_min']:.2f} dB; {len(latents['shots'])} windows"
    )


if __name__ == "__main__":
    main()
