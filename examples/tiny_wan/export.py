"""Write the diffusers pipeline folder from the trained parts (or from random weights)."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from checkpoint import load_checkpoint
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from settings import DIT_DIR, FLOW_SHIFT, MODEL_DIR, TRANSFORMER_CONFIG, VAE_DIR, load_shots
from text import build_text_encoder, build_tokenizer
from vae import build_vae

SIZE_LIMIT = 16_000_000


def assemble(vae_dir: Path | None, dit_dir: Path | None, seed: int = 0) -> WanPipeline:
    """Return the pipeline with the averaged weights of the checkpoints, where given."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(caption for shot in load_shots() for caption in shot.captions)
    text_encoder = build_text_encoder(len(tokenizer))
    transformer = WanTransformer3DModel(**TRANSFORMER_CONFIG)
    vae = build_vae()
    if vae_dir is not None:
        tensors, meta = load_checkpoint(vae_dir)
        vae.load_state_dict(tensors["model"])
        vae.register_to_config(latents_mean=meta["latents_mean"], latents_std=meta["latents_std"])
    if dit_dir is not None:
        averaged = load_checkpoint(dit_dir)[0]["ema"]
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
    parser.add_argument("--vae", type=Path, default=VAE_DIR)
    parser.add_argument("--dit", type=Path, default=DIT_DIR)
    parser.add_argument("--out", type=Path, default=MODEL_DIR)
    parser.add_argument("--random", action="store_true", help="untrained weights (for tests)")
    args = parser.parse_args()
    pipeline = assemble(None, None) if args.random else assemble(args.vae, args.dit)
    pipeline.to(torch.bfloat16).save_pretrained(args.out, safe_serialization=True)
    # transformers 4 and 5 both have this name for the tokenizer that needs no sentencepiece file.
    index = args.out / "model_index.json"
    index.write_text(index.read_text().replace('"T5Tokenizer"', '"T5TokenizerFast"'))
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{args.out}: {size / 1e6:.2f} MB")
    if size > SIZE_LIMIT:
        raise SystemExit(f"the folder is {size} bytes, more than {SIZE_LIMIT}")


if __name__ == "__main__":
    main()
