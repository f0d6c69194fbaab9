"""Muon for the matrices of the transformer blocks, AdamW for everything else.

Muon orthogonalises the momentum of each matrix by a Newton-Schulz iteration; all matrices of one
shape share one batched iteration. Updates are scaled to a root mean square of 0.2, the size of
AdamW's; AdamW takes a third of the learning rate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

Named = dict[str, nn.Parameter]
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ADAM_KEYS = ("exp_avg", "exp_avg_sq")
ADAM_RATE = 1.0 / 3.0


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Return the batch (N, rows, columns) with all singular values brought near one."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


class MuonAdamW:
    """The optimizer of the transformer and its text encoder."""

    def __init__(self, parameters: Named, momentum: float = 0.95, decay: float = 0.01) -> None:
        self.momentum, self.decay = momentum, decay
        self.matrices: dict[torch.Size, Named] = {}
        rest: Named = {}
        for name, parameter in parameters.items():
            if ".blocks." in name and parameter.ndim == 2:
                self.matrices.setdefault(parameter.shape, {})[name] = parameter
            else:
                rest[name] = parameter
        self.buffers = {
            shape: torch.zeros(len(named), *shape, device=next(iter(named.values())).device)
            for shape, named in self.matrices.items()
        }
        self.rest = rest
        fused = next(iter(rest.values())).is_cuda
        self.adam = torch.optim.AdamW(
            rest.values(), betas=(0.9, 0.98), weight_decay=0.0, fused=fused
        )

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Apply the gradients with the learning rate ``rate`` and clear them."""
        for shape, named in self.matrices.items():
            parameters = list(named.values())
            gradients = torch.stack([p.grad for p in parameters])
            buffer = self.buffers[shape]
            buffer.mul_(self.momentum).add_(gradients)
            update = orthogonalise(gradients.add_(buffer, alpha=self.momentum))
            update.mul_(rate * 0.2 * max(shape) ** 0.5)
            torch._foreach_mul_(parameters, 1.0 - rate * self.decay)
            torch._foreach_sub_(parameters, list(update.unbind()))
            for parameter in parameters:
                parameter.grad = None
        for group in self.adam.param_groups:
            group["lr"] = rate * ADAM_RATE
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return the state as groups of named tensors."""
        groups: dict[str, dict[str, Tensor]] = {"momentum": {}, **{k: {} for k in ADAM_KEYS}}
        for shape, named in self.matrices.items():
            groups["momentum"].update(zip(named, self.buffers[shape].unbind(), strict=True))
        for name, parameter in self.rest.items():
            for key in ADAM_KEYS:
                groups[key][name] = self.adam.state[parameter][key]
        return groups

    def load(self, groups: dict[str, dict[str, Tensor]], step: int) -> None:
        """Restore what ``state`` returned."""
        for shape, named in self.matrices.items():
            for row, name in enumerate(named):
                self.buffers[shape][row].copy_(groups["momentum"][name])
        for name, parameter in self.rest.items():
            moments = {key: groups[key][name].to(parameter.device) for key in ADAM_KEYS}
            count = torch.tensor(float(step), device=parameter.device)
            self.adam.state[parameter] = {"step": count, **moments}
