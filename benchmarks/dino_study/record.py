"""Calibration: what is recorded of each frame, per layer, head, query block and key block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from dino_study.form import Head
from dino_study.vit import Dino, dense
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from calibatt_compiler.files import replacing
from calibatt_compiler.kernels.energy import block_energy


@dataclass(frozen=True)
class Record:
    """What the calibration frames showed; R query blocks and C key blocks."""

    energies: Tensor
    """float32 (inputs, layers, heads, R, C): block energies as the library defines them."""
    gram: Tensor | None
    """float32 (layers, heads, R, C, C), mean over the inputs, or None where it was not recorded.

    Sums over a row's queries of g[c] . g[c'], where g[c] = P[c] (V[c] - o) is what block c adds to
    the output beyond its share. The g of a row sum to 0 with the class token's, so weights w err by
    u' G u with u = w - 1 before they are normalised."""

    @property
    def mean(self) -> Tensor:
        """Mean energy over the inputs, (layers, heads, R, C)."""
        return self.energies.mean(0)


def _gram(head: Head) -> Tensor:
    """Return the Gram matrices of one head, (R, C, C)."""
    grams = []
    for rows in head.chunks():
        parts = head.take_apart(rows)
        change = parts.numerator - parts.denominator[:, :, None] * parts.output
        change[:, max(0, head.tokens - rows.start * head.block) :] = 0  # padded queries
        by_row = change.view(head.blocks, len(rows), -1).transpose(0, 1)
        grams.append(by_row @ by_row.mT)
    return torch.cat(grams)


def log_sum_exp(q: Tensor, k: Tensor, rows: int = 512) -> Tensor:
    """Return the log-sum-exp of the scaled scores, (1, heads, queries), some rows at a time."""
    keys = k[0].mT * q.shape[-1] ** -0.5
    parts = [
        torch.stack([(a @ b).logsumexp(-1) for a, b in zip(part, keys, strict=True)])
        for part in q[0].split(rows, 1)
    ]
    return torch.cat(parts, 1)[None]


def record_frame(
    net: Dino, image: Tensor, order: Tensor, block: int, *, gram: bool
) -> dict[str, Tensor]:
    """Run one frame densely; return its energies and, if wanted, its Gram matrices."""
    energies, grams = [], []

    def observe(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        lse = log_sum_exp(q[:, :, 1:], k)
        energies.append(block_energy(q[:, :, 1:], k[:, :, 1:], block=(block, block), lse=lse)[0])
        if gram:
            heads = zip(q[0], k[0], v[0], strict=True)
            grams.append(torch.stack([_gram(Head(*parts, block, ())) for parts in heads]))
        return dense(layer, q, k, v)

    net(image, observe, order)
    found = {"energies": torch.stack(energies)}
    return {**found, "gram": torch.stack(grams)} if gram else found


def record_frames(
    net: Dino,
    images: Sequence[Callable[[], Tensor]],
    order: Tensor,
    block: int,
    folder: Path,
    *,
    gram: bool,
) -> Record:
    """Record all frames, one file a frame; a frame whose file is there is not run again."""
    energies, mean = [], None
    for number, image in enumerate(images):
        path = folder / f"frame-{number}.safetensors"
        if not path.exists():
            with replacing(path) as temporary:
                save_file(record_frame(net, image(), order, block, gram=gram), temporary)
            print(f"recorded {path.name} of {folder.name}", flush=True)
        with safe_open(path, framework="pt") as tensors:
            energies.append(tensors.get_tensor("energies"))
            if gram:
                one = tensors.get_tensor("gram").div_(len(images))
                mean = one if mean is None else mean.add_(one)
    return Record(torch.stack(energies), mean)
