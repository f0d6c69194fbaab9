"""What `ways_of_running.py` runs: ways of preparing a model, its plan, and what it must compute."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from attention_cases import SIZES, Case
from dit_layer import SCALES, Scale, make_model
from torch import Tensor
from zone_cases import make_zones

from calibatt_compiler.plan import BlockPattern, Plan, Sampler, SitePatterns

TIMESTEPS = (900.0, 500.0, 100.0)
CALLED = TIMESTEPS[:2]
"""Steps that are called: each draws other blocks."""
STOCK = torch.nn.functional.scaled_dot_product_attention
SDPA = "torch.nn.functional.scaled_dot_product_attention"


def plain(model: Any, on_gpu: bool, **how: Any) -> Callable[[], None]:
    """Compile the whole model."""
    model.to("cuda" if on_gpu else "cpu").compile(**how)
    return lambda: None


def model_offload(model: Any, on_gpu: bool, **how: Any) -> Callable[[], None]:
    """Bring the model to the GPU when it is called; the end of a video sends it back."""
    from diffusers import DiffusionPipeline

    class Pipeline(DiffusionPipeline):  # type: ignore[misc]
        """What `enable_model_cpu_offload` takes."""

        model_cpu_offload_seq = "transformer"

        def __init__(self, transformer: Any) -> None:
            super().__init__()
            self.register_modules(transformer=transformer)

    pipe = Pipeline(model)
    pipe.enable_model_cpu_offload(device="cuda" if on_gpu else "cpu")
    pipe.transformer.compile(**how)
    return pipe.maybe_free_model_hooks  # type: ignore[no-any-return]


def group_offload(kind: str, *, repeated: bool = False) -> Callable[..., Callable[[], None]]:
    """Bring blocks or leaves one by one, the next beside the compute of the last."""

    def way(model: Any, on_gpu: bool, **how: Any) -> Callable[[], None]:
        blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        model.enable_group_offload(
            onload_device=torch.device("cuda" if on_gpu else "cpu"),
            offload_device=torch.device("cpu"),
            offload_type=kind,
            use_stream=on_gpu,
            **blocks,
        )
        (model.compile_repeated_blocks if repeated else model.compile)(**how)
        return lambda: None

    return way


def repeated_blocks(model: Any, on_gpu: bool, **how: Any) -> Callable[[], None]:
    """Compile one block for all."""
    model.to("cuda" if on_gpu else "cpu").compile_repeated_blocks(**how)
    return lambda: None


WAYS: dict[str, Callable[..., Callable[[], None]]] = {
    "plain": plain,
    "model offload": model_offload,
    "group offload, blocks": group_offload("block_level"),
    "group offload, leaves": group_offload("leaf_level"),
    "blocks": repeated_blocks,
    "group offload, then blocks": group_offload("block_level", repeated=True),
}
"""Each takes a model that lies in host memory, and returns what ends a video."""


def peaked_model(scale: Scale, layers: int, device: torch.device, dtype: torch.dtype) -> Any:
    """Wan's widths with weights that let attention matter: a few keys have most of it."""
    model = make_model(scale, layers, device, torch.float32)
    generator = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(std=1.5 / weight[0].numel() ** 0.5, generator=generator)
            elif name.endswith("attn1.norm_q.weight"):
                weight.fill_(3.0)
    # All that is compared has the same values.
    return model.to(torch.bfloat16).to(dtype)


def make_plan(size: str, layers: int, density: float, block: int) -> Plan:
    """A plan of zones, each site with draws of its own."""
    scale = SCALES[size]
    tokens = math.prod(scale.grid)
    shape = replace(
        SIZES["720p" if size == "720p" else "480p"],
        name=size,
        tokens=tokens,
        frame=tokens // scale.grid[0],
        heads=scale.heads,
        head_dim=scale.head_dim,
        block=(block, block),
    )
    zones = make_zones(Case(shape, "zones", density))
    groups = (0,) * len(TIMESTEPS)
    sites = {
        f"blocks.{layer}.attn1": SitePatterns.of_zones(
            [zones.with_seed(layer)], groups, scale.head_dim
        )
        for layer in range(layers)
    }
    return Plan.create(sites, grid=scale.grid, sampler=Sampler(timesteps=TIMESTEPS))


def inputs(scale: Scale, timestep: float, device: torch.device, dtype: torch.dtype) -> Any:
    """Arguments of a forward pass, alike in all processes."""
    generator = torch.Generator().manual_seed(int(timestep))
    return {
        "hidden_states": torch.randn(1, 16, *scale.latent, generator=generator).to(device, dtype),
        "timestep": torch.tensor([timestep], device=device),
        "encoder_hidden_states": torch.randn(1, scale.text, 4096, generator=generator).to(
            device, dtype
        ),
        "return_dict": False,
    }


def attend_expanded(pattern: BlockPattern, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over (1, H, S, D) by kept blocks and their weights, a few rows at a time."""
    mask, weights = pattern.mask(), torch.from_numpy(pattern.log_weights())
    bias = torch.where(mask, weights, -torch.inf).to(q.device, q.dtype)
    out = torch.empty_like(q)
    some = max(1, 4096 // pattern.block_m)
    for head in range(pattern.heads):
        for row in range(0, pattern.query_blocks, some):
            tokens = slice(row * pattern.block_m, (row + some) * pattern.block_m)
            part = q[:, head, tokens]
            added = bias[head, row : row + some].repeat_interleave(pattern.block_m, 0)
            added = added.repeat_interleave(pattern.block_n, 1)
            scores = part @ k[:, head].mT / math.sqrt(q.shape[-1])
            scores += added[: part.shape[1], : k.shape[2]]
            out[:, head, tokens] = scores.softmax(-1) @ v[:, head]
    return out


def references(plan: Plan, size: str, layers: int, device: torch.device) -> dict[str, Tensor]:
    """Outputs of the eager model in float32, dense and by the plan, for each step called."""
    scale = SCALES[size]
    torch.backends.cudnn.allow_tf32 = False
    model = peaked_model(scale, layers, device, torch.float32)
    found = {}
    for timestep in CALLED:
        given = inputs(scale, timestep, device, torch.float32)
        found[f"stock {timestep:.0f}"] = model(**given)[0].cpu()
        step = plan.step_of(timestep)
        assert step is not None
        names = iter(plan.sites)

        def attend(
            query: Tensor, key: Tensor, value: Tensor, *,
            names: Any = names, step: int = step, **options: Any,
        ) -> Tensor:  # fmt: skip
            if query.shape[2] != key.shape[2]:
                return STOCK(query, key, value, **options)
            return attend_expanded(plan.sites[next(names)].at(step), query, key, value)

        with mock.patch(SDPA, attend):
            found[f"plan {timestep:.0f}"] = model(**given)[0].cpu()
        assert next(names, None) is None, "the reference missed a site"
    return found
