"""Errors of forms on one image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from dino_study.form import Form, Head, attend, pool
from dino_study.vit import Dino, dense
from torch import Tensor

from calibatt_compiler.kernels.energy import block_energy

Select = Callable[[int, Tensor, Tensor], Form]
"""(layer, q, k) -> form, for methods that look at the input; q and k are (1, heads, tokens, D)."""


@dataclass(frozen=True)
class Method:
    """A named form of all layers; forms of single layers are slices of these (L, H, R, C)."""

    name: str
    forms: tuple[Form, ...] | Select
    cost: float
    """Mean share of the dense key work: kept blocks, pooled keys included."""

    def form(self, layer: int, q: Tensor, k: Tensor) -> Form:
        """Return the form of one layer; q and k without the class token."""
        return self.forms(layer, q, k) if callable(self.forms) else self.forms[layer]


def layer_errors(
    net: Dino, image: Tensor, order: Tensor, methods: Sequence[Method], block: int
) -> Tensor:
    """Return relative errors of each layer's attention output on its dense input, (methods, L).

    || o' - o || / || o || over all heads and patches.
    """
    squares: list[Tensor] = []

    def observe(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        forms = [method.form(layer, q[:, :, 1:], k[:, :, 1:]) for method in methods]
        pools = tuple(sorted({form.keys for form in forms if form.pooled is not None}))
        error = torch.zeros(len(methods))
        total = torch.zeros(())
        for index in range(q.shape[1]):
            head = Head(q[0, index], k[0, index], v[0, index], block, pools)
            weights = _columns(forms, index, pools)
            for rows in head.chunks():
                parts = head.take_apart(rows)
                part = slice(rows.start, rows.stop)
                results = head.put_together(parts, weights[part])
                target = parts.output.view(len(rows), 1, block, -1)
                change = results.sub_(target).square_().sum(-1)
                valid = torch.arange(rows.start * block, rows.stop * block) < head.tokens
                valid = valid.view(len(rows), 1, block)
                error += (change * valid).sum((0, 2))
                total += (target.square().sum(-1) * valid).sum()
        squares.append(error / total)
        return dense(layer, q, k, v)

    net(image, observe, order)
    return torch.stack(squares, 1).sqrt()


def _columns(forms: Sequence[Form], head: int, pools: tuple[int, ...]) -> Tensor:
    """Lay forms out as weights of the parts' columns, (R, forms, columns)."""
    columns = []
    for form in forms:
        exact = form.exact[head]
        pooled = [
            form.pooled[head] if form.pooled is not None and form.keys == size else exact * 0
            for size in pools
        ]
        columns.append(torch.cat([exact, *pooled], -1))
    return torch.stack(columns, 1)


def features_error(
    net: Dino, image: Tensor, order: Tensor, method: Method, block: int, reference: Tensor
) -> float:
    """Return the relative error of the final features with the method in all layers at once.

    `reference` are the features of dense attention.
    """

    def approximate(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, method.form(layer, q[:, :, 1:], k[:, :, 1:]), block)

    found = net(image, approximate, order)
    return float((found - reference).norm() / reference.norm())


def input_energy(q: Tensor, k: Tensor, block: int) -> Tensor:
    """Return the energies of this very input, (heads, R, C)."""
    return block_energy(q, k, block=(block, block))[0]


def pooled_scores(q: Tensor, k: Tensor, block: int) -> Tensor:
    """Return softmax of mean query times mean key, (heads, R, C): a run-time router's guess."""
    scores = pool(q[0], block, 1)[0] @ pool(k[0], block, 1)[0].mT * q.shape[-1] ** -0.5
    return scores.softmax(-1)
