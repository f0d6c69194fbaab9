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
from checkpoint import Groups, append_log, load_checkpoint, save_checkpoint
from clips import load_clips, pixels_to_video, windows
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from settings import COARSE, SIZES, SMOKE, VideoSize, add_size
from torch import Tensor
from torch.nn import functional
from vae import build_vae, decode_whole_clip, encode_whole_clip, load_vae

LEARNING_RATE = 1.5e-3
WARMUP_STEPS = 200
KL_WEIGHT = 1e-4
FRAMES = 17
SAVE_EVERY_S = 60.0
ADAM_KEYS = ("exp_avg", "exp_avg_sq")


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Absolute and squared error, and the absolute error of the spatial differences."""
    loss = functional.l1_loss(output, target) + 2.0 * functional.mse_loss(output, target)
    for dim in (-1, -2):
        loss = loss + 0.25 * functional.l1_loss(output.diff(dim=dim), target.diff(dim=dim))
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


def latent_statistics(meta: dict[str, Any]) -> dict[str, Any]:
    """Return the mean and spread of the latents, where the metadata hold them."""
    return {key: meta[key] for key in ("latents_mean", "latents_std") if key in meta}


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


def shrink(video: Tensor) -> Tensor:
    """Return the video (B, 3, T, H, W) with height and width divided by ``COARSE``."""
    return functional.avg_pool3d(video, (1, COARSE, COARSE))


@torch.no_grad()
def encode_all(
    vae: AutoencoderKLWan,
    clips: list[Tensor],
    size: VideoSize,
    device: str,
    known: dict[str, Any],
    coarse: bool,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the normalised latents of every window with their shots, and their statistics.

    Where ``known`` already holds the mean and spread of the latents, they are kept. With ``coarse``
    also the latents of the shrunken windows, normalised by the same mean and spread.
    """
    means, shrunken, shots, errors = [], [], [], []
    for window in windows(clips, size):
        pixels = clips[window.shot][window.start : window.start + size.frames]
        video = pixels_to_video(pixels.to(device))[None]
        mean, _ = encode_whole_clip(vae, video)
        output = decode_whole_clip(vae, mean).clamp(-1.0, 1.0)
        errors.append(((output - video) / 2.0).square().mean().item())
        means.append(mean[0].cpu())
        if coarse:
            shrunken.append(encode_whole_clip(vae, shrink(video))[0][0].cpu())
        shots.append(window.shot)
    latents = torch.stack(means)
    center, spread = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    if "latents_mean" in known:
        center, spread = torch.tensor(known["latents_mean"]), torch.tensor(known["latents_std"])
    groups = {"latents": latents} | ({"coarse": torch.stack(shrunken)} if coarse else {})
    tensors = {
        name: ((group - center[:, None, None, None]) / spread[:, None, None, None]).contiguous()
        for name, group in groups.items()
    }
    psnr = [-10.0 * math.log10(error) for error in errors]
    meta = {
        "latents_mean": [round(x, 6) for x in center.tolist()],
        "latents_std": [round(x, 6) for x in spread.tolist()],
        "psnr_mean": sum(psnr) / len(psnr),
        "psnr_min": min(psnr),
    }
    return tensors | {"shots": torch.tensor(shots)}, meta


class Run:
    """The autoencoder under training with its optimizer and counters."""

    def __init__(self, args: argparse.Namespace, device: str) -> None:
        self.args, self.device, self.began = args, device, time.monotonic()
        self.log_path = args.out.with_name(args.out.name + "_loss.jsonl")
        torch.manual_seed(args.seed)
        start = args.model.vae_start
        self.vae = (build_vae() if start is None else load_vae(start)).to(device)
        self.optimizer = torch.optim.AdamW(
            self.vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99)
        )
        self.meta: dict[str, Any] = {"step": 0, "seconds": 0.0}
        if args.out.exists():
            self._restore()
        if args.decoder_only:
            self.vae.encoder.requires_grad_(False)
            self.vae.quant_conv.requires_grad_(False)
        self.step, self.before, self.elapsed = self.meta["step"], self.meta["seconds"], 0.0
        self.clips = load_clips(args.clips)
        frames = min(FRAMES, args.video.frames)
        self.sampler = ClipSampler(self.clips, frames, args.batch, device, args.seed + self.step)
        if device == "cuda" and self.before < args.seconds:
            set_memory_format(self.vae, faster_memory_format(self.vae, self.sampler()))

    def _restore(self) -> None:
        groups, self.meta = load_checkpoint(self.args.out)
        self.vae.load_state_dict(groups["model"])
        count = float(self.meta["step"])
        for name, parameter in self.vae.named_parameters():
            if name in groups.get("exp_avg", {}):
                moments = {key: groups[key][name].to(self.device) for key in ADAM_KEYS}
                self.optimizer.state[parameter] = {**moments, "step": torch.tensor(count)}
        torch.manual_seed(self.args.seed + self.meta["step"])
        print(f"resumed at step {self.meta['step']}, {self.meta['seconds']:.0f} s")

    @property
    def seconds(self) -> float:
        """Training time of all runs."""
        return self.before + self.elapsed

    def save(self, extra: dict[str, Any]) -> None:
        """Write a checkpoint with the metadata ``extra``."""
        groups: Groups = {"model": self.vae.state_dict(), **{key: {} for key in ADAM_KEYS}}
        for name, parameter in self.vae.named_parameters():
            for key in self.optimizer.state[parameter].keys() & set(ADAM_KEYS):
                groups[key][name] = self.optimizer.state[parameter][key]
        meta = {"step": self.step, "seconds": self.seconds, **extra}
        save_checkpoint(self.args.out, groups, meta)

    def train_step(self, rate: float) -> Tensor:
        """Take one step and return its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = training_loss(self.vae, self.sampler())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.vae.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return loss.detach()

    def train(self) -> None:
        """Train until the time is used up, logging and saving on the way."""
        saved, losses, every = 0.0, [], self.args.log_every
        # Training the decoder alone is a stage of its own: it warms up and decays anew.
        first_step, start = (self.step, self.before) if self.args.decoder_only else (0, 0.0)
        while self.seconds < self.args.seconds and self.elapsed < self.args.run_seconds:
            progress = (self.seconds - start) / (self.args.seconds - start)
            warmth = min(1.0, (self.step - first_step + 1) / WARMUP_STEPS)
            rate = LEARNING_RATE * warmth * (0.5 + 0.5 * math.cos(math.pi * progress))
            losses.append(self.train_step(rate))
            if self.step % every:
                continue
            value = torch.stack(losses).mean().item()
            losses.clear()
            self.elapsed = time.monotonic() - self.began
            record = {"step": self.step, "loss": value, "seconds": self.seconds}
            append_log(self.log_path, record)
            if self.step % (10 * every) == 0:
                print(f"step {self.step}  loss {value:.4f}  {self.seconds:.0f} s", flush=True)
            if self.elapsed - saved > SAVE_EVERY_S:
                self.save(latent_statistics(self.meta))
                saved = self.elapsed
        set_memory_format(self.vae, torch.contiguous_format)

    def finish(self) -> None:
        """Write the last checkpoint and ``latents.safetensors`` beside it."""
        known = latent_statistics(self.meta) if self.args.decoder_only else {}
        coarse = self.args.model.coarse_share > 0.0
        latents, meta = encode_all(
            self.vae, self.clips, self.args.video, self.device, known, coarse
        )
        self.elapsed = time.monotonic() - self.began
        self.save(meta)
        path = self.args.out.with_name("latents.safetensors")
        save_file(latents, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
        print(
            f"VAE: {self.step} steps, {self.seconds:.0f} s, PSNR mean {meta['psnr_mean']:.2f} dB,"
            f" lowest window {meta['psnr_min']:.2f} dB; {len(latents['shots'])} windows"
        )


def main() -> None:
    """Train, then write the latents of all windows."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_size(parser)
    parser.add_argument("--clips", type=Path, help="clip file; this and others: by the size")
    parser.add_argument("--out", type=Path, help="checkpoint folder")
    parser.add_argument("--seconds", type=float, help="training time of all runs")
    parser.add_argument("--run-seconds", type=float, default=math.inf, help="limit of this run")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument(
        "--decoder-only",
        action="store_true",
        help="go on with a frozen encoder: trained transformers and their latents stay valid",
    )
    parser.add_argument("--smoke", action="store_true", help="small windows (for checks on a CPU)")
    args = parser.parse_args()
    args.model = size = SIZES[args.size]
    args.video = SMOKE if args.smoke else size.video
    args.clips, args.out = args.clips or size.clips, args.out or size.vae_dir
    args.seconds = size.vae_seconds if args.seconds is None else args.seconds
    args.batch = args.batch or size.vae_batch
    torch.backends.cudnn.benchmark = True
    run = Run(args, "cuda" if torch.cuda.is_available() else "cpu")
    run.train()
    run.finish()


if __name__ == "__main__":
    main()
