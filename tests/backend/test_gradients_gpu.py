"""Gradients on a GPU: through Inductor and the GPU's kernels, in a thread of the backward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from calibatt_compiler.plan import Plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.inductor,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOKENS, HEADS, HEAD_DIM = 900, 2, 64
WIDTH = HEADS * HEAD_DIM


class Attention(nn.Module):
    mask: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, self.mask).transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(2))
        self.checkpointed = checkpointed

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        x = hidden_states + (0.001 * timestep[:, None, None]).to(hidden_states.dtype)
        for layer in self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x))
        return x


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_masked_model(dtype: torch.dtype, checkpointed: bool) -> None:
    """In bfloat16 the yardstick is the error of the masked model in that dtype."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    masks = {
        f"layers.{index}": (torch.rand(1, HEADS, 8, 8) < 0.3) | torch.eye(8, dtype=torch.bool)
        for index in range(2)
    }
    plan = Plan.from_masks(masks, (1, 30, 30), [500.0], (128, 128))
    model = Model(checkpointed).to("cuda", dtype)
    compiled = torch.compile(model, backend="calibatt", fullgraph=True, options={"plan": plan})
    x, t = torch.randn(2, TOKENS, WIDTH, device="cuda"), torch.full((2,), 500.0, device="cuda")

    def gradients(run: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        video = x.to(dtype).requires_grad_()
        return list(torch.autograd.grad(run(video, t).sin().sum(), [video, *model.parameters()]))

    found = gradients(compiled, dtype)
    for index, layer in enumerate(model.layers):
        mask = plan.sites[f"layers.{index}"].at(0).token_mask()
        layer.mask = mask[None].to("cuda")
    yardstick = gradients(model, dtype)
    model.double()
    exact = gradients(model, torch.float64)
    for got, rough, want in zip(found, yardstick, exact, strict=True):
        bound = 3 * (rough - want).norm() + 1e-5 * want.norm()
        assert (got - want).norm() <= bound
