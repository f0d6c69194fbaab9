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
from checkpoint import append_log, load_checkpoint, save_checkpoint
from diffusers import WanTransformer3DModel
from optim import MuonAdamW
from safetensors.torch import load_file
from settings import DIT_DIR, FLOW_SHIFT, TRANSFORMER_CONFIG, WORK, load_shots
from text import build_text_encoder, build_tokenizer, encode_text, tokenize
from torch import Tensor, nn

WARMUP_STEPS = 200
DECAY_FROM = 0.5
"""Fraction of the training time after which the learning rate falls linearly to zero."""
EMA_DECAY = 0.999
CAPTION_DROPOUT = 0.1
SAVE_EVERY_S = 90.0


@dataclass(frozen=True)
class Batch:
    """Clean latents (B, C, T, h, w) with the token ids and masks of their captions."""

    latents: Tensor
    ids: Tensor
    mask: Tensor


class LatentSampler:
    """Draws windows evenly over shots, and a caption of the shot or none."""

    def __init__(self, path: Path, batch: int, device: str, seed: int) -> None:
        stored = load_file(path)
        self.latents = stored["latents"].to(device)
        shot_of_window = stored["shots"].tolist()
        self.windows = [
            torch.tensor([i for i, s in enumerate(shot_of_window) if s == shot])
            for shot in sorted(set(shot_of_window))
        ]
        shots = load_shots()
        tokenizer = build_tokenizer(caption for shot in shots for caption in shot.captions)
        self.vocabulary = len(tokenizer)
        captions = [list(shot.captions) for shot in shots]
        self.captions_per_shot = min(len(entry) for entry in captions)
        flat = [c for entry in captions for c in entry[: self.captions_per_shot]] + [""]
        ids, mask = tokenize(tokenizer, flat)
        self.ids, self.mask = ids.to(device), mask.to(device)
        self.batch, self.device = batch, device
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self) -> Batch:
        """Return one batch."""
        g, n = self.generator, self.batch
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
        return Batch(self.latents[picked], self.ids[captions], self.mask[captions])


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


def main() -> None:
    """Train and keep checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latents", type=Path, default=WORK / "latents.safetensors")
    parser.add_argument("--out", type=Path, default=DIT_DIR, help="checkpoint folder")
    parser.add_argument("--resume", type=Path, help="checkpoint to start from if --out has none")
    parser.add_argument("--portable", type=Path, help="also write a bfloat16 copy here at the end")
    parser.add_argument("--seconds", type=float, default=850.0, help="training time of all runs")
    parser.add_argument("--run-seconds", type=float, default=math.inf, help="limit of this run")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=20)
    args = parser.parse_args()
    began = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    meta: dict[str, Any] = {"step": 0, "seconds": 0.0, "samples": 0}
    source = args.out if args.out.exists() else args.resume
    groups: dict[str, dict[str, Tensor]] = {}
    if source is not None and source.exists():
        groups, meta = load_checkpoint(source)
        print(f"resumed from {source.name} at step {meta['step']}, {meta['seconds']:.0f} s")
    step, before, samples = meta["step"], meta["seconds"], meta["samples"]
    sampler = LatentSampler(args.latents, args.batch, device, args.seed + step)
    transformer = WanTransformer3DModel(**TRANSFORMER_CONFIG)
    parts = nn.ModuleDict(
        {"transformer": transformer, "text_encoder": build_text_encoder(sampler.vocabulary)}
    ).to(device)
    named = dict(parts.named_parameters())
    optimizer = MuonAdamW(named)
    if groups:
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(groups["model"][name])
        kept = groups.get("ema", groups["model"])
        averages = {name: kept[name].to(device) for name in named}
        optimizer.load(groups, step)
        torch.manual_seed(args.seed + step)
    else:
        averages = {name: parameter.detach().clone() for name, parameter in named.items()}
    if device == "cuda":
        transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
    log_path = args.out.with_name(args.out.name + "_loss.jsonl")

    def save(folder: Path, dtype: torch.dtype | None = None) -> None:
        content = {"model": named, "ema": averages, **optimizer.state()}
        state = {"step": step, "seconds": before + elapsed, "samples": samples}
        save_checkpoint(folder, content, state, dtype)

    elapsed = saved = 0.0
    losses: list[Tensor] = []
    while before + elapsed < args.seconds and elapsed < args.run_seconds:
        left = 1.0 - (before + elapsed) / args.seconds
        rate = args.rate * min(1.0, (step + 1) / WARMUP_STEPS, left / (1.0 - DECAY_FROM))
        loss = flow_loss(parts, sampler())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimizer.step(rate)
        step += 1
        samples += args.batch
        with torch.no_grad():
            decay = min(EMA_DECAY, (1.0 + step) / (10.0 + step))
            torch._foreach_lerp_(list(averages.values()), list(named.values()), 1.0 - decay)
        losses.append(loss.detach())
        if step % args.log_every == 0:
            value = torch.stack(losses).mean().item()
            losses.clear()
            elapsed = time.monotonic() - began
            record = {"step": step, "loss": value, "rate": rate, "seconds": before + elapsed}
            append_log(log_path, record)
            if step % (20 * args.log_every) == 0 or step == args.log_every:
                print(f"step {step}  loss {value:.4f}  {before + elapsed:.0f} s", flush=True)
            if elapsed - saved > SAVE_EVERY_S:
                save(args.out)
                saved = elapsed
    elapsed = time.monotonic() - began
    save(args.out)
    if args.portable is not None:
        save(args.portable, torch.bfloat16)
    print(f"transformer: {step} steps, {samples} samples, {before + elapsed:.0f} s", flush=True)


if __name__ == "__main__":
    main()
