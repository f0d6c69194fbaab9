"""Print how concentrated the self-attention is, for the trained model and an untrained copy.

For every block of 64 queries (in raster order) the number is the share of its attention mass that
lies in its best 20 % of key blocks, averaged over blocks, heads, layers, a few steps and both
guidance passes of a real sampling run. Attention without structure gives 0.20.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline, WanTransformer3DModel
from settings import MODEL_DIR, load_demo
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

BLOCK = 64
BEST = 0.2


def best_block_share(query: Tensor, key: Tensor) -> Tensor:
    """Return (H,) shares of the mass in each query block's best key blocks, batch averaged.

    ``query`` and ``key`` are (B, H, S, D). A fraction of a block counts with its fraction.
    """
    batch, heads, tokens, width = query.shape
    blocks = -(-tokens // BLOCK)
    pad = blocks * BLOCK - tokens
    shares = torch.zeros(heads, device=query.device)
    for row in range(batch):
        scores = query[row].float() @ key[row].float().mT / math.sqrt(width)
        mass = (
            functional.pad(scores.softmax(dim=-1), (0, pad)).unflatten(-1, (blocks, BLOCK)).sum(-1)
        )
        mass = functional.pad(mass, (0, 0, 0, pad)).unflatten(1, (blocks, BLOCK)).sum(2)
        mass = mass / mass.sum(-1, keepdim=True)
        best = mass.sort(dim=-1, descending=True).values
        weight = (BEST * tokens / BLOCK - torch.arange(blocks, device=mass.device)).clamp(0, 1)
        shares += (best * weight).sum(-1).mean(-1)
    return shares / batch


class AttentionProbe(TorchFunctionMode):
    """Measures the self-attention calls of chosen steps while a pipeline runs."""

    def __init__(self, tokens: int, layers: int, steps: tuple[int, ...], passes: int) -> None:
        super().__init__()
        self.tokens, self.layers, self.steps, self.passes = tokens, layers, steps, passes
        self.calls = 0
        self.shares: list[tuple[int, int, Tensor]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Record (step, layer, share per head), then compute the attention as ever."""
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            query = args[0] if args else kwargs["query"]
            key = args[1] if len(args) > 1 else kwargs["key"]
            if query.shape[2] == key.shape[2] == self.tokens:
                step, layer = divmod(self.calls, self.layers)
                step //= self.passes
                self.calls += 1
                if step in self.steps:
                    self.shares.append((step, layer, best_block_share(query, key).cpu()))
        return func(*args, **kwargs)


def measure(
    pipeline: WanPipeline, demo: dict[str, Any], prompts: list[dict[str, Any]], steps: list[int]
) -> dict[str, Any]:
    """Sample the prompts and return the shares: mean, by layer, by step, by layer and head."""
    vae, transformer = pipeline.vae.config, pipeline.transformer.config
    frames = (demo["num_frames"] - 1) // vae.scale_factor_temporal + 1
    cell = [vae.scale_factor_spatial * patch for patch in transformer.patch_size[1:]]
    tokens = frames * (demo["height"] // cell[0]) * (demo["width"] // cell[1])
    table: list[tuple[int, int, Tensor]] = []
    for entry in prompts:
        probe = AttentionProbe(tokens, transformer.num_layers, tuple(steps), passes=2)
        with probe:
            run_pipeline(pipeline, demo, entry["prompt"], entry["seed"], output_type="latent")
        table += probe.shares
    by_head = torch.stack(
        [
            torch.stack([share for _, at, share in table if at == layer]).mean(0)
            for layer in range(transformer.num_layers)
        ]
    )
    by_step = [torch.stack([s for at, _, s in table if at == step]).mean().item() for step in steps]
    return {"tokens": tokens, "mean": by_head.mean().item(), "by_step": by_step, "by_head": by_head}


def run_pipeline(
    pipeline: WanPipeline, demo: dict[str, Any], prompt: str, seed: int, output_type: str = "np"
) -> Any:
    """Return the pipeline's first video (or latents) for one prompt at the demo's settings."""
    result = pipeline(
        prompt=prompt,
        negative_prompt=demo["negative_prompt"],
        height=demo["height"],
        width=demo["width"],
        num_frames=demo["num_frames"],
        num_inference_steps=demo["num_inference_steps"],
        guidance_scale=demo["guidance_scale"],
        max_sequence_length=demo["max_sequence_length"],
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type=output_type,
    )
    return result.frames[0]


def main() -> None:
    """Print both numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--prompts", type=int, default=2, help="held-out prompts to sample")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 5, 10, 15, 19])
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    demo = load_demo()
    pipeline = WanPipeline.from_pretrained(str(args.model), torch_dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    untrained = WanTransformer3DModel.from_config(pipeline.transformer.config).to(device).eval()
    trained = pipeline.transformer
    for name, transformer in (("trained", trained), ("untrained", untrained)):
        pipeline.transformer = transformer
        found = measure(pipeline, demo, demo["held_out"][: args.prompts], args.steps)
        print(f"{name}: {found['mean']:.3f} of the mass in the best 20 % of {BLOCK}-token blocks")
        pairs = zip(args.steps, found["by_step"], strict=True)
        print("  by step", {step: round(share, 2) for step, share in pairs})
        for layer, row in enumerate(found["by_head"].tolist()):
            print(f"  layer {layer}, by head", [round(x, 2) for x in row])


if __name__ == "__main__":
    main()
