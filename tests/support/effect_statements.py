"""Statements of the programs in `effect_programs`: each does one thing that has an effect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

VIDEO, CHANNELS, HEADS = 70, 8, 2


@dataclass
class Values:
    """What statements read and write."""

    x: Tensor
    video: Tensor
    kept: list[Tensor] = field(default_factory=list)


class Attention(nn.Module):
    """Self-attention over (B, S, C); by `oracle`, if it is set, else by the stock operator."""

    oracle: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS)

    def operands(self, x: Tensor) -> tuple[Tensor, ...]:
        x = F.layer_norm(x, (CHANNELS,))
        return self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        serve = F.scaled_dot_product_attention if self.oracle is None else self.oracle
        return serve(q, k, v)

    def forward(self, x: Tensor, kind: str = "plain") -> Tensor:
        q, k, v = self.operands(x)
        if kind == "before":
            q.transpose(1, 2)[:, 3].mul_(2)
            k[..., 0] = v[..., 1]
        if kind == "dense":
            q, k, v = (each.contiguous() for each in (q, k, v))
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast_alone"):
            out = self.attend(q, k, v)
        if kind == "after":
            v.zero_()
            q.add_(1)
            return out.transpose(1, 2).flatten(2) + q.transpose(1, 2).flatten(2)
        if kind == "inplace":
            out.transpose(1, 2)[:, 1].mul_(2)
            out += 0.1
        if kind == "dense":  # the stock operator's output can be viewed so, and shares memory
            out.view(x.shape[0], -1).mul_(0.5)
        return out.transpose(1, 2).flatten(2).float()


Statement = Callable[..., Any]
STATEMENTS: dict[str, Statement] = {}


def statement(function: Statement) -> Statement:
    """List a statement by its name."""
    STATEMENTS[function.__name__] = function
    return function


for _kind in ("plain", "before", "after", "inplace", "dense", "autocast_alone"):
    STATEMENTS[f"attend_{_kind}"] = lambda m, s, layer, kind=_kind: layer(s.x, kind)


@statement
def attend_checkpointed(m: Any, s: Values, layer: Attention) -> Tensor:
    return checkpoint(layer, s.x, use_reentrant=False)


@statement
def attend_autocast(m: Any, s: Values, layer: Attention) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return layer(s.x).float()


@statement
def attend_no_grad(m: Any, s: Values, layer: Attention) -> Tensor:
    with torch.no_grad():
        return layer(s.x)


@statement
def attend_vmap(m: Any, s: Values, layer: Attention) -> Tensor:
    q, k, v = layer.operands(s.x)
    return torch.func.vmap(F.scaled_dot_product_attention)(q, k, v).transpose(1, 2).flatten(2)


@statement
def attend_masked(m: Any, s: Values, layer: Attention) -> Tensor:
    near = (m.table[:, 0] - m.table[:, None, 0]).abs() < 3
    q, k, v = layer.operands(s.x)
    return F.scaled_dot_product_attention(q, k, v, near).transpose(1, 2).flatten(2)


@statement
def scale(m: Any, s: Values) -> None:
    s.x.mul_(0.5)


@statement
def view_write(m: Any, s: Values) -> None:
    s.x.unflatten(-1, (2, -1))[..., 0].add_(0.5)


@statement
def keep_view(m: Any, s: Values) -> None:
    s.kept.append(s.x.transpose(1, 2))


@statement
def write_kept(m: Any, s: Values) -> None:
    if s.kept:
        s.kept[-1].mul_(2)


@statement
def detached_write(m: Any, s: Values) -> None:
    s.x.detach()[:, :, 1].neg_()


@statement
def set_channels(m: Any, s: Values) -> None:
    s.x[..., 1:3] = s.x[..., 3:5].clone()


@statement
def set_token(m: Any, s: Values) -> None:
    s.x[:, 3] = 1.5


@statement
def set_table(m: Any, s: Values) -> None:
    s.x[..., 0] = m.table[:, 0]


@statement
def set_halves(m: Any, s: Values) -> None:
    out = torch.empty_like(s.x)
    out[..., 0::2] = s.x[..., 1::2]
    out[..., 1::2] = -s.x[..., 0::2]
    s.x = out


@statement
def copy_tokens(m: Any, s: Values) -> None:
    out = torch.zeros_like(s.x)
    out[:, : VIDEO // 2].copy_(s.x[:, VIDEO // 2 :])
    s.x = s.x + out


@statement
def out_mul(m: Any, s: Values) -> None:
    out = torch.empty(s.x.shape)
    torch.mul(s.x, 0.7, out=out)
    s.x = out


@statement
def out_table(m: Any, s: Values) -> None:
    out = torch.empty(s.x.shape)
    torch.add(s.x, m.table, out=out)
    s.x = out * 0.7


@statement
def out_sum(m: Any, s: Values) -> None:
    out = torch.empty(s.x.shape[:2])
    torch.sum(s.x, -1, out=out)
    s.x = s.x + 0.3 * out[..., None]


@statement
def out_max(m: Any, s: Values) -> None:
    out, places = torch.empty(s.x.shape[:2]), torch.empty(s.x.shape[:2], dtype=torch.long)
    torch.max(s.x, -1, out=(out, places))
    s.x = s.x + 0.3 * out[..., None]


@statement
def foreach(m: Any, s: Values) -> None:
    other = s.x.flip(1)
    torch._foreach_mul_([other, s.x], 0.8)
    s.x = s.x + 0.3 * other


@statement
def leaky(m: Any, s: Values) -> None:
    F.leaky_relu(s.x, 0.1, True)


@statement
def turned(m: Any, s: Values) -> None:
    out = s.x.clone()
    out.transpose_(1, 2)
    s.x = s.x + 0.3 * out.transpose(1, 2).cos()


@statement
def count(m: Any, s: Values) -> None:
    m.count.add_(1)
    s.x = s.x * (1 + 0.1 * m.count)


@statement
def fill_cache(m: Any, s: Values) -> None:
    m.cache.copy_(s.x[:1].detach())


@statement
def set_cache(m: Any, s: Values) -> None:
    m.cache[:, :, 1] = s.x[:1, :, 2].detach()


@statement
def read_cache(m: Any, s: Values) -> None:
    s.x = s.x + 0.3 * m.cache


@statement
def batch_norm(m: Any, s: Values) -> None:
    s.x = F.batch_norm(s.x, m.mean, m.variance, training=True) + 0.3 * m.mean[:, None]


# Random numbers of a shape: Inductor, also the stock one, draws those like a tensor in the order of
# the layout that it chose.


@statement
def noise(m: Any, s: Values) -> None:
    s.x = s.x + 0.3 * torch.randn(s.x.shape)


@statement
def noise_inplace(m: Any, s: Values) -> None:
    s.x = s.x + 0.3 * torch.empty(s.x.shape).normal_()


@statement
def unused_noise(m: Any, s: Values) -> None:
    torch.rand(3)


@statement
def dropout(m: Any, s: Values) -> None:
    s.x = s.x * F.dropout(torch.ones(s.x.shape), 0.3, True)


@statement
def autocast(m: Any, s: Values) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            y = m.linear(s.x)
        y = m.linear(y)
    s.x = s.x + y.float()


@statement
def no_grad_write(m: Any, s: Values) -> None:
    with torch.no_grad():
        s.x.add_(0.2)


@statement
def checks(m: Any, s: Values) -> None:
    torch._assert_async((s.x.abs() < 1e9).all())
    torch._check(s.x.shape[1] == VIDEO)


@statement
def vmapped(m: Any, s: Values) -> None:
    s.x = torch.func.vmap(lambda a: a * a.sum(-1, keepdim=True).sigmoid())(s.x)


@statement
def vmapped_write(m: Any, s: Values) -> None:
    torch.func.vmap(lambda a: a.mul_(0.6))(s.x)


@statement
def vmapped_tokens(m: Any, s: Values) -> None:
    s.x = torch.func.vmap(lambda a: a + a.mean(-1, keepdim=True), in_dims=1, out_dims=1)(s.x)


@statement
def graded(m: Any, s: Values) -> None:
    s.x = s.x + torch.func.grad(lambda a: a.sin().sum())(s.x.detach())


@statement
def write_input(m: Any, s: Values) -> None:
    s.video.add_(0.4)


@statement
def neighbours(m: Any, s: Values) -> None:
    s.x = s.x + F.avg_pool1d(s.x.transpose(1, 2), 3, 1, 1).transpose(1, 2)


FLOWING = [
    "attend_autocast", "attend_autocast_alone", "attend_no_grad", "attend_plain", "autocast",
    "count", "dropout", "keep_view", "no_grad_write", "noise", "noise_inplace", "read_cache",
    "scale", "set_channels", "set_halves", "set_table", "unused_noise", "view_write", "write_kept",
]  # fmt: skip
"""Statements that tokens may pass in the plan's order."""
