"""Write the diffusers pipeline folder from the trained parts (or from random weights)."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from checkpoint import load_checkpoint
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from settings import DEMO, FLOW_SHIFT, SIZES, ModelSize, add_size
from text import build_text_encoder, build_tokenizer
from vae import build_vae


def assemble(
    vae_dir: Path | None, dit_dir: Path | None, seed: int = 0, size: ModelSize = DEMO
) -> WanPipeline:
    """Return the pipeline with the averaged weights of the checkpoints, where given."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(caption for shot in size.shots() for caption in shot.captions)
    text_encoder = build_text_encoder(len(tokenizer))
    transformer = WanTransformer3DModel(**size.transformer_config)
    vae = build_vae()
    if vae_dir is not None:
        tensors, meta = load_checkpoint(vae_dir)
        vae.load_state_dict(tensors["model"])
        vae.register_to_config(latents_mean=meta["latents_mean"], latents_std=meta["latents_std"])
    if dit_dir is not None:
        groups, _ = load_checkpoint(dit_dir)
        averaged = groups["ema" if "ema" in groups else "model"]
        parts = {"transformer": transformer, "text_encoder": text_encoder}
        with torch.no_grad():
            for part, module in parts.items():
                for name, parameter in module.named_parameters():
                    parameter.copy_(averaged[f"{part}.{name}"])
    scheduler = FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT)
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        scheduler=scheduler,
        transformer=transformer.eval(),
    )


def main() -> None:
    """Write the folder in bfloat16 and print its size."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_size(parser)
    parser.add_argument("--vae", type=Path, help="checkpoint folder")
    parser.add_argument("--dit", type=Path, help="checkpoint folder")
    parser.add_argument("--out", type=Path, help="the pipeline's folder")
    parser.add_argument("--random", action="store_true", help="untrained weights (for tests)")
    args = parser.parse_args()
    size = SIZES[args.size]
    out = args.out or size.model_dir
    trained = (args.vae or size.vae_dir, args.dit or size.dit_dir)
    pipeline = assemble(*((None, None) if args.random else trained), size=size)
    pipeline.to(torch.bfloat16).save_pretrained(out, safe_serialization=True)
    # transformers 4 and 5 both have this name for the tokenizer that needs no sentencepiece file.
    index = out / "model_index.json"
    index.write_text(index.read_text().replace('"T5Tokenizer"', '"T5TokenizerFast"'))
    total = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {total / 1e6:.2f} MB")
    if total > size.size_limit:
        raise SystemExit(f"the folder is {total} bytes, more than {size.size_limit}")


if __name__ == "__main__":
    main()
