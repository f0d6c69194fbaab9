"""DINOv2's vision transformer in plain torch, its attention replaceable by a hook.

The architecture is that of the published ViT-S/14 without registers: pre-norm blocks, layer scale,
exact GELU, learned positions resized bicubically to the grid, one class token in front.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q, k, v) -> output; all (1, heads, 1 + patches, head_dim), the class token first."""

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class DinoConfig:
    """Sizes of the network; the defaults are DINOv2-S/14."""

    dim: int = 384
    heads: int = 6
    depth: int = 12
    patch: int = 14
    positions: int = 37
    """Side of the grid that positions were learned on."""


def dense(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Stock attention: what every study is compared with."""
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Self-attention over all tokens."""

    def __init__(self, config: DinoConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.dim, config.dim)
        self.key = nn.Linear(config.dim, config.dim)
        self.value = nn.Linear(config.dim, config.dim)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor, layer: int, attend: Attend) -> Tensor:
        """Return (1, N, dim) for (1, N, dim)."""
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        output: Tensor = self.out(attend(layer, q, k, v).transpose(1, 2).flatten(2))
        return output


class Mlp(nn.Module):
    """Two linear layers, four times as wide between them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (1, N, dim) for (1, N, dim)."""
        output: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return output


class Layer(nn.Module):
    """One transformer block."""

    def __init__(self, config: DinoConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=1e-6)
        self.attention = Attention(config)
        self.scale1 = nn.Parameter(torch.ones(config.dim))
        self.norm2 = nn.LayerNorm(config.dim, eps=1e-6)
        self.mlp = Mlp(config.dim)
        self.scale2 = nn.Parameter(torch.ones(config.dim))

    def forward(self, x: Tensor, layer: int, attend: Attend) -> Tensor:
        """Return (1, N, dim) for (1, N, dim)."""
        x = x + self.scale1 * self.attention(self.norm1(x), layer, attend)
        return x + self.scale2 * self.mlp(self.norm2(x))


class Dino(nn.Module):
    """The whole network, without a head."""

    def __init__(self, config: DinoConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or DinoConfig()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.cls_position = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.patch_positions = nn.Parameter(torch.zeros(1, config.positions**2, config.dim))
        self.patches = nn.Conv2d(3, config.dim, config.patch, config.patch)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Return the positions of a (rows, columns) grid of patches, (1, patches, dim)."""
        side = self.config.positions
        learned = self.patch_positions.transpose(1, 2).unflatten(-1, (side, side))
        resized = F.interpolate(learned, size=grid, mode="bicubic", align_corners=False)
        return resized.flatten(2).transpose(1, 2)

    def forward(self, image: Tensor, attend: Attend = dense, order: Tensor | None = None) -> Tensor:
        """Return the features after the last norm.

        Args:
            image: float (1, 3, H, W) in [0, 1], sides that are multiples of the patch.
            attend: called once a layer for its attention.
            order: int64 (patches,), the raster index of the patch at each place of the sequence.

        Returns:
            (1, 1 + patches, dim), the class token first, then the patches in raster order.
        """
        mean, std = (image.new_tensor(x).view(1, 3, 1, 1) for x in (MEAN, STD))
        patches = self.patches((image - mean) / std)
        grid = (patches.shape[2], patches.shape[3])
        x = patches.flatten(2).transpose(1, 2) + self.positions(grid)
        if order is not None:
            x = x[:, order]
        x = torch.cat([self.cls_token + self.cls_position, x], 1)
        for index, layer in enumerate(self.layers):
            x = layer(x, index, attend)
        x = self.norm(x)
        if order is None:
            return x
        return torch.cat([x[:, :1], x[:, 1:][:, order.argsort()]], 1)
