"""Sample the demo's prompts and put real frames above generated ones in one picture.

Also tells, for every video, which training window it is nearest to: a video counts as recognised
if that window belongs to the shot its prompt describes.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from clips import load_clips, windows
from diffusers import WanPipeline
from measure_attention import run_pipeline
from PIL import Image, ImageDraw
from settings import HERE, SIZES, add_size
from torch import Tensor

COLUMNS = 6
THUMB = (160, 96)


def thumbnails(video: Tensor) -> Image.Image:
    """Return a strip of frames of uint8 (T, 3, H, W), evenly spread."""
    strip = Image.new("RGB", (COLUMNS * THUMB[0], THUMB[1]))
    for column in range(COLUMNS):
        frame = video[round(column * (len(video) - 1) / (COLUMNS - 1))]
        image = Image.fromarray(frame.permute(1, 2, 0).numpy())
        strip.paste(image.resize(THUMB, Image.Resampling.LANCZOS), (column * THUMB[0], 0))
    return strip


def psnr(a: Tensor, b: Tensor) -> float:
    """Return the PSNR in dB of two uint8 videos."""
    error = (a.float() - b.float()).square().mean().clamp_min(1e-6).item()
    return 10.0 * math.log10(255.0**2 / error)


def main() -> None:
    """Write the picture and print one line a prompt."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_size(parser)
    parser.add_argument("--model", type=Path, help="a pipeline's folder; default: of the size")
    parser.add_argument("--clips", type=Path, help="clip file; default: of the size")
    parser.add_argument("--out", type=Path, help="the picture")
    parser.add_argument("--all", action="store_true", help="calibration prompts as well")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = SIZES[args.size]
    demo, length = size.demo(), size.video.frames
    out = args.out or (HERE if args.size == "demo" else size.work) / "samples.png"
    entries = demo["held_out"] + (demo["calibration"] if args.all else [])
    shots, clips = size.shots(), load_clips(args.clips or size.clips)
    found = windows(clips, size.video)
    pipeline = WanPipeline.from_pretrained(
        str(args.model or size.model_dir), torch_dtype=torch.float32
    ).to(device)
    pipeline.set_progress_bar_config(disable=True)
    sheet = Image.new("RGB", (COLUMNS * THUMB[0], len(entries) * (2 * THUMB[1] + 16)), "white")
    draw = ImageDraw.Draw(sheet)
    recognised = 0
    for row, entry in enumerate(entries):
        began = time.monotonic()
        frames = run_pipeline(pipeline, demo, entry["prompt"], entry["seed"])
        seconds = time.monotonic() - began
        video = torch.from_numpy((np.asarray(frames) * 255.0).round().astype(np.uint8))
        video = video.permute(0, 3, 1, 2)
        real = [clips[w.shot][w.start : w.start + length] for w in found]
        scores = [psnr(video, clip) for clip in real]
        best = max(range(len(scores)), key=scores.__getitem__)
        wanted = next(i for i, shot in enumerate(shots) if entry["prompt"] in shot.captions)
        recognised += found[best].shot == wanted
        own = max((i for i, w in enumerate(found) if w.shot == wanted), key=scores.__getitem__)
        top = row * (2 * THUMB[1] + 16)
        draw.text((4, top + 2), entry["prompt"], fill="black")
        sheet.paste(thumbnails(real[own]), (0, top + 16))
        sheet.paste(thumbnails(video), (0, top + 16 + THUMB[1]))
        print(
            f"{shots[wanted].name}: nearest window {shots[found[best].shot].name}"
            f"+{found[best].start} at {scores[best]:.2f} dB, own shot {scores[own]:.2f} dB,"
            f" {seconds:.1f} s",
            flush=True,
        )
    print(f"recognised {recognised} of {len(entries)}")
    sheet.quantize(256, dither=Image.Dither.NONE).save(out, optimize=True)


if __name__ == "__main__":
    main()
