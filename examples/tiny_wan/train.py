"""Train the video transformer and its text encoder on the latents of the chosen shots.

The run stops by itself after ``--run-seconds``, always with a checkpoint, and continues from the
last checkpoint when started again, until ``--seconds`` of training over all runs.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from checkpoint import Groups, append_log, load_checkpoint, save_checkpoint
from diffusers import WanTransformer3DModel
from optim import MuonAdamW
from safetensors.torch import load_file
from settings import FLOW_SHIFT, SIZES, ModelSize, add_size
from text import build_text_encoder, build_tokenizer, encode_text, tokenize
from torch import Tensor, nn

WARMUP_STEPS = 200
AGAIN_STEPS = 50
"""Steps of warm-up where a run goes on without the optimizer's state."""
DECAY_FROM = 0.5
"""Fraction of the training time after which the learning rate falls linearly to zero."""
EMA_DECAY = 0.999
CAPTION_DROPOUT = 0.1
SAVE_EVERY_S = 90.0
LIGHT = torch.bfloat16


@dataclass(frozen=True)
class Batch:
    """Clean latents (B, C, T, h, w) with the token ids and masks of their captions."""

    latents: Tensor
    ids: Tensor
    mask: Tensor


class LatentSampler:
    """Draws windows evenly over shots, and a caption of the shot or none."""

    def __init__(self, path: Path, device: str, seed: int, size: ModelSize) -> None:
        stored = load_file(path)
        self.latents = stored["latents"].to(device)
        self.coarse = stored["coarse"].to(device) if "coarse" in stored else None
        shot_of_window = stored["shots"].tolist()
        self.windows = [
            torch.tensor([i for i, s in enumerate(shot_of_window) if s == shot])
            for shot in sorted(set(shot_of_window))
        ]
        shots = size.shots()
        tokenizer = build_tokenizer(caption for shot in shots for caption in shot.captions)
        self.vocabulary = len(tokenizer)
        captions = [list(shot.captions) for shot in shots]
        self.captions_per_shot = min(len(entry) for entry in captions)
        flat = [c for entry in captions for c in entry[: self.captions_per_shot]] + [""]
        ids, mask = tokenize(tokenizer, flat)
        self.ids, self.mask = ids.to(device), mask.to(device)
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, n: int, coarse: bool) -> Batch:
        """Return a batch of ``n`` windows, or of shrunken ones."""
        g = self.generator
        shots = torch.randint(len(self.windows), (n,), generator=g)
        rows = torch.rand(n, generator=g).tolist()
        picks = [
            int(self.windows[shot][int(row * len(self.windows[shot]))])
            for shot, row in zip(shots.tolist(), rows, strict=True)
        ]
        captions = torch.randint(self.captions_per_shot, (n,), generator=g)
        captions = shots * self.captions_per_shot + captions
        captions[torch.rand(n, generator=g) < CAPTION_DROPOUT] = len(self.ids) - 1
        picked = torch.tensor(picks).to(self.device, non_blocking=True)
        captions = captions.to(self.device, non_blocking=True)
        latents = self.latents
        if coarse:
            if self.coarse is None:
                raise SystemExit("the latents hold no coarse ones: delete them, train_vae.py again")
            latents = self.coarse
        return Batch(latents[picked], self.ids[captions], self.mask[captions])


def noise_levels(count: int, device: str) -> Tensor:
    """Return sigmas in (0, 1), spread evenly over the shifted schedule."""
    u = (torch.arange(count, device=device) + torch.rand(count, device=device)) / count
    return FLOW_SHIFT * u / (1.0 + (FLOW_SHIFT - 1.0) * u)


def flow_loss(parts: nn.ModuleDict, batch: Batch) -> Tensor:
    """Mean squared error of the predicted velocity ``noise - latents``."""
    clean = batch.latents
    device = clean.device.type
    sigma = noise_levels(len(clean), device)
    noise = torch.randn_like(clean)
    level = sigma[:, None, None, None, None]
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        text = encode_text(parts["text_encoder"], batch.ids, batch.mask)
        noisy = (1.0 - level) * clean + level * noise
        output = parts["transformer"](noisy, sigma * 1000.0, text, return_dict=False)[0]
    return (output.float() - (noise - clean)).square().mean()


class Run:
    """The model under training with its optimizer, weight average and counters."""

    def __init__(self, args: argparse.Namespace, device: str) -> None:
        self.args, self.began = args, time.monotonic()
        self.log_path = args.out.with_name(args.out.name + "_loss.jsonl")
        torch.manual_seed(args.seed)
        meta: dict[str, Any] = {"step": 0, "seconds": 0.0, "samples": 0}
        source = args.out if args.out.exists() else args.resume
        groups: Groups = {}
        if source is not None and source.exists():
            groups, meta = load_checkpoint(source)
            print(f"resumed from {source.name} at step {meta['step']}, {meta['seconds']:.0f} s")
        self.step, self.before, self.samples = meta["step"], meta["seconds"], meta["samples"]
        self.elapsed = 0.0
        self.sampler = LatentSampler(args.latents, device, args.seed + self.step, args.model)
        transformer = WanTransformer3DModel(**args.model.transformer_config)
        text_encoder = build_text_encoder(self.sampler.vocabulary)
        self.parts = nn.ModuleDict({"transformer": transformer, "text_encoder": text_encoder})
        self.parts.to(device)
        self.named = dict(self.parts.named_parameters())
        self.averages = {name: p.detach().clone() for name, p in self.named.items()}
        self.optimizer = MuonAdamW(self.named)
        self.warm_from, self.warm_steps = 0, WARMUP_STEPS
        if groups:
            self._restore(groups)
        if device == "cuda":
            transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)

    @torch.no_grad()
    def _restore(self, groups: Groups) -> None:
        weights = groups["model" if "model" in groups else "ema"]
        for name, parameter in self.named.items():
            parameter.copy_(weights[name])
            self.averages[name].copy_(groups.get("ema", weights)[name])
        if "momentum" in groups:
            self.optimizer.load(groups, self.step)
        else:
            self.warm_from, self.warm_steps = self.step, AGAIN_STEPS
        torch.manual_seed(self.args.seed + self.step)

    @property
    def seconds(self) -> float:
        """Training time of all runs."""
        return self.before + self.elapsed

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write a checkpoint."""
        content: Groups = {"model": self.named, "ema": self.averages}
        if self.args.model.light:
            over = self.seconds >= self.args.seconds
            content, dtype = ({"ema": self.averages} if over else {"model": self.named}), LIGHT
        else:
            content |= self.optimizer.state()
        meta = {"step": self.step, "seconds": self.seconds, "samples": self.samples}
        save_checkpoint(folder, content, meta, dtype)

    def train_step(self, rate: float) -> Tensor:
        """Take one step and return its loss."""
        coarse = self.seconds < self.args.model.coarse_share * self.args.seconds
        batch = self.args.model.coarse_batch if coarse else self.args.batch
        loss = flow_loss(self.parts, self.sampler(batch, coarse))
        loss.backward()
        nn.utils.clip_grad_norm_(self.named.values(), 1.0)
        self.optimizer.step(rate)
        self.step += 1
        self.samples += batch
        averaged = self.step - self.warm_from
        decay = min(EMA_DECAY, (1.0 + averaged) / (10.0 + averaged))
        with torch.no_grad():
            averages, weights = list(self.averages.values()), list(self.named.values())
            torch._foreach_lerp_(averages, weights, 1.0 - decay)
        return loss.detach()

    def train(self) -> None:
        """Train until the time is used up, logging and saving on the way."""
        saved, losses, every = 0.0, [], self.args.log_every
        while self.seconds < self.args.seconds and self.elapsed < self.args.run_seconds:
            left = 1.0 - self.seconds / self.args.seconds
            warmth = (self.step - self.warm_from + 1) / self.warm_steps
            factor = min(1.0, warmth, left / (1.0 - DECAY_FROM))
            losses.append(self.train_step(self.args.rate * factor))
            if self.step % every:
                continue
            value = torch.stack(losses).mean().item()
            losses.clear()
            self.elapsed = time.monotonic() - self.began
            append_log(
                self.log_path,
                {
                    "step": self.step,
                    "loss": value,
                    "rate": self.args.rate * factor,
                    "seconds": self.seconds,
                },
            )
            if self.step % (20 * every) == 0 or self.step == every:
                print(f"step {self.step}  loss {value:.4f}  {self.seconds:.0f} s", flush=True)
            if self.elapsed - saved > SAVE_EVERY_S:
                self.save(self.args.out)
                saved = self.elapsed
        self.elapsed = time.monotonic() - self.began


def main() -> None:
    """Train and keep checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_size(parser)
    parser.add_argument("--latents", type=Path, help="of all windows; this and others: by the size")
    parser.add_argument("--out", type=Path, help="checkpoint folder")
    parser.add_argument("--resume", type=Path, help="checkpoint to start from if --out has none")
    parser.add_argument("--portable", type=Path, help="also write a bfloat16 copy here at the end")
    parser.add_argument("--seconds", type=float, help="training time of all runs")
    parser.add_argument("--run-seconds", type=float, default=math.inf, help="limit of this run")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=20)
    args = parser.parse_args()
    args.model = size = SIZES[args.size]
    args.latents, args.out = args.latents or size.latents, args.out or size.dit_dir
    args.seconds = size.seconds if args.seconds is None else args.seconds
    args.batch = args.batch or size.batch
    torch.set_float32_matmul_precision("high")
    run = Run(args, "cuda" if torch.cuda.is_available() else "cpu")
    run.train()
    run.save(args.out)
    if args.portable is not None:
        run.save(args.portable, torch.bfloat16)
    print(f"transformer: {run.step} steps, {run.samples} samples, {run.seconds:.0f} s")


if __name__ == "__main__":
    main()
